"""`python -m analytics_svc consume`: the wiring of the process that keeps the read models and proves them."""

import asyncio
from contextlib import AbstractAsyncContextManager
from functools import partial

import structlog

from analytics_svc import database
from analytics_svc.commands.prove import proving
from analytics_svc.ingest.consumer import Consumer
from analytics_svc.ingest.event_log import HOLD_MAX_S
from analytics_svc.ingest.health import Health
from analytics_svc.ingest.quarantine_server import QuarantineServicer
from analytics_svc.ingest.settling import Settler
from analytics_svc.ingest.summing import Summing
from analytics_svc.ingest.upkeep import Upkeep
from analytics_svc.proof import gauges
from analytics_svc.proof.audit_server import CALL_TIMEOUT_S as AUDIT_TIMEOUT_S
from analytics_svc.proof.audit_server import AuditServicer
from analytics_svc.proof.keeper import KEEPER_SESSION, Keeper
from analytics_svc.settings import ConsumeSettings
from analytics_svc.upstream import chain
from analytics_svc.upstream.chain import Asked
from chassis import grpc_server, lifecycle, metrics, postgres, tls, zones
from chassis.wire import PageTokens
from retail.analytics.v1 import audit_service_pb2_grpc as audit_grpc
from retail.analytics.v1 import quarantine_service_pb2_grpc as quarantine_grpc

CONSUMER_CONNECTIONS = 2  # one batch at a time; the other is there when one breaks
UPKEEP_CONNECTIONS = 3  # for upkeep itself, for the sums, and for whoever looks after the quarantine
AUDIT_CONNECTIONS = 3  # for those who ask, and for the metrics of what the audit knows
AUDIT_STATEMENT_TIMEOUT_S = 300.0  # sums over a long history
APPLY_TIMEOUT_S = 10.0  # for each statement of a batch; the slowest takes some tens of milliseconds
STOP_TIMEOUT_S = 10.0  # for the batch in flight; what is not applied by then is delivered again

log = structlog.get_logger()


async def consume(config: ConsumeSettings, stop: asyncio.Event) -> None:
    """Keep the read models until `stop`, then finish the batch in flight."""
    credentials = tls.credentials(config)
    host = grpc_server.Server(database.DOMAIN, config, credentials)
    health = Health(host.set_serving, {"deliveries", "database"})
    zone = zones.load(config.business_time_zone)
    async with (
        _pool(config, "consume", CONSUMER_CONNECTIONS) as pool,
        _pool(config, "upkeep", UPKEEP_CONNECTIONS) as upkeep_pool,
        _pool(config, "audit", AUDIT_CONNECTIONS, AUDIT_STATEMENT_TIMEOUT_S) as audit_pool,
        chain.connect(config, zone, credentials, purchases=config.purchases_target, relay=config.relay_target) as cells,
    ):
        settlers = [Settler(of, zone, config.deaths_max, lambda: cells.cells) for of in (pool, upkeep_pool)]
        quarantine = QuarantineServicer(upkeep_pool, settlers[1], cells)
        services = [
            grpc_server.Service(
                quarantine_grpc.add_QuarantineServiceServicer_to_server,
                quarantine,
                "retail.analytics.v1.QuarantineService",
            ),
            grpc_server.Service(
                audit_grpc.add_AuditServiceServicer_to_server,
                AuditServicer(audit_pool, config.database_url, cells),
                "retail.analytics.v1.AuditService",
                AUDIT_TIMEOUT_S,
            ),
        ]
        async with metrics.serving_metrics(config.metrics_listen), host.listening(config.listen, services):
            if not await database.wait_until_ready(pool, config.business_time_zone, stop):
                return
            async with upkeep_pool.connection() as connection:
                quarantine.tokens = PageTokens(await database.page_token_key(connection))
            consumer = Consumer(
                config.amqp_url,
                settlers[0],
                batch_max=config.batch_max,
                prefetch=config.prefetch,
                health=health,
            )
            upkeep = Upkeep(upkeep_pool, health, config.log_retention_days)
            log.info("ready", listen=config.listen, metrics=config.metrics_listen, time_zone=config.business_time_zone)
            async with (
                proving(config),
                lifecycle.beside(
                    upkeep.run(),
                    Summing(upkeep_pool).run(),
                    gauges.show(audit_pool),
                    cells.follow(partial(_keep, config)),
                ),
            ):
                await _consume_until(stop, consumer, health)
    log.info("stopped")


def _pool(
    config: ConsumeSettings,
    name: str,
    size: int,
    statement_timeout_s: float = APPLY_TIMEOUT_S,
    settings: dict[str, str] | None = None,
) -> AbstractAsyncContextManager[postgres.Pool]:
    return postgres.open_pool(
        config.database_url,
        role="analytics_consumer",
        application_name=f"analytics {name}",
        size=size,
        statement_timeout_s=statement_timeout_s,
        settings=settings or {},
        transaction_timeout_s=HOLD_MAX_S if statement_timeout_s == APPLY_TIMEOUT_S else None,
    )


async def _keep(config: ConsumeSettings, asked: Asked) -> None:
    """Keep a cell's complete_through_time until cancelled, or stand by for the process that does."""
    name, outbox = asked.cell.name, asked.outbox
    async with _pool(config, "keeper", 1, settings=KEEPER_SESSION) as pool:
        await Keeper(pool, outbox.list_committed, outbox.requeue_lost, cell=name).run()


async def _consume_until(stop: asyncio.Event, consumer: Consumer, health: Health) -> None:
    consuming, stopping = asyncio.create_task(consumer.run(stop)), asyncio.create_task(stop.wait())
    await asyncio.wait({consuming, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    await health.report("running", False)
    try:
        await asyncio.wait_for(consuming, STOP_TIMEOUT_S)
    except TimeoutError:
        log.warning("the batch in flight was given up; it will be delivered again")
