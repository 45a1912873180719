"""The command `retail-relay`, or `python -m relay_svc`: the wiring."""

import asyncio

import click
import psycopg
import structlog
from psycopg import sql
from psycopg_pool import PoolTimeout

from chassis import cli, grpc_server, lifecycle, logs, metrics, postgres, settings, signs_of_life, tls, traces, wire
from chassis.errors import PortTaken
from relay_svc import inspection, outbox, retention
from relay_svc.commands import outbox as outbox_commands
from relay_svc.commands import partitions
from relay_svc.depth import Depth
from relay_svc.publisher import Publisher
from relay_svc.relay import LANES, Relay
from relay_svc.server import OutboxServicer
from relay_svc.settings import PartitionsSettings, ServeSettings
from retail.relay.v1.outbox_service_pb2_grpc import add_OutboxServiceServicer_to_server

CONNECTIONS = LANES + 2  # one sweeps; one makes sure that what is claimed will last
SERVICE_CONNECTIONS = 4  # of the OutboxService: its calls never wait for the relay's windows
STATEMENT_TIMEOUT_S = 10.0
# What a relay that is frozen has claimed goes to another one.
CLAIMS = {"idle_in_transaction_session_timeout": f"{signs_of_life.HELD_IN_SILENCE_MAX_S:g}s"}

log = structlog.get_logger()


async def serve(config: ServeSettings, stop: asyncio.Event) -> None:
    """Relay until `stop`, then finish the window in flight."""
    host = grpc_server.Server("relay.retail.example", config, tls.credentials(config))
    async with (
        metrics.serving_metrics(config.metrics_listen),
        postgres.open_pool(
            config.database_url,
            role=outbox.ROLE,
            application_name="relay",
            size=CONNECTIONS,
            statement_timeout_s=STATEMENT_TIMEOUT_S,
            settings={**outbox.SETTINGS, **CLAIMS},
        ) as pool,
        postgres.open_pool(
            config.database_url,
            role=outbox.ROLE,
            application_name="relay service",
            size=SERVICE_CONNECTIONS,
            statement_timeout_s=grpc_server.CALL_TIMEOUT_S,
        ) as service_pool,
    ):
        migrated = sql.SQL("SELECT FROM outbox_low_water")  # the migrations are not ours to look at
        if not await postgres.wait_until_up(pool, stop, migrated):
            return
        async with service_pool.connection() as connection:
            tokens = wire.PageTokens(await inspection.page_token_key(connection))
        await retention.begin(service_pool, stop)
        publisher = Publisher(config.amqp_url, config.confirm_timeout_s, config.cell)
        relay = Relay(
            pool,
            publisher,
            window=config.window,
            attempts_max=config.attempts_max,
            look_every_s=config.look_every_s,
        )
        depth = Depth(publisher)
        service = grpc_server.Service(
            add_OutboxServiceServicer_to_server,
            OutboxServicer(relay, publisher, service_pool, tokens, depth),
            "retail.relay.v1.OutboxService",
        )
        try:
            async with host.listening(config.listen, [service]), asyncio.TaskGroup() as tasks:
                tasks.create_task(relay.run(stop))
                tasks.create_task(depth.watch(stop))
                tasks.create_task(inspection.measure(service_pool, stop))
                tasks.create_task(retention.keep(service_pool, stop))
                await host.set_serving(True)
                log.info("serving", listen=config.listen, metrics=config.metrics_listen)
                await stop.wait()
                await host.set_serving(False)
        finally:
            publisher.disconnect()
    log.info("stopped")


commands = cli.Commands(
    "retail-relay",
    "The relay: brings events from the outbox to RabbitMQ, and tells what is in the outbox.",
    {"serve": (ServeSettings, "relay")},
    failures=(PortTaken, psycopg.Error, PoolTimeout),
)


@commands.command("serve")
def _serve() -> None:
    """Publish events until SIGTERM. Then the window in flight is finished."""
    config = settings.load(ServeSettings)
    logs.configure("relay", config.log_level)
    with traces.exported(config, "relay"):
        lifecycle.run(lambda stop: serve(config, stop))


commands.add_command(outbox_commands.status)
commands.add_command(outbox_commands.events)
commands.add_command(outbox_commands.requeue)


@commands.command("partitions")
@click.option("--drop", is_flag=True, help="Let those go that retention lets go, before.")
@cli.json_option
def _partitions(drop: bool, as_json: bool) -> None:
    """Show the outbox's days, or let old ones go.

    For each its size, and what retention does with it; `retail-purchases retention` decides how long it is.
    """
    config = cli.of_environment_or_local_stack(PartitionsSettings, "relay")
    logs.configure("relay-partitions", config.log_level)
    asyncio.run(partitions.run(config, drop=drop, as_json=as_json))


main = commands.run

if __name__ == "__main__":
    main()
