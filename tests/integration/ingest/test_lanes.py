"""Large batches of several consumers, which share all branches and pass each other."""

import asyncio
import random
from collections.abc import AsyncIterator

import psycopg
import pytest

from analytics_svc.ingest import lanes
from analytics_svc.ingest.messages import Message
from analytics_svc.ingest.settling import LANED_MIN, Case, Settler
from chassis import postgres
from tests.conftest import eventually, pool
from tests.integration.ingest.test_apply import UTC_ZONE
from tests.integration.purchase_events import Sold, expected, query, read_models, sold, some_sales


@pytest.fixture
async def consumer_pool(analytics_db: str) -> AsyncIterator[postgres.Pool]:
    async with pool(analytics_db, "analytics_consumer", size=6) as opened:
        yield opened


def settler(pool: postgres.Pool) -> Settler:
    return Settler(pool, UTC_ZONE, deaths_max=3)


def messages(sales: list[Sold]) -> list[Message]:
    return [Message(sale.body(), {"message_id": sale.event_id}) for sale in sales]


def cases(settler: Settler, sales: list[Sold]) -> list[Case]:
    return [settler.read(message) for message in messages(sales)]


async def settle(settler: Settler, some: list[Case]) -> None:
    """As the consumer does it."""
    while True:
        try:
            return await settler.settle(some)
        except postgres.CONFLICT:
            continue


async def test_rivals_with_large_batches(consumer_pool: postgres.Pool, analytics_db: str) -> None:
    """Each event counts once, whoever has it; what cannot be counted is kept once, and its neighbours count."""
    sales = some_sales(3 * LANED_MIN, seed=51, days=40, branches=7)
    refused = sold("1.00", branch_id=3)
    query(
        analytics_db,
        f"ALTER TABLE analytics_event_log ADD CONSTRAINT refused CHECK (event_id <> '{refused.event_id}')",
    )

    queue = [*messages([*sales, refused]), Message(b"poison", {})]

    async def rival(seed: int) -> None:
        own = settler(consumer_pool)
        shuffled = [own.read(message) for message in queue]
        random.Random(seed).shuffle(shuffled)
        middle = len(shuffled) // 2
        for part in (shuffled[:middle], shuffled[middle:]):
            await settle(own, part)

    await asyncio.gather(*[rival(seed) for seed in range(3)])
    assert read_models(analytics_db) == expected(sales)
    assert sorted(query(analytics_db, "SELECT reason, event_id::text FROM quarantined_events")) == [
        ("APPLY_FAILED", refused.event_id),
        ("UNDECODABLE", None),
    ]


async def test_who_is_slow_keeps_only_some_branches_waiting(consumer_pool: postgres.Pool, analytics_db: str) -> None:
    """While a consumer is in the middle of one lane, another counts the rest of its batch, and that lane after it."""
    sales = some_sales(4 * LANED_MIN, seed=52, branches=12)
    own = settler(consumer_pool)
    slow = [sale for sale in some_sales(30, seed=53, branches=12) if lanes.lane_of(sale.branch_id) == 1]
    others = [sale for sale in sales if lanes.lane_of(sale.branch_id) != 1]

    async def others_are_counted() -> bool:
        return query(analytics_db, "SELECT count(*) FROM analytics_event_log") == [(len(others),)]

    async with consumer_pool.connection() as connection, connection.transaction():
        assert await lanes.enter_free(connection, [1]) == 1
        # What this one holds of the branches' rows; those of the chain come last in a transaction.
        days, branches = [sale.purchase_time.date() for sale in slow], [sale.branch_id for sale in slow]
        await connection.execute(
            "INSERT INTO daily_sales_by_branch SELECT DISTINCT day, branch_id, 0, 0, 0, 0"
            " FROM unnest(%s::date[], %s::int[]) AS slow (day, branch_id)",
            [days, branches],
        )
        settling = asyncio.create_task(settle(own, cases(own, sales)))
        await eventually(others_are_counted, "all but one lane are counted")
        assert not settling.done()
        raise psycopg.Rollback
    await settling
    assert read_models(analytics_db) == expected(sales)


async def test_lanes_are_a_matter_of_speed_alone(consumer_pool: postgres.Pool, analytics_db: str) -> None:
    """Any login may hold them all, for ever: everything is counted."""
    sales = some_sales(LANED_MIN, seed=54)
    own = settler(consumer_pool)
    with psycopg.connect(analytics_db) as hostile:
        for lane in range(lanes.LANES):
            hostile.execute("SELECT pg_advisory_lock(%s, %s)", [lanes.LANES_LOCK, lane])
        await settle(own, cases(own, sales))
    assert read_models(analytics_db) == expected(sales)


async def test_small_batches_are_one_transaction(consumer_pool: postgres.Pool, analytics_db: str) -> None:
    """As everything that is tried again is: one announcement, one commit."""
    own = settler(consumer_pool)
    await settle(own, cases(own, some_sales(LANED_MIN - 1, seed=55)))
    assert query(analytics_db, "SELECT announced_count FROM freshness") == [(1,)]
