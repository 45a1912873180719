"""`python -m analytics_svc serve`: the wiring of the process that answers questions."""

import asyncio

import structlog

from analytics_svc import database
from analytics_svc.ingest.announce import Announcement
from analytics_svc.serve.inclusion import Inclusion
from analytics_svc.serve.listener import Listener
from analytics_svc.serve.server import AnalyticsServicer
from analytics_svc.serve.watch import Watchers
from analytics_svc.settings import ServeSettings
from chassis import grpc_server, lifecycle, metrics, postgres, tls
from chassis.wire import PageTokens
from retail.analytics.v1 import analytics_service_pb2_grpc as analytics_grpc

# A short query is slower with helpers, and they would take the cores from other queries.
QUERY_SESSION = {"max_parallel_workers_per_gather": "0"}
HEAVY_CONNECTIONS_MIN = 2  # one for each kind of heavy question
LIVE_CONNECTIONS = 3  # to listen, to look for purchases that are waited for, to read for watchers
LIVE_TIMEOUT_S = 10.0  # for each statement on these

log = structlog.get_logger()


async def serve(config: ServeSettings, stop: asyncio.Event) -> None:
    """Answer until `stop`, then finish what is in flight."""
    host = grpc_server.Server(database.DOMAIN, config, tls.credentials(config))
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
            application_name="analytics serve: heavy",
            size=max(config.read_connections // 2, HEAVY_CONNECTIONS_MIN),
            statement_timeout_s=grpc_server.CALL_TIMEOUT_S,
            settings=QUERY_SESSION,
        ) as heavy_pool,
        postgres.open_pool(
            config.database_url,
            role="analytics_server",
            application_name="analytics serve: live",
            size=LIVE_CONNECTIONS,
            statement_timeout_s=LIVE_TIMEOUT_S,
        ) as live_pool,
    ):
        inclusion, watchers = Inclusion(live_pool), Watchers(live_pool)

        def tell(announcement: Announcement) -> None:
            inclusion.on_announcement(announcement)
            watchers.on_announcement(announcement)

        listener = Listener(live_pool, tell, host.set_serving)
        servicer = AnalyticsServicer(pool, heavy_pool, inclusion, watchers)
        service = grpc_server.Service(
            analytics_grpc.add_AnalyticsServiceServicer_to_server, servicer, "retail.analytics.v1.AnalyticsService"
        )
        async with metrics.serving_metrics(config.metrics_listen), host.listening(config.listen, [service]):
            if not await database.wait_until_ready(pool, config.business_time_zone, stop):
                return
            async with pool.connection() as connection:
                servicer.tokens = PageTokens(await database.page_token_key(connection))
            async with lifecycle.beside(listener.run(), inclusion.run(), watchers.run()):
                log.info("serving", listen=config.listen, metrics=config.metrics_listen)
                await stop.wait()
                inclusion.drain()  # who waits or watches may do so elsewhere; all others are answered
                watchers.drain()
    log.info("stopped")
