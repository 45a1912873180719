"""The services, run as they are wired, inside the test's event loop."""

import asyncio
import itertools
import random
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import grpc
import pika
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pika.adapters.blocking_connection import BlockingChannel

import purchases_svc.__main__ as purchases
from analytics_svc import database as analytics
from analytics_svc.settings import MigrateSettings as AnalyticsMigrateSettings
from deploy.local.machine import PRIVATE_PORTS, port_is_free
from purchases_svc.settings import MigrateSettings, ServeSettings
from tests.conftest import WAIT_S, eventually, pool
from tests.integration.chain import Chain, open_chain
from tests.replication import Replicated, replicated

# A service that is not up when it is first tried is tried again after a tenth of a second, instead of a whole one.
SOON_AGAIN = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1_000)]

_ports = itertools.cycle(random.sample(PRIVATE_PORTS, len(PRIVATE_PORTS)))


def free_address() -> str:
    """An address that nobody uses. Outgoing connections and servers on any port (`:0`) cannot take it, either."""
    return next(f"127.0.0.1:{port}" for port in _ports if port_is_free(port))


async def is_serving(channel: grpc.aio.Channel) -> bool:
    try:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)  # type: ignore[attr-defined]
    except grpc.aio.AioRpcError:
        return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


@asynccontextmanager
async def running(serve: Callable[[asyncio.Event], Awaitable[None]], address: str) -> AsyncIterator[grpc.aio.Channel]:
    """A service from its start until it has stopped by itself; yields a channel to it."""
    stop = asyncio.Event()
    task = asyncio.ensure_future(serve(stop))
    async with grpc.aio.insecure_channel(address, options=SOON_AGAIN) as channel:

        async def up() -> bool:
            if task.done():
                await task  # raises why it did not start
            return await is_serving(channel)

        try:
            await eventually(up, "the service is up")
            yield channel
        finally:
            stop.set()
            await asyncio.wait_for(task, WAIT_S)


@pytest.fixture
def purchases_address() -> str:
    return free_address()


@pytest.fixture
async def purchases_channel(purchases_db: str, purchases_address: str) -> AsyncIterator[grpc.aio.Channel]:
    """A running purchases service on an empty database."""
    config = ServeSettings(
        database_url=purchases_db, listen=purchases_address, metrics_listen="127.0.0.1:0", backlog_months=0
    )
    async with running(lambda stop: purchases.serve(config, stop), config.listen) as channel:
        yield channel


@pytest.fixture
def channel(amqp_url: str) -> Iterator[BlockingChannel]:
    """The publisher's side: a channel with confirms, and the exchange."""
    with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
        opened = connection.channel()
        opened.confirm_delivery()
        opened.exchange_declare("purchases", "topic", durable=True)
        yield opened


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """What a test starts; ended at its end, whatever happens."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
async def chain(purchases_channel: grpc.aio.Channel, analytics_db: str) -> AsyncIterator[Chain]:
    """A chain on a running purchases service, with empty read models."""
    async with pool(analytics_db, "analytics_consumer", size=3) as opened:
        yield open_chain(purchases_channel, opened, analytics_db)


class Pairs:
    """The pair of servers of this run; another one once it was promoted. Tests make databases of their own on it."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._numbers = directory, itertools.count(1)
        self._open = ExitStack()
        self._pair: Replicated | None = None

    def whole(self) -> Replicated:
        if self._pair is None or self._pair.promoted:
            self.close()
            self._pair = self._open.enter_context(replicated(self._directory / str(next(self._numbers))))
        return self._pair

    def close(self) -> None:
        self._open.close()
        self._pair = None


@pytest.fixture(scope="session")
def _pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pairs]:
    pairs = Pairs(tmp_path_factory.mktemp("replication"))
    yield pairs
    pairs.close()


@pytest.fixture
def pair(_pairs: Pairs) -> Iterator[Replicated]:
    """A PostgreSQL server, and its synchronous standby."""
    pair = _pairs.whole()
    yield pair
    if not pair.promoted:
        try:
            pair.reset()
        except Exception:
            _pairs.close()  # the next test gets another
            raise


@pytest.fixture
def purchases_url(pair: Replicated) -> str:
    """An empty, migrated purchases database on the primary."""
    return pair.database("purchases", lambda url: purchases.migrate_database(MigrateSettings(url)))


@pytest.fixture
def analytics_url(pair: Replicated) -> str:
    """An empty, migrated analytics database on the primary."""
    return pair.database("analytics", lambda url: analytics.migrate_database(AnalyticsMigrateSettings(url)))
