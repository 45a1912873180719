"""Services on a standby, on a server that takes no writes, behind a pooler, and what a primary says of its standbys."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import REGISTRY
from structlog.testing import capture_logs
from uuid_utils import uuid7

import purchases_svc.__main__ as purchases
from analytics_svc.commands.serve import serve as serve_analytics
from analytics_svc.ingest.health import Health
from analytics_svc.ingest.upkeep import Upkeep
from analytics_svc.settings import ServeSettings as AnalyticsSettings
from chassis import postgres
from purchases_svc.settings import ServeSettings
from retail.analytics.v1 import analytics_service_pb2 as analytics_pb
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub
from retail.purchases.v1 import purchases_service_pb2 as pb
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.conftest import WAIT_S, eventually, pool
from tests.integration.conftest import free_address, is_serving, running
from tests.integration.purchase_events import NOON, query, sold
from tests.integration.sales import copy, refusal, sale
from tests.integration.serve.test_analytics_queries import record
from tests.integration.serve.test_watch import Viewer, sales
from tests.pooler import Pooler
from tests.replication import Replicated

FIRST = NOON.date()


@asynccontextmanager
async def serving(url: str, **changes: Any) -> AsyncIterator[grpc.aio.Channel]:
    """A purchases service that need not be SERVING."""
    config = ServeSettings(url, listen=free_address(), metrics_listen="127.0.0.1:0", backlog_months=0, **changes)
    stop = asyncio.Event()
    task = asyncio.ensure_future(purchases.serve(config, stop))
    async with grpc.aio.insecure_channel(config.listen) as channel:

        async def answers() -> bool:
            if task.done():
                await task  # raises why it did not start
            return await health(channel) is not None

        try:
            await eventually(answers, "the service answers")
            yield channel
        finally:
            stop.set()
            await asyncio.wait_for(task, WAIT_S)


async def health(channel: grpc.aio.Channel) -> int | None:
    try:
        request = health_pb2.HealthCheckRequest()
        return int((await health_pb2_grpc.HealthStub(channel).Check(request, timeout=2)).status)  # type: ignore[attr-defined]
    except grpc.aio.AioRpcError:
        return None


async def replayed(pair: Replicated) -> None:
    """Until the standby shows what the primary has."""
    with pair.primary.connect() as primary:
        row = primary.execute("SELECT pg_current_wal_lsn()::text").fetchone()
    assert row

    async def it_does() -> bool:
        return query(pair.standby.url(), f"SELECT pg_last_wal_replay_lsn() >= '{row[0]}'") == [(True,)]

    await eventually(it_does, "the standby has replayed everything")


async def test_query_server(pair: Replicated, analytics_url: str) -> None:
    """It serves, watchers and tokens are prompt, and after a promotion it goes on."""
    await replayed(pair)
    config = AnalyticsSettings(pair.on_standby(analytics_url), listen=free_address(), metrics_listen="127.0.0.1:0")
    async with running(lambda stop: serve_analytics(config, stop), config.listen) as channel:
        reports: Any = AnalyticsServiceStub(channel)  # type: ignore[arg-type, unused-ignore]
        viewer = Viewer(reports)
        first = sold("1.00", purchase_time=NOON, event_id=str(uuid7()))
        token = analytics_pb.GetSalesSummaryRequest(consistency_token=first.event_id)
        waiting = asyncio.ensure_future(reports.GetSalesSummary(token, timeout=WAIT_S))
        await viewer.read()  # there is nothing yet
        await record(analytics_url, [first])
        assert (await waiting).purchase_count == 1
        await viewer.until({(FIRST, 1): 1})
        await record(analytics_url, sales(2, 3, days=1))
        await viewer.until({(FIRST, 1): 1, (FIRST + timedelta(days=1), 2): 3})
        pair.promote()
        await record(pair.on_standby(analytics_url), sales(1))
        await viewer.until({(FIRST, 1): 2, (FIRST + timedelta(days=1), 2): 3})
        assert await is_serving(channel)


async def test_sales_to_a_standby(pair: Replicated, purchases_url: str) -> None:
    """Not serving, and whoever calls all the same is told to try again; reads work. Once promoted, it takes sales."""
    known = sale()
    config = ServeSettings(purchases_url, listen=free_address(), metrics_listen="127.0.0.1:0", backlog_months=0)
    async with running(lambda stop: purchases.serve(config, stop), config.listen) as channel:
        await PurchasesServiceStub(channel).CreatePurchase(known, timeout=WAIT_S)  # type: ignore[arg-type, misc, unused-ignore]
    await replayed(pair)
    async with serving(pair.on_standby(purchases_url)) as channel:
        till: Any = PurchasesServiceStub(channel)  # type: ignore[arg-type, unused-ignore]
        assert await health(channel) == health_pb2.HealthCheckResponse.NOT_SERVING
        for request in (sale(), copy(known)):
            refused = await refusal(till.CreatePurchase(request, timeout=WAIT_S))
            assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
        assert len((await till.ListPurchases(pb.ListPurchasesRequest(), timeout=WAIT_S)).purchases) == 1
        totals = pb.ListControlTotalsRequest(
            first_date={"year": 2026, "month": 3, "day": 1}, last_date={"year": 2026, "month": 3, "day": 1}
        )
        assert (await refusal(till.ListControlTotals(totals, timeout=WAIT_S))).reason == "DATABASE_UNAVAILABLE"
        pair.promote()
        await eventually(lambda: is_serving(channel), "it serves, once promoted")
        assert (await till.CreatePurchase(copy(known), timeout=WAIT_S)).replayed
        assert not (await till.CreatePurchase(sale(), timeout=WAIT_S)).replayed
        assert len((await till.ListControlTotals(totals, timeout=WAIT_S)).control_totals) == 1


async def test_required_standby(pair: Replicated, purchases_url: str) -> None:
    """While commits wait for none, nothing is acknowledged: no new sale, and no repeat."""
    known = sale()
    async with serving(purchases_url, require_sync_standby=True) as channel:
        till: Any = PurchasesServiceStub(channel)  # type: ignore[arg-type, unused-ignore]
        assert await is_serving(channel)
        await till.CreatePurchase(known, timeout=WAIT_S)
        with capture_logs() as logs:
            pair.require_standby("")

            async def not_serving() -> bool:
                return not await is_serving(channel)

            for request in (sale(), copy(known)):
                await eventually(not_serving, "it does not serve")
                refused = await refusal(till.CreatePurchase(request, timeout=WAIT_S))
                assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
        assert any("no commit waits for a standby, which is required" in entry["event"] for entry in logs)
        pair.require_standby()
        await eventually(lambda: is_serving(channel), "it serves again")
        assert (await till.CreatePurchase(known, timeout=WAIT_S)).replayed


async def test_standby_that_nobody_waits_for(pair: Replicated, purchases_url: str) -> None:
    """It is said in the log and in the metrics, and sales go on."""

    async def unsafe(value: float) -> bool:
        return REGISTRY.get_sample_value("purchases_failover_unsafe") == value

    async with serving(purchases_url) as channel:
        await eventually(lambda: unsafe(0), "a failover is safe")
        with capture_logs() as logs:
            pair.require_standby("")
            await eventually(lambda: unsafe(1), "a failover would lose sales")
        assert any("a failover loses acknowledged sales" in entry["event"] for entry in logs)
        assert await is_serving(channel)


async def test_analytics_whose_standby_nobody_waits_for(pair: Replicated, analytics_url: str) -> None:
    async with pool(analytics_url, "analytics_consumer") as opened:
        upkeep = Upkeep(opened, Health(_ignore, set()), 0)

        async def unsafe(value: float) -> bool:
            await upkeep.run_once()
            return REGISTRY.get_sample_value("analytics_failover_unsafe") == value

        await eventually(lambda: unsafe(0), "a failover is safe")
        pair.require_standby("")
        await eventually(lambda: unsafe(1), "a failover would lose what was counted")


async def _ignore(_: bool) -> None:
    pass


async def test_long_cut_leaves_nobody_behind(pair: Replicated, purchases_url: str) -> None:
    """A flush that waits for the standby is given up after its time, and so is its process of PostgreSQL: else each
    attempt would leave one behind, until there is no connection left for anybody."""
    async with serving(purchases_url, flush_timeout_s=0.5) as channel:
        till: Any = PurchasesServiceStub(channel)  # type: ignore[arg-type, unused-ignore]
        await till.CreatePurchase(sale(), timeout=WAIT_S)
        pair.cut()
        request = sale()
        most = 0
        for _ in range(12):
            await refusal(till.CreatePurchase(copy(request), timeout=WAIT_S))
            most = max(most, pair.waiting())
        assert most <= 3
        pair.mend()
        assert (await till.CreatePurchase(request, timeout=WAIT_S)).replayed


# --- One server.


async def test_read_only_session_is_given_up(purchases_db: str) -> None:
    """After a switch of servers the sessions stay read-only, while a new one would not be: they are closed."""
    async with pool(purchases_db, "purchases_service", size=2) as opened:
        async with opened.connection() as one, opened.connection() as other:
            for connection in (one, other):
                await connection.execute("SET default_transaction_read_only = on")
        for _ in range(2):
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                async with opened.connection() as connection:
                    await connection.execute("INSERT INTO customers VALUES (gen_random_uuid())")
            assert connection.closed
        async with opened.connection() as connection:
            await connection.execute("INSERT INTO customers VALUES (gen_random_uuid())")


async def test_settings_of_others(purchases_db: str) -> None:
    """What the database or the role have as their defaults changes no answer."""
    name = urlsplit(purchases_db).path[1:]
    odd = {
        "datestyle": "'SQL, DMY'",
        "intervalstyle": "iso_8601",
        "timezone": "'Asia/Kathmandu'",
        "search_path": "nowhere",
        "client_encoding": "latin1",
        "bytea_output": "escape",
        "standard_conforming_strings": "off",
        "default_transaction_isolation": "'repeatable read'",
        "transform_null_equals": "on",
        "array_nulls": "off",
        "lock_timeout": "'1ms'",
        "synchronous_commit": "off",
    }
    for setting, value in odd.items():
        query(purchases_db, f"ALTER DATABASE {name} SET {setting} = {value}; SELECT 1")
    async with pool(purchases_db, "purchases_service", size=1) as opened, opened.connection() as connection:
        for setting in odd:
            cursor = await connection.execute(f"SHOW {setting}")
            ((shown,),) = await cursor.fetchall()
            assert shown == {**postgres.SESSION, "lock_timeout": "0", "synchronous_commit": "on"}[setting]
    async with serving(purchases_db) as channel:
        till: Any = PurchasesServiceStub(channel)  # type: ignore[arg-type, unused-ignore]
        request = sale(receipt_id="é-日本")
        recorded = await till.CreatePurchase(request, timeout=WAIT_S)
        assert (await till.CreatePurchase(request, timeout=WAIT_S)).purchase == recorded.purchase
        listed = await till.ListPurchases(pb.ListPurchasesRequest(), timeout=WAIT_S)
        assert list(listed.purchases) == [recorded.purchase]


# --- Behind a pooler.


@contextmanager
def pooler(url: str, directory: Path, mode: str) -> Iterator[str]:
    """pgbouncer before the server; yields the URL through it."""
    server = urlsplit(url)
    assert server.username and server.password
    pooler = Pooler(directory, f"{server.hostname}:{server.port}", {server.username: server.password}, mode)
    try:
        pooler.start()
        yield server._replace(netloc=f"{server.username}:{server.password}@127.0.0.1:{pooler.port}").geturl()
    finally:
        pooler.kill()


async def test_pooler_that_shares_sessions_is_refused(purchases_db: str, tmp_path: Path) -> None:
    with pooler(purchases_db, tmp_path / "pooler", "transaction") as url:
        config = ServeSettings(url, listen=free_address(), metrics_listen="127.0.0.1:0", backlog_months=0)
        with pytest.raises(psycopg.NotSupportedError, match="connect directly, or let it pool sessions"):
            await asyncio.wait_for(purchases.serve(config, asyncio.Event()), WAIT_S)


async def test_pooler_of_sessions(purchases_db: str, tmp_path: Path) -> None:
    with pooler(purchases_db, tmp_path / "pooler", "session") as url:
        async with serving(url) as channel:
            till: Any = PurchasesServiceStub(channel)  # type: ignore[arg-type, unused-ignore]
            request = sale()
            await till.CreatePurchase(request, timeout=WAIT_S)
            assert (await till.CreatePurchase(request, timeout=WAIT_S)).replayed
