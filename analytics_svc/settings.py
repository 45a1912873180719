"""What can be set from outside; see `chassis.settings`."""

from dataclasses import dataclass
from typing import Any

from chassis.access import AccessSettings
from chassis.cells import CellsSettings
from chassis.plaintext import PlaintextSettings
from chassis.settings import (
    address,
    amqp_url,
    integer,
    listen_address,
    log_level,
    postgres_url,
    setting,
    target,
    time_zone,
)
from chassis.tls import TlsSettings
from chassis.traces import TraceSettings


def _purchases_target() -> Any:
    meaning = "where the purchases service is found, unless CELLS_FILE says it"
    return setting("PURCHASES_TARGET", target, "host:port", meaning, default="127.0.0.1:50051")


def _relay_target() -> Any:
    meaning = "where the relay is found, unless CELLS_FILE says it"
    return setting("RELAY_TARGET", target, "host:port", meaning, default="127.0.0.1:50053")


@dataclass(frozen=True)
class ConsumerClientSettings(TlsSettings):
    consumer_target: str = setting(
        "CONSUMER_TARGET", target, "host:port", "where the consumer is found", default="127.0.0.1:50054"
    )


@dataclass(frozen=True)
class MigrateSettings(PlaintextSettings):
    database_url: str = setting("ANALYTICS_DATABASE_URL", postgres_url, "URL", "the database of the read models")
    business_time_zone: str = setting(
        "BUSINESS_TIME_ZONE", time_zone, "IANA name", "cuts business days; fixed by the first migration", default="UTC"
    )
    log_level: str = log_level()


@dataclass(frozen=True, kw_only=True)
class ProveSettings(MigrateSettings, CellsSettings):
    purchases_target: str = _purchases_target()
    relay_target: str = _relay_target()  # whom the keeper asks


@dataclass(frozen=True, kw_only=True)
class ConsumeSettings(AccessSettings, ProveSettings, TraceSettings):
    amqp_url: str = setting("AMQP_URL", amqp_url, "URL", "the RabbitMQ that events come from")
    listen: str = setting(
        "CONSUMER_LISTEN", listen_address, "host:port", "where it is called", default="127.0.0.1:50054"
    )
    metrics_listen: str = setting(
        "CONSUMER_METRICS_LISTEN", address, "host:port", "where Prometheus reads", default="127.0.0.1:9467"
    )
    # Counted in some transactions of some branches each; of fewer, each would cost more.
    batch_max: int = setting(
        "CONSUMER_BATCH_MAX", integer(1, 10_000), "events", "counted and acknowledged together, at most", default=1_000
    )
    # The batch in flight and twice as many gathering, so that neither side waits.
    prefetch: int = setting(
        "CONSUMER_PREFETCH", integer(1, 65_535), "messages", "taken from the queue and not yet settled", default=3_000
    )
    # Each costs a restart, and one may be chance: somebody may have killed it in that very millisecond.
    deaths_max: int = setting(
        "CONSUMER_DEATHS_MAX",
        integer(1, 100),
        "processes",
        "that may die of one message, tried alone, before it is quarantined unread",
        default=2,
    )
    log_retention_days: int = setting(
        "CONSUMER_LOG_RETENTION_DAYS",
        integer(0, 36_500),
        "days",
        "that the ids of counted events are kept, at least; events with an older id are quarantined; 0: for ever",
        default=0,
    )


@dataclass(frozen=True, kw_only=True)
class ServeSettings(AccessSettings, MigrateSettings, TlsSettings, TraceSettings):
    listen: str = setting(
        "ANALYTICS_LISTEN", listen_address, "host:port", "where it is called", default="127.0.0.1:50052"
    )
    metrics_listen: str = setting(
        "ANALYTICS_METRICS_LISTEN", address, "host:port", "where Prometheus reads", default="127.0.0.1:9465"
    )
    # As many as keep the database's cores busy.
    read_connections: int = setting(
        "ANALYTICS_READ_CONNECTIONS",
        integer(1, 100),
        "connections",
        "queries at once; heavy ones have half as many beside",
        default=4,
    )


@dataclass(frozen=True)
class ReportSettings(TlsSettings):
    analytics_target: str = setting(
        "ANALYTICS_TARGET", target, "host:port", "where the query server is found", default="127.0.0.1:50052"
    )


@dataclass(frozen=True, kw_only=True)
class RebuildSettings(MigrateSettings, CellsSettings):
    purchases_target: str = _purchases_target()
    relay_target: str = _relay_target()
