"""The command `retail-purchases`, or `python -m purchases_svc`: the wiring."""

import asyncio
import datetime
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import click
import psycopg
import structlog
from psycopg_pool import PoolTimeout

from chassis import cells, cli, grpc_server, lifecycle, logs, metrics, migrate, postgres, settings, tls, traces, zones
from chassis.errors import PortTaken
from chassis.shares import Shares
from chassis.wire import PageTokens
from purchases_svc import flush, messages, record, retention, server, stored, workers
from purchases_svc.backlog import STATEMENT_TIMEOUT_S as WATCH_TIMEOUT_S
from purchases_svc.backlog import Backlog
from purchases_svc.branches import Branches
from purchases_svc.commands import cells as cells_command
from purchases_svc.commands import move as move_command
from purchases_svc.commands import partitions as partitions_command
from purchases_svc.commands import retention as retention_command
from purchases_svc.commands import tills as tills_command
from purchases_svc.customers_server import CustomersServicer
from purchases_svc.moving.copying import MoveError
from purchases_svc.other_cells import OtherCells
from purchases_svc.partitions import Partitions
from purchases_svc.primary import Primary
from purchases_svc.settings import CellsCommandSettings, MigrateSettings, MoveSettings, ServeSettings
from purchases_svc.till_watch import TillWatch
from purchases_svc.upload import Uploads
from retail.purchases.v1 import customers_service_pb2_grpc as customers_grpc
from retail.purchases.v1 import purchases_service_pb2_grpc as purchases_grpc

SERVICE_CONFIG = (resources.files("retail") / "service_config.json").read_text()  # what cells ask each other by
MIGRATIONS = Path(__file__).parent / "migrations"
READ_TIMEOUT_S = grpc_server.CALL_TIMEOUT_S

log = structlog.get_logger()


async def serve(config: ServeSettings, stop: asyncio.Event) -> None:
    """Serve until `stop`, then finish what is in flight."""
    worker = workers.number()
    if config.workers > 1 and worker is None:
        await workers.supervise(config.workers, config.listen, stop)
        return
    if worker is not None:
        workers.die_with_parent()
    credentials = tls.credentials(config)
    host = grpc_server.Server("purchases.retail.example", config, credentials)
    metrics_listen = workers.metrics_address(config.metrics_listen, worker)
    async with (
        metrics.serving_metrics(metrics_listen),
        postgres.open_pool(
            config.database_url,
            role=stored.ROLE,
            application_name="purchases write",
            size=flush.CONNECTIONS,
            statement_timeout_s=config.flush_timeout_s / 2,  # so that what was cancelled can be tried once more
            # A plan made while the tables were empty would read them whole, and be kept until the next ANALYZE.
            settings={"enable_seqscan": "off", **flush.LOCK_TIMEOUT},
        ) as write_pool,
        postgres.open_pool(
            config.database_url,
            role=stored.ROLE,
            application_name="purchases read",
            size=config.read_connections,
            statement_timeout_s=READ_TIMEOUT_S,
        ) as read_pool,
        postgres.open_pool(
            config.database_url,
            role=stored.ROLE,
            application_name="purchases export",
            size=config.export_connections + 1,  # the proof's own
            statement_timeout_s=READ_TIMEOUT_S,
        ) as export_pool,
        postgres.open_pool(
            config.database_url,
            role=stored.ROLE,
            application_name="purchases retention",
            size=1,
            statement_timeout_s=retention.STATEMENT_TIMEOUT_S,
        ) as retention_pool,
        postgres.open_pool(
            config.database_url,
            role=stored.ROLE,
            application_name="purchases watch",  # of the backlog and of the server, whatever readers hold
            size=2,
            statement_timeout_s=WATCH_TIMEOUT_S,
            settings={"synchronous_commit": "off"},  # a count is no promise: it waits for no standby
        ) as watch_pool,
    ):
        if not await postgres.wait_until_up(write_pool, stop):
            return
        async with write_pool.connection() as connection:
            await migrate.require_current(connection, MIGRATIONS)
            time_zone, page_token_key = await stored.settings(connection)
            kept_months = await retention.kept_months(connection)
        migrate.require_time_zone(config.business_time_zone, time_zone)
        zone = zones.load(time_zone)

        partitions = Partitions(write_pool)
        await partitions.look_ahead()  # before the first sale has to wait for it
        backlog = Backlog(watch_pool, config.outbox_max)
        retaining = retention.Retention(retention_pool, kept_months)
        primary = Primary(watch_pool, host.set_serving, standby_required=config.require_sync_standby)
        listed = cells.follow(config) if config.cells_file else None
        if listed and config.cell not in listed.value.by_name:
            raise settings.SettingsError([f"CELL={config.cell}: {config.cells_file} has no such cell"])
        branches = Branches(config.cell, (lambda: listed.value) if listed else None)
        recorder = record.Recorder(
            write_pool,
            partitions,
            backlog,
            zone=zone,
            batch_max=config.batch_max,
            waiting_max=config.waiting_max,
            waiting_items_max=config.waiting_items_max,
            flush_timeout_s=config.flush_timeout_s,
            backlog_months=config.backlog_months,
            retention_months=lambda: retaining.months,
            standby_required=config.require_sync_standby,
            branches=branches,
        )
        tokens = PageTokens(page_token_key)
        shares = Shares(read_pool, max(config.read_connections // server.READ_KINDS, 1), short={server.ONE})
        services = [
            grpc_server.Service(
                purchases_grpc.add_PurchasesServiceServicer_to_server,
                server.PurchasesServicer(recorder, Uploads(recorder, host), shares, export_pool, tokens, zone),
                "retail.purchases.v1.PurchasesService",
                message_bytes_max=messages.SALE_BYTES_MAX,
                streamed_bytes_max=server.UPLOAD_BYTES_MAX,
            ),
            grpc_server.Service(
                customers_grpc.add_CustomersServiceServicer_to_server,
                CustomersServicer(shares, tokens),
                "retail.purchases.v1.CustomersService",
            ),
        ]
        async with (
            host.listening(
                config.listen,
                services,
                share_port=worker is not None,
                calls_of_connection_max=server.CALLS_OF_CONNECTION_MAX,
            ),
            lifecycle.beside(
                partitions.keep(),
                retaining.keep(),
                backlog.watch(),
                primary.watch(),
                TillWatch(watch_pool).watch(),
                branches.follow(watch_pool),
                *(
                    [OtherCells(watch_pool, config.cell, lambda: listed.value, SERVICE_CONFIG, credentials).follow()]
                    if listed
                    else []
                ),
                *([listed.follow(lambda: log.info("the file of cells has changed"))] if listed else []),
            ),
        ):
            await primary.look()
            log.info("serving", listen=config.listen, metrics=metrics_listen, time_zone=time_zone, tzdata=zones.VERSION)
            await stop.wait()
            await host.set_serving(False)
        await recorder.close()
        log.info("stopped")


def migrate_database(config: MigrateSettings) -> None:
    migrate.migrate_chain(config.database_url, MIGRATIONS, "chain_settings", config.business_time_zone)


commands = cli.Commands(
    "retail-purchases",
    "The purchases service: records sales, and reads them back.",
    {"serve": (ServeSettings, "purchases"), "migrate": (MigrateSettings, "purchases")},
    failures=(migrate.MigrationError, MoveError, PortTaken, psycopg.Error, PoolTimeout),
)


@commands.command("serve")
def _serve() -> None:
    """Answer calls until SIGTERM.

    Then what is in flight is finished, which takes 20 s at most.
    """
    config = settings.load(ServeSettings)
    logs.configure("purchases", config.log_level)
    with traces.exported(config, "purchases"):
        lifecycle.run(lambda stop: serve(config, stop))


@commands.command("migrate")
def _migrate() -> None:
    """Bring the database up to date. As its owner; may be repeated."""
    config = settings.load(MigrateSettings)
    logs.configure("purchases-migrate", config.log_level)
    migrate_database(config)


@commands.command("partitions")
@click.option("--drop", is_flag=True, help="Let those go that retention lets go, before.")
@click.option(
    "--open",
    "opened",
    type=click.DateTime(["%Y-%m"]),
    multiple=True,
    metavar="YYYY-MM",
    help="Open a month to sales, however long ago; may be given more than once.",
)
def _partitions(drop: bool, opened: Sequence[datetime.datetime]) -> None:
    """Show the months, open some, or let old ones go.

    For each its size, and what retention does with it; see `retention`.
    """
    config = cli.of_environment_or_local_stack(ServeSettings, "purchases")
    logs.configure("purchases-partitions", config.log_level)
    asyncio.run(partitions_command.run(config, drop=drop, opened=[month.date() for month in opened]))


@commands.command("retention")
@click.option("--keep-months", type=click.IntRange(0, 1_200), help="Full months of purchases, besides the current one.")
@click.option("--keep-outbox-days", type=click.IntRange(1, 3_650), help="Full days of the outbox, besides today.")
def _retention(keep_months: int | None, keep_outbox_days: int | None) -> None:
    """Show how long is kept, or decide it.

    0 months keep all purchases.

    The database's owner decides: PURCHASES_DATABASE_URL is the one that `migrate` has. Services carry it out within the
    hour, and `retail-purchases partitions --drop` and `retail-relay partitions --drop` at once. A month of purchases or
    a day of the outbox goes only when all its events are sent, a day only when they are known to be counted, too.
    """
    config = cli.of_environment_or_local_stack(MigrateSettings, "purchases")
    logs.configure("purchases-retention", config.log_level)
    retention_command.run(config.database_url, keep_months, keep_outbox_days)


@commands.command("tills")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def _tills(as_json: bool) -> int:
    """Show the tills whose sales are missing.

    Those of which some have been missing for more than a day, or came with a number twice. The exit code is 1 if there
    are any. Of one till, GetTillState tells which numbers.
    """
    config = cli.of_environment_or_local_stack(ServeSettings, "purchases")
    logs.configure("purchases-tills", config.log_level)
    return 1 if asyncio.run(tills_command.run(config, as_json=as_json)) else 0


@commands.command("cells")
@cli.json_option
def _cells(as_json: bool) -> int:
    """Show what each cell of the chain has, and how it is.

    Its branches, purchases (PostgreSQL's estimate) and size, sales recorded in a second, and the events that wait for
    the broker, and for how long. Each cell's two services are asked. The exit code is 0 only while all is well.
    """
    config = cli.of_environment_or_local_stack(CellsCommandSettings, "consumer")
    return 0 if cells_command.run(config, as_json=as_json) else 1


@commands.command("move")
@click.argument("branch", type=click.IntRange(1, cells.BRANCH_MAX))
@click.option("--to", "target", required=True, metavar="CELL", help="The cell to which it moves.")
@click.option("--cancel", is_flag=True, help="Take back a move that is not finished.")
def _move(branch: int, target: str, cancel: bool) -> None:
    """Move a branch to another cell while it sells.

    Its purchases, keys, receipts and journals are copied; for a moment at the end no cell takes its sales, and tills
    come again. Then CELLS_FILE is changed. Whatever ends the command: called again, it goes on; once the branch has
    moved, it changes nothing.

    As the owner of both databases: PURCHASES_DATABASE_URL is that of the cell in which the branch is,
    PURCHASES_TARGET_DATABASE_URL that of CELL.
    """
    config = settings.load(MoveSettings)
    logs.configure("purchases-move", config.log_level)
    move_command.run(config, branch, target, cancel=cancel)


main = commands.run

if __name__ == "__main__":
    main()
