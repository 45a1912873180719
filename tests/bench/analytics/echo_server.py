"""`python -m tests.bench.analytics.echo_server`: the yardstick. It sends back what it gets, after one SELECT."""

import os
from typing import Any

import grpc
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from analytics_svc.settings import ServeSettings
from chassis import postgres, settings
from chassis.grpc_server import CALL_TIMEOUT_S


async def main() -> None:
    config = settings.load(ServeSettings)
    async with postgres.open_pool(
        config.database_url,
        role="analytics_server",
        application_name="echo",
        size=config.read_connections,
        statement_timeout_s=CALL_TIMEOUT_S,
    ) as pool:

        async def echo(request: bytes, _: Any) -> bytes:
            async with pool.connection() as connection:
                cursor = await connection.execute("SELECT quarantined_count FROM freshness", prepare=True)
                await cursor.fetchone()
            return request

        server = grpc.aio.server()
        checks = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        server.add_registered_method_handlers("Echo", {"Echo": grpc.unary_unary_rpc_method_handler(echo)})
        server.add_insecure_port(os.environ["ECHO_LISTEN"])
        await pool.wait()
        await server.start()
        await checks.set("", health_pb2.HealthCheckResponse.SERVING)
        await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(main())
