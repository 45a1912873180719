"""What can be set from outside; see `chassis.settings`."""

from dataclasses import dataclass

from chassis.settings import address, choice, integer, postgres_url, seconds, setting, switch, time_zone


@dataclass(frozen=True)
class MigrateSettings:
    database_url: str = setting("PURCHASES_DATABASE_URL", postgres_url)
    business_time_zone: str = setting("BUSINESS_TIME_ZONE", time_zone, default="UTC")
    log_level: str = setting("LOG_LEVEL", choice("DEBUG", "INFO", "WARNING", "ERROR"), default="INFO")


@dataclass(frozen=True)
class ServeSettings(MigrateSettings):
    listen: str = setting("PURCHASES_LISTEN", address, default="127.0.0.1:50051")
    metrics_listen: str = setting("PURCHASES_METRICS_LISTEN", address, default="127.0.0.1:9464")
    # Sales per transaction. What arrives while one commits joins the next, so this bounds only a burst.
    batch_max: int = setting("PURCHASES_BATCH_MAX", integer(1, 5_000), default=500)
    # Sales that may wait for a flush, and their items in all; more are refused with OVERLOADED, rather than let
    # everybody's deadline pass, or the memory run out: a sale takes 2 kB, and 200 bytes for each of its items. Never
    # less than one message of UploadPurchases may hold: 500 sales, and items of some 12 bytes each at the least.
    waiting_max: int = setting("PURCHASES_WAITING_MAX", integer(500, 1_000_000), default=20_000)
    waiting_items_max: int = setting("PURCHASES_WAITING_ITEMS_MAX", integer(100_000, 100_000_000), default=400_000)
    # A flush is everybody's: it has a time of its own, whatever its callers' deadlines are.
    flush_timeout_s: float = setting("PURCHASES_FLUSH_TIMEOUT_S", seconds(0.1, 300), default=10.0)
    # 1: no sale is acknowledged while commits wait for no standby (an empty synchronous_standby_names).
    require_sync_standby: bool = setting("PURCHASES_REQUIRE_SYNC_STANDBY", switch, default=False)
    # Events that may wait in the outbox; with more, sales are refused with OUTBOX_FULL. 0: no limit.
    outbox_max: int = setting("PURCHASES_OUTBOX_MAX", integer(0, 1_000_000_000), default=1_000_000)
    # Full months that are kept besides the current one; older ones are dropped once all their events are sent, and
    # sales of that age are refused. 0: everything is kept.
    retention_months: int = setting("PURCHASES_RETENTION_MONTHS", integer(0, 1_200), default=0)
    # Processes that share the port.
    workers: int = setting("PURCHASES_WORKERS", integer(1, 64), default=1)
    read_connections: int = setting("PURCHASES_READ_CONNECTIONS", integer(1, 100), default=4)
    # Exports that may run at once: each holds a connection as long as its reader reads. More get OVERLOADED.
    export_connections: int = setting("PURCHASES_EXPORT_CONNECTIONS", integer(1, 100), default=4)
