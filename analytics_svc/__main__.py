"""`python -m analytics_svc consume | serve | migrate | audit | rebuild | quarantine … | report …`: the wiring."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from zoneinfo import ZoneInfo

import psycopg
import structlog
from rich.console import Console

from analytics_svc import queries, source
from analytics_svc.announce import Announcement
from analytics_svc.audit_server import CALL_TIMEOUT_S as AUDIT_TIMEOUT_S
from analytics_svc.audit_server import AuditServicer
from analytics_svc.auditor import Auditor
from analytics_svc.commands import audit, quarantine, rebuild, report
from analytics_svc.consumer import Consumer
from analytics_svc.health import Health
from analytics_svc.inclusion import Inclusion
from analytics_svc.keeper import KEEPER_SESSION, Keeper
from analytics_svc.listener import Listener
from analytics_svc.outbox import Outbox
from analytics_svc.quarantine_server import QuarantineServicer
from analytics_svc.server import AnalyticsServicer
from analytics_svc.settings import (
    ConsumerClientSettings,
    ConsumeSettings,
    MigrateSettings,
    RebuildSettings,
    ReportSettings,
    ServeSettings,
)
from analytics_svc.settling import Settler
from analytics_svc.upkeep import Upkeep
from analytics_svc.watch import Watchers
from chassis import grpc_client, grpc_server, lifecycle, logs, migrate, postgres, settings
from chassis.wire import PageTokens
from retail.analytics.v1 import analytics_service_pb2_grpc as analytics_grpc
from retail.analytics.v1 import audit_service_pb2_grpc as audit_grpc
from retail.analytics.v1 import quarantine_service_pb2_grpc as quarantine_grpc

USAGE = "consume | serve | migrate | audit … | rebuild [--days-only] | report … | quarantine …"
MIGRATIONS = Path(__file__).parent / "migrations"
# A short query is slower with helpers, and they would take the cores from other queries.
QUERY_SESSION = {"max_parallel_workers_per_gather": "0"}
DOMAIN = "analytics.retail.example"
CONSUMER_CONNECTIONS = 2  # one batch at a time; the other is there when one breaks
UPKEEP_CONNECTIONS = 2  # for upkeep itself, and for whoever looks after the quarantine
AUDIT_CONNECTIONS = 4  # two for the auditor, one of which holds its lock; for those who ask
AUDIT_STATEMENT_TIMEOUT_S = 300.0  # sums over a long history
APPLY_TIMEOUT_S = 10.0  # for each statement of a batch; the slowest takes some tens of milliseconds
LIVE_CONNECTIONS = 3  # to listen, to look for purchases that are waited for, to read for watchers
STOP_TIMEOUT_S = 10.0  # for the batch in flight; what is not applied by then is delivered again

log = structlog.get_logger()


async def consume(config: ConsumeSettings, stop: asyncio.Event) -> None:
    """Keep the read models until `stop`, then finish the batch in flight."""
    host = grpc_server.Server(DOMAIN)
    health = Health(host.set_serving, {"deliveries", "database"})
    async with (
        postgres.open_pool(
            config.database_url,
            role="analytics_consumer",
            application_name="analytics consume",
            size=CONSUMER_CONNECTIONS,
            statement_timeout_s=APPLY_TIMEOUT_S,
        ) as pool,
        postgres.open_pool(
            config.database_url,
            role="analytics_consumer",
            application_name="analytics upkeep",
            size=UPKEEP_CONNECTIONS,
            statement_timeout_s=APPLY_TIMEOUT_S,
        ) as upkeep_pool,
        postgres.open_pool(
            config.database_url,
            role="analytics_consumer",
            application_name="analytics audit",
            size=AUDIT_CONNECTIONS,
            statement_timeout_s=AUDIT_STATEMENT_TIMEOUT_S,
        ) as audit_pool,
        grpc_client.connect(config.purchases_target) as purchases,
        grpc_client.connect(config.relay_target) as relay,
        source.connect(config.purchases_target, ZoneInfo(config.business_time_zone)) as truth,
    ):
        zone = ZoneInfo(config.business_time_zone)
        settler, outbox = Settler(upkeep_pool, zone, config.deaths_max), Outbox(relay)
        servicer = QuarantineServicer(upkeep_pool, settler, purchases, outbox)
        services = [
            grpc_server.Service(
                quarantine_grpc.add_QuarantineServiceServicer_to_server,
                servicer,
                "retail.analytics.v1.QuarantineService",
            ),
            grpc_server.Service(
                audit_grpc.add_AuditServiceServicer_to_server,
                AuditServicer(audit_pool, config.database_url, truth),
                "retail.analytics.v1.AuditService",
                AUDIT_TIMEOUT_S,
            ),
        ]
        async with grpc_server.serving_metrics(config.metrics_listen), host.listening(config.listen, services):
            if not await wait_until_ready(pool, config.business_time_zone, stop):
                return
            async with upkeep_pool.connection() as connection:
                servicer.tokens = PageTokens(await queries.page_token_key(connection))
            consumer = Consumer(
                config.amqp_url,
                Settler(pool, zone, config.deaths_max),
                batch_max=config.batch_max,
                prefetch=config.prefetch,
                health=health,
            )
            upkeep = Upkeep(upkeep_pool, health, config.log_retention_days)
            log.info("ready", listen=config.listen, metrics=config.metrics_listen, time_zone=config.business_time_zone)
            async with keeping(config, outbox), lifecycle.beside(upkeep.run(), Auditor(audit_pool, truth).run()):
                consuming, stopping = asyncio.create_task(consumer.run(stop)), asyncio.create_task(stop.wait())
                await asyncio.wait({consuming, stopping}, return_when=asyncio.FIRST_COMPLETED)
                stopping.cancel()
                await health.report("running", False)
                try:
                    await asyncio.wait_for(consuming, STOP_TIMEOUT_S)
                except TimeoutError:
                    log.warning("the batch in flight was given up; it will be delivered again")
    log.info("stopped")


@asynccontextmanager
async def keeping(config: ConsumeSettings, outbox: Outbox) -> AsyncIterator[None]:
    """Keep complete_through_time while the block lasts, or stand by for the process that does."""
    async with (
        postgres.open_pool(
            config.database_url,
            role="analytics_consumer",
            application_name="analytics keeper",
            size=1,
            statement_timeout_s=APPLY_TIMEOUT_S,
            settings=KEEPER_SESSION,
        ) as pool,
        lifecycle.beside(Keeper(pool, outbox.list_committed).run()),
    ):
        yield


async def serve(config: ServeSettings, stop: asyncio.Event) -> None:
    """Answer until `stop`, then finish what is in flight."""
    host = grpc_server.Server(DOMAIN)
    async with (
        postgres.open_pool(
            config.database_url,
            role="analytics_server",
            application_name="analytics serve",
            size=config.read_connections,
            statement_timeout_s=grpc_server.CALL_TIMEOUT_S,
            settings=QUERY_SESSION,
        ) as pool,
        postgres.open_pool(
            config.database_url,
            role="analytics_server",
            application_name="analytics serve: live",
            size=LIVE_CONNECTIONS,
            statement_timeout_s=APPLY_TIMEOUT_S,
        ) as live_pool,
    ):
        inclusion, watchers = Inclusion(live_pool), Watchers(live_pool)

        def tell(announcement: Announcement) -> None:
            inclusion.on_announcement(announcement)
            watchers.on_announcement(announcement)

        listener = Listener(live_pool, tell, host.set_serving)
        servicer = AnalyticsServicer(pool, inclusion, watchers)
        service = grpc_server.Service(
            analytics_grpc.add_AnalyticsServiceServicer_to_server, servicer, "retail.analytics.v1.AnalyticsService"
        )
        async with grpc_server.serving_metrics(config.metrics_listen), host.listening(config.listen, [service]):
            if not await wait_until_ready(pool, config.business_time_zone, stop):
                return
            async with pool.connection() as connection:
                servicer.tokens = PageTokens(await queries.page_token_key(connection))
            async with lifecycle.beside(listener.run(), inclusion.run(), watchers.run()):
                log.info("serving", listen=config.listen, metrics=config.metrics_listen)
                await stop.wait()
                inclusion.drain()  # who waits or watches may do so elsewhere; all others are answered
                watchers.drain()
    log.info("stopped")


async def wait_until_ready(pool: postgres.Pool, time_zone: str, stop: asyncio.Event) -> bool:
    """Wait until the database is up; False when `stop` came first.

    Raises:
        MigrationError: it is not the database that this process was made for.
    """
    while await postgres.wait_until_up(pool, stop):
        try:
            async with pool.connection() as connection:
                await migrate.require_current(connection, MIGRATIONS)
                row = await (await connection.execute("SELECT time_zone FROM analytics_settings")).fetchone()
        except (psycopg.errors.UndefinedTable, psycopg.errors.InsufficientPrivilege) as error:
            raise migrate.MigrationError(f"{error.diag.message_primary}: run `migrate` first") from error
        except postgres.UNAVAILABLE:
            continue
        if row is None:
            raise migrate.MigrationError("the database has no time zone: run `migrate` first")
        require_time_zone(time_zone, row[0])
        return True
    return False


def require_time_zone(asked: str, stored_zone: str) -> None:
    """Business days are cut already: another zone would move sales to other days.

    Raises:
        MigrationError: the zones differ.
    """
    if asked != stored_zone:
        raise migrate.MigrationError(
            f"BUSINESS_TIME_ZONE is {asked}, but the database was set up with {stored_zone}; it cannot be changed"
        )


def migrate_database(config: MigrateSettings) -> None:
    """Bring the database up to date, and fix the chain's time zone the first time."""
    migrate.migrate(config.database_url, MIGRATIONS)
    with psycopg.connect(config.database_url) as connection:
        connection.execute(
            "INSERT INTO analytics_settings (time_zone) VALUES (%s) ON CONFLICT DO NOTHING", [config.business_time_zone]
        )
        row = connection.execute("SELECT time_zone FROM analytics_settings").fetchone()
        assert row is not None  # inserted above, if not before
        require_time_zone(config.business_time_zone, row[0])


def main() -> None:
    command = " ".join(sys.argv[1:2])
    try:
        match sys.argv[1:]:
            case ["consume"]:
                consuming = settings.load(ConsumeSettings)
                logs.configure("analytics-consume", consuming.log_level)
                lifecycle.run(lambda stop: consume(consuming, stop))
            case ["serve"]:
                serving = settings.load(ServeSettings)
                logs.configure("analytics-serve", serving.log_level)
                lifecycle.run(lambda stop: serve(serving, stop))
            case ["migrate"]:
                migration = settings.load(MigrateSettings)
                logs.configure("analytics-migrate", migration.log_level)
                migrate_database(migration)
            case ["quarantine", *arguments]:
                raise SystemExit(quarantine.run(settings.load(ConsumerClientSettings), arguments))
            case ["report", *arguments]:
                raise SystemExit(report.run(settings.load(ReportSettings), arguments))
            case ["audit", *arguments]:
                raise SystemExit(audit.run(settings.load(ConsumerClientSettings), arguments, Console(highlight=False)))
            case ["rebuild", *options] if options in ([], ["--days-only"]):
                rebuilding = settings.load(RebuildSettings)
                logs.configure("analytics-rebuild", "WARNING")
                console = Console(highlight=False)
                work = rebuild.run(rebuilding, days_only=bool(options), console=console)
                raise SystemExit(asyncio.run(work))
            case _:
                print(f"usage: python -m analytics_svc {USAGE}", file=sys.stderr)
                raise SystemExit(2)
    except settings.SettingsError as error:
        lifecycle.exit_with_settings_problems(f"analytics {command}", error)
    except (migrate.MigrationError, grpc_server.PortTaken, psycopg.Error) as error:
        raise SystemExit(f"analytics {command}: {error}") from error


if __name__ == "__main__":
    main()
