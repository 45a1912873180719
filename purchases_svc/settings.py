"""What can be set from outside; see `chassis.settings`."""

from dataclasses import dataclass

from chassis.access import AccessSettings
from chassis.cells import CellSettings, CellsSettings
from chassis.plaintext import PlaintextSettings
from chassis.settings import (
    address,
    integer,
    listen_address,
    log_level,
    postgres_url,
    seconds,
    setting,
    switch,
    target,
    time_zone,
)
from chassis.traces import TraceSettings


@dataclass(frozen=True)
class MigrateSettings(PlaintextSettings):
    database_url: str = setting("PURCHASES_DATABASE_URL", postgres_url, "URL", "the database of the purchases")
    business_time_zone: str = setting(
        "BUSINESS_TIME_ZONE", time_zone, "IANA name", "cuts business days; fixed by the first migration", default="UTC"
    )
    log_level: str = log_level()


@dataclass(frozen=True)
class ServeSettings(AccessSettings, MigrateSettings, CellSettings, TraceSettings):
    listen: str = setting(
        "PURCHASES_LISTEN", listen_address, "host:port", "where it is called", default="127.0.0.1:50051"
    )
    metrics_listen: str = setting(
        "PURCHASES_METRICS_LISTEN",
        address,
        "host:port",
        "where Prometheus reads; worker n has a port that is 100·(n-1) higher",
        default="127.0.0.1:9464",
    )
    # What arrives while one commits joins the next, so this bounds only a burst.
    batch_max: int = setting(
        "PURCHASES_BATCH_MAX", integer(1, 5_000), "sales", "stored in one transaction, at most", default=500
    )
    # More are refused, rather than let everybody's deadline pass, or the memory run out. Never less than one message of
    # UploadPurchases may hold: 500 sales, and items of some 12 bytes each at the least.
    waiting_max: int = setting(
        "PURCHASES_WAITING_MAX",
        integer(500, 1_000_000),
        "sales",
        "that may wait to be stored, 2 kB of memory each; more are refused with OVERLOADED",
        default=20_000,
    )
    waiting_items_max: int = setting(
        "PURCHASES_WAITING_ITEMS_MAX",
        integer(100_000, 100_000_000),
        "items",
        "of all the sales that may wait, 200 bytes of memory each; more are refused with OVERLOADED",
        default=400_000,
    )
    # A flush is everybody's: it has a time of its own, whatever its callers' deadlines are.
    flush_timeout_s: float = setting(
        "PURCHASES_FLUSH_TIMEOUT_S",
        seconds(0.1, 300),
        "s",
        "for storing what waits, at most; after a quarter of it, a sale at a till is tried on another connection",
        default=10.0,
    )
    require_sync_standby: bool = setting(
        "PURCHASES_REQUIRE_SYNC_STANDBY",
        switch,
        "0 or 1",
        "1: no sale is acknowledged while commits wait for no standby (an empty synchronous_standby_names)",
        default=False,
    )
    outbox_max: int = setting(
        "PURCHASES_OUTBOX_MAX",
        integer(0, 1_000_000_000),
        "events",
        "that may wait in the outbox; with more, sales are refused with OUTBOX_FULL; 0: no limit",
        default=1_000_000,
    )
    # Each month is a set of tables and indexes, for good: a till whose clock is wrong must not make hundreds of them.
    backlog_months: int = setting(
        "PURCHASES_BACKLOG_MONTHS",
        integer(0, 1_200),
        "months",
        "back from now that sales may open; those of earlier months are refused with MONTH_NOT_OPEN until an operator "
        "opens theirs by `retail-purchases partitions --open 2008-02`; 0: any month",
        default=15,
    )
    workers: int = setting("PURCHASES_WORKERS", integer(1, 64), "processes", "that share the port", default=1)
    read_connections: int = setting(
        "PURCHASES_READ_CONNECTIONS", integer(1, 100), "connections", "to the database, for reading", default=4
    )
    export_connections: int = setting(
        "PURCHASES_EXPORT_CONNECTIONS",
        integer(1, 100),
        "connections",
        "for exports, each held as long as its reader reads; more exports get OVERLOADED",
        default=4,
    )


@dataclass(frozen=True, kw_only=True)
class MoveSettings(MigrateSettings, CellsSettings):
    """Of the command that moves a branch, from the cell of `database_url` to another one; as the owner of both."""

    target_database_url: str = setting(
        "PURCHASES_TARGET_DATABASE_URL", postgres_url, "URL", "the database of the cell to which a branch moves"
    )


@dataclass(frozen=True, kw_only=True)
class CellsCommandSettings(CellsSettings):
    """Of the command that asks all cells."""

    purchases_target: str = setting(
        "PURCHASES_TARGET",
        target,
        "host:port",
        "where the purchases service is found, unless CELLS_FILE says it",
        default="127.0.0.1:50051",
    )
    relay_target: str = setting(
        "RELAY_TARGET",
        target,
        "host:port",
        "where the relay is found, unless CELLS_FILE says it",
        default="127.0.0.1:50053",
    )
