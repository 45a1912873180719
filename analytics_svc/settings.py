"""What can be set from outside; see `chassis.settings`."""

from dataclasses import dataclass

from chassis.settings import address, amqp_url, choice, integer, postgres_url, setting, text, time_zone


@dataclass(frozen=True)
class ConsumerClientSettings:
    consumer_target: str = setting("CONSUMER_TARGET", text, default="127.0.0.1:50054")


@dataclass(frozen=True)
class MigrateSettings:
    database_url: str = setting("ANALYTICS_DATABASE_URL", postgres_url)
    business_time_zone: str = setting("BUSINESS_TIME_ZONE", time_zone, default="UTC")
    log_level: str = setting("LOG_LEVEL", choice("DEBUG", "INFO", "WARNING", "ERROR"), default="INFO")


@dataclass(frozen=True, kw_only=True)
class ConsumeSettings(MigrateSettings):
    amqp_url: str = setting("AMQP_URL", amqp_url)
    listen: str = setting("CONSUMER_LISTEN", address, default="127.0.0.1:50054")
    metrics_listen: str = setting("CONSUMER_METRICS_LISTEN", address, default="127.0.0.1:9467")
    # Events per transaction. Larger ones are hardly faster, but keep other consumers waiting for the hot rows.
    batch_max: int = setting("CONSUMER_BATCH_MAX", integer(1, 10_000), default=500)
    # Deliveries not yet acknowledged: the batch in flight and twice as many gathering, so that neither side waits.
    prefetch: int = setting("CONSUMER_PREFETCH", integer(1, 65_535), default=1_500)
    # Processes that may die of a message, tried alone, before it is quarantined unread. Each costs a restart, and one
    # may be chance: somebody may have killed it in that very millisecond.
    deaths_max: int = setting("CONSUMER_DEATHS_MAX", integer(1, 100), default=2)
    # How long the ids of counted events are kept, at least; 0 keeps them for ever. What arrives with an older id is
    # taken for a duplicate, and quarantined.
    log_retention_days: int = setting("CONSUMER_LOG_RETENTION_DAYS", integer(0, 36_500), default=0)
    # Whom the keeper, audits and repairs ask.
    purchases_target: str = setting("PURCHASES_TARGET", text, default="127.0.0.1:50051")
    relay_target: str = setting("RELAY_TARGET", text, default="127.0.0.1:50053")


@dataclass(frozen=True, kw_only=True)
class ServeSettings(MigrateSettings):
    listen: str = setting("ANALYTICS_LISTEN", address, default="127.0.0.1:50052")
    metrics_listen: str = setting("ANALYTICS_METRICS_LISTEN", address, default="127.0.0.1:9465")
    # Queries at once: as many as keep the database's cores busy.
    read_connections: int = setting("ANALYTICS_READ_CONNECTIONS", integer(1, 100), default=4)


@dataclass(frozen=True)
class ReportSettings:
    analytics_target: str = setting("ANALYTICS_TARGET", address, default="127.0.0.1:50052")


@dataclass(frozen=True, kw_only=True)
class RebuildSettings(MigrateSettings):
    purchases_target: str = setting("PURCHASES_TARGET", text, default="127.0.0.1:50051")
    relay_target: str = setting("RELAY_TARGET", text, default="127.0.0.1:50053")
