"""What the chain sells of each product: noted by batches, summed up by one process, the same for readers all along."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import psycopg
import pytest
from prometheus_client import REGISTRY

from analytics_svc.ingest import summing
from analytics_svc.ingest.event_log import exclude_applies
from analytics_svc.ingest.summing import Summing, sum_up
from chassis import postgres
from tests.conftest import eventually, pool
from tests.integration.ingest.test_apply import apply_batch, decoded
from tests.integration.purchase_events import expected, query, read_models, sold, some_sales

NOTED = "SELECT count(*)::int FROM product_sales_of_chain_notes"
# By each period of the view, and by the rows that it sums up: one line, or a sale has had half of its effect.
BALANCE = """
    SELECT DISTINCT coalesce(sum(qty_sum), 0), coalesce(sum(revenue_sum), 0) FROM product_sales_daily
    UNION SELECT coalesce(sum(qty_sum), 0), coalesce(sum(revenue_sum), 0) FROM product_sales_of_chain
        WHERE period = 'day'
    UNION SELECT coalesce(sum(qty_sum), 0), coalesce(sum(revenue_sum), 0) FROM product_sales_of_chain
        WHERE period = 'month'
    UNION SELECT coalesce(sum(qty_sum), 0), coalesce(sum(revenue_sum), 0) FROM product_sales_of_chain
        WHERE period = 'all'
"""


@pytest.fixture
async def consumer_pool(analytics_db: str) -> AsyncIterator[postgres.Pool]:
    async with pool(analytics_db, "analytics_consumer", size=6) as opened:
        yield opened


async def test_readers_see_no_difference(
    consumer_pool: postgres.Pool, analytics_db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While rivals count batches and rivals sum them up, every snapshot balances, and the end is what was sold."""
    monkeypatch.setattr(summing, "PAUSE_S", 0.0)
    monkeypatch.setattr(summing, "REST", 0)
    monkeypatch.setattr(summing, "LINES_AT_ONCE", 150)
    sales = some_sales(600, seed=41, days=45)
    done = asyncio.Event()

    async def count(seed: int) -> None:
        shuffled = decoded(sales)
        random.Random(seed).shuffle(shuffled)
        for start in range(0, len(shuffled), 20):
            await apply_batch(consumer_pool, shuffled[start : start + 20])

    async def look() -> int:
        looks = 0
        async with pool(analytics_db, "analytics_consumer", size=1) as opened, opened.connection() as connection:
            while not done.is_set():
                assert len(await (await connection.execute(BALANCE)).fetchall()) == 1
                looks += 1
        return looks

    looking = asyncio.create_task(look())
    rivals = [asyncio.create_task(Summing(consumer_pool).run()) for _ in range(2)]
    await asyncio.gather(count(1), count(2))
    await eventually(lambda: nothing_noted(analytics_db), "everything is summed up")
    done.set()
    assert await looking > 3
    for rival in rivals:
        rival.cancel()
    assert read_models(analytics_db) == expected(sales)


async def nothing_noted(url: str) -> bool:
    return query(url, NOTED) == [(0,)]


async def test_a_process_that_dies_takes_nothing_with_it(consumer_pool: postgres.Pool, analytics_db: str) -> None:
    """In the middle of summing up; meanwhile the numbers are whole, and the next one goes on."""
    sales = some_sales(40, seed=42)
    await apply_batch(consumer_pool, decoded(sales[:20]))
    await apply_batch(consumer_pool, decoded(sales[20:]))
    with contextlib.suppress(psycopg.OperationalError):
        async with consumer_pool.connection() as connection, connection.transaction():
            assert not await sum_up(connection)
            query(analytics_db, f"SELECT pg_terminate_backend({connection.info.backend_pid})")
    assert query(analytics_db, NOTED) == [(2,)]
    assert read_models(analytics_db) == expected(sales)
    await Summing(consumer_pool).run_once()
    assert query(analytics_db, NOTED) == [(0,)]
    assert read_models(analytics_db) == expected(sales)


@pytest.mark.parametrize("limit", ["LINES_AT_ONCE", "NOTES_AT_ONCE"])
async def test_work_is_bounded(
    consumer_pool: postgres.Pool, analytics_db: str, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """Of a long absence, some batches at a time, without a pause while there are more; how many is a metric."""
    monkeypatch.setattr(summing, limit, 2)
    for _ in range(5):
        await apply_batch(consumer_pool, decoded([sold("1.00")]))
    worker = Summing(consumer_pool)
    assert [await worker.run_once() for _ in range(3)] == [True, True, False]
    assert REGISTRY.get_sample_value("analytics_noted_batches") == 0
    assert query(analytics_db, NOTED) == [(0,)]


async def test_one_at_a_time_and_never_beside_a_repair(consumer_pool: postgres.Pool, analytics_db: str) -> None:
    """A second one leaves it at that; who repairs is alone with the sums."""
    await apply_batch(consumer_pool, decoded([sold("1.00")]))
    worker = Summing(consumer_pool)
    async with consumer_pool.connection() as connection, connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock(%s)", [summing.SUMMING_LOCK])
        assert await worker.run_once() is False
        assert query(analytics_db, NOTED) == [(1,)]
    async with consumer_pool.connection() as connection, connection.transaction():
        await exclude_applies(connection)
        summed = asyncio.create_task(worker.run_once())
        await eventually(lambda: waits(analytics_db), "it waits for the repair")
    await summed
    assert query(analytics_db, NOTED) == [(0,)]


async def waits(url: str) -> bool:
    return query(url, "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'apply_lock'::regclass") != []


async def test_no_batch_waits_for_the_chains_products(consumer_pool: postgres.Pool, analytics_db: str) -> None:
    """Whoever holds all rows of them, such as the one that sums up: sales are counted."""
    await apply_batch(consumer_pool, decoded([sold("1.00")]))
    await Summing(consumer_pool).run_once()
    async with consumer_pool.connection() as connection, connection.transaction():
        await connection.execute("SELECT FROM product_sales_of_chain_sums FOR UPDATE")
        assert (await apply_batch(consumer_pool, decoded([sold("1.00")]))).counted == 1
