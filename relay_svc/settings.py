"""What can be set from outside; see `chassis.settings`."""

from dataclasses import dataclass
from typing import Any

from chassis.access import AccessSettings
from chassis.cells import own_cell
from chassis.plaintext import PlaintextSettings
from chassis.settings import (
    address,
    amqp_url,
    integer,
    listen_address,
    log_level,
    postgres_url,
    seconds,
    setting,
    target,
)
from chassis.tls import TlsSettings
from chassis.traces import TraceSettings


def _database_url() -> Any:
    return setting("PURCHASES_DATABASE_URL", postgres_url, "URL", "the database with the outbox")


@dataclass(frozen=True)
class ServeSettings(AccessSettings, TlsSettings, TraceSettings):
    database_url: str = _database_url()
    amqp_url: str = setting("AMQP_URL", amqp_url, "URL", "the RabbitMQ that events are published to")
    cell: str = own_cell()
    listen: str = setting("RELAY_LISTEN", listen_address, "host:port", "where it is called", default="127.0.0.1:50053")
    metrics_listen: str = setting(
        "RELAY_METRICS_LISTEN", address, "host:port", "where Prometheus reads", default="127.0.0.1:9466"
    )
    log_level: str = log_level()
    # Beyond a thousand, confirms gain nothing more.
    window: int = setting(
        "RELAY_WINDOW", integer(1, 10_000), "events", "claimed, published and marked together", default=500
    )
    # The claim's transaction stays open meanwhile, three times as long at worst: when a message is refused and looked
    # for.
    confirm_timeout_s: float = setting(
        "RELAY_CONFIRM_TIMEOUT_S", seconds(0.1, 10), "s", "to wait for the broker's confirms", default=10.0
    )
    look_every_s: float = setting(
        "RELAY_LOOK_EVERY_S",
        seconds(0.003, 1),
        "s",
        "after which an idle relay looks for events; a busy one looks sooner",
        default=0.025,
    )
    attempts_max: int = setting(
        "RELAY_ATTEMPTS_MAX",
        integer(1, 100),
        "attempts",
        "that may fail by an event's own fault before it is given up as FAILED",
        default=5,
    )


@dataclass(frozen=True)
class PartitionsSettings(PlaintextSettings):
    database_url: str = _database_url()
    log_level: str = log_level("WARNING")


@dataclass(frozen=True)
class ClientSettings(TlsSettings):
    """Of the commands that ask a running relay."""

    relay_target: str = setting(
        "RELAY_TARGET", target, "host:port", "where the relay is found", default="127.0.0.1:50053"
    )
