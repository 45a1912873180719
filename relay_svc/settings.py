"""What can be set from outside; see `chassis.settings`."""

from dataclasses import dataclass

from chassis.settings import address, amqp_url, choice, integer, postgres_url, seconds, setting, text


@dataclass(frozen=True)
class ServeSettings:
    database_url: str = setting("PURCHASES_DATABASE_URL", postgres_url)
    amqp_url: str = setting("AMQP_URL", amqp_url)
    listen: str = setting("RELAY_LISTEN", address, default="127.0.0.1:50053")
    metrics_listen: str = setting("RELAY_METRICS_LISTEN", address, default="127.0.0.1:9466")
    log_level: str = setting("LOG_LEVEL", choice("DEBUG", "INFO", "WARNING", "ERROR"), default="INFO")
    # Events claimed, published and marked together; beyond a thousand, confirms gain nothing more.
    window: int = setting("RELAY_WINDOW", integer(1, 10_000), default=500)
    # The claim's transaction stays open meanwhile, three times as long at worst: when a message is refused and looked
    # for. PostgreSQL ends it after 30 s.
    confirm_timeout_s: float = setting("RELAY_CONFIRM_TIMEOUT_S", seconds(0.1, 10), default=10.0)
    # An idle relay looks that often; usually it is told of new events before.
    poll_every_s: float = setting("RELAY_POLL_EVERY_S", seconds(0.01, 5), default=1.0)
    # Failed attempts that are an event's own fault before it is given up as FAILED.
    attempts_max: int = setting("RELAY_ATTEMPTS_MAX", integer(1, 100), default=5)
    # Full days that an event is kept after it was recorded; 0 keeps everything. A day goes only when all of it is sent
    # and known to the reader of committed events.
    retention_days: int = setting("RELAY_OUTBOX_RETENTION_DAYS", integer(0, 3650), default=0)


@dataclass(frozen=True)
class PartitionsSettings:
    database_url: str = setting("PURCHASES_DATABASE_URL", postgres_url)
    retention_days: int = setting("RELAY_OUTBOX_RETENTION_DAYS", integer(0, 3650), default=0)
    log_level: str = setting("LOG_LEVEL", choice("DEBUG", "INFO", "WARNING", "ERROR"), default="WARNING")


@dataclass(frozen=True)
class ClientSettings:
    """Of the commands that ask a running relay."""

    relay_target: str = setting("RELAY_TARGET", text, default="127.0.0.1:50053")
