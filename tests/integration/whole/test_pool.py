"""Connection pools when the server ends their connections, and what metrics tell of them."""

import asyncio

import psycopg
import pytest
from prometheus_client import REGISTRY
from psycopg_pool import PoolTimeout

from chassis import postgres
from chassis.postgres import Pool
from chassis.shares import Shares
from tests.conftest import WAIT_S, eventually, pool
from tests.integration.purchase_events import query

OURS = "FROM pg_stat_activity WHERE application_name = 'test' AND datname = current_database()"
SIZE = 8


async def ask(opened: Pool) -> int:
    async with opened.connection(10) as connection:
        ((pid,),) = await (await connection.execute("SELECT pg_backend_pid() FROM pg_sleep(0.01)")).fetchall()
    return int(pid)


async def end_all(url: str) -> None:
    async def gone() -> bool:
        return query(url, f"SELECT count(*) {OURS}") == [(0,)]

    query(url, f"SELECT pg_terminate_backend(pid) {OURS}")
    await eventually(gone, "no connection is left")


async def test_what_ended_while_idle_fails_no_call(analytics_db: str) -> None:
    """One call or many at once: each gets a connection that lives, and soon the pool is as large as before."""
    async with pool(analytics_db, "analytics_consumer", SIZE) as opened:
        for at_once in (1, 3 * SIZE):
            await end_all(analytics_db)
            began = asyncio.get_running_loop().time()
            await asyncio.gather(*(ask(opened) for _ in range(at_once)))
            assert asyncio.get_running_loop().time() - began < 9  # their patience is ten seconds
            await opened.wait(timeout=WAIT_S)
            async with asyncio.timeout(WAIT_S):
                while len(set(await asyncio.gather(*(ask(opened) for _ in range(SIZE))))) < SIZE:
                    pass


async def test_one_call_after_the_other_has_the_same_connection(analytics_db: str) -> None:
    """Its server process has all at hand that the others would have to fetch."""
    async with pool(analytics_db, "analytics_consumer", SIZE) as opened:
        await opened.wait(timeout=WAIT_S)
        assert len({await ask(opened) for _ in range(SIZE)}) == 1


async def test_only_the_call_in_flight_fails(analytics_db: str) -> None:
    async with pool(analytics_db, "analytics_consumer", 2) as opened:
        async with opened.connection() as connection:
            await end_all(analytics_db)
            with pytest.raises(psycopg.OperationalError):
                await connection.execute("SELECT 1")
        assert await ask(opened)


def told(name: str, **labels: str) -> float:
    """What the page for Prometheus says of the pool "test"."""
    return REGISTRY.get_sample_value(f"db_client_connection_{name}", {"pool": "test", **labels}) or 0.0


async def test_use_and_waiting_are_told(analytics_db: str) -> None:
    """Who has connections, who waits for one (or for a turn to ask), and who waited in vain."""
    waited, in_vain = told("wait_time_seconds_count"), told("timeouts_total")
    async with pool(analytics_db, "analytics_consumer", 2) as opened:
        shares = Shares(opened, 1)
        assert (told("max"), told("count", state="idle"), told("count", state="used")) == (2, 2, 0)
        async with opened.connection(), shares.connection("a", WAIT_S):
            assert (told("count", state="idle"), told("count", state="used"), told("pending_requests")) == (0, 2, 0)
            others = [
                asyncio.create_task(each.__aenter__())
                for each in (opened.connection(0.2), shares.connection("a", 0.2), shares.connection("b", 0.2))
            ]

            async def waiting() -> bool:
                return told("pending_requests") == 3

            await eventually(waiting, "three wait: for a connection, for a turn, and again for a connection")
            results = await asyncio.gather(*others, return_exceptions=True)
            assert all(isinstance(result, PoolTimeout) for result in results)
        assert (told("count", state="idle"), told("count", state="used"), told("pending_requests")) == (2, 0, 0)
    assert told("wait_time_seconds_count") - waited == 4
    assert told("timeouts_total") - in_vain == 2


async def test_who_is_frozen_in_a_pipeline_holds_no_lock_for_long(analytics_db: str) -> None:
    """The server takes it for busy, so that its limit of idle transactions does not end it; another one does."""
    ((version,),) = query(analytics_db, "SHOW server_version_num")
    assert int(version) >= 170_000, "only then the server can end it"
    holders = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 42 AND granted"

    async def held(count: int) -> bool:
        return query(analytics_db, holders) == [(count,)]

    async def freeze(opened: Pool) -> None:
        async with opened.connection(10) as connection, connection.pipeline(), connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(42)")
            await eventually(lambda: held(1), "it holds the lock")
            await eventually(lambda: held(0), "the server has ended it")
            await connection.execute("SELECT 1")

    async with postgres.open_pool(
        analytics_db,
        role="analytics_consumer",
        application_name="test",
        size=1,
        statement_timeout_s=30,
        settings={"idle_in_transaction_session_timeout": "500"},
        transaction_timeout_s=3,
    ) as opened:
        with pytest.raises(psycopg.OperationalError):
            await freeze(opened)
