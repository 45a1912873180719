"""Connection pools when the server ends their connections."""

import asyncio

import psycopg
import pytest

from chassis.postgres import Pool
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


async def test_only_the_call_in_flight_fails(analytics_db: str) -> None:
    async with pool(analytics_db, "analytics_consumer", 2) as opened:
        async with opened.connection() as connection:
            await end_all(analytics_db)
            with pytest.raises(psycopg.OperationalError):
                await connection.execute("SELECT 1")
        assert await ask(opened)
