"""The one transaction that counts, on a real database."""

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import psycopg
import pytest

from analytics_svc.ingest.apply import Applied, apply, fold
from analytics_svc.ingest.events import decode
from analytics_svc.ingest.quarantine import QuarantinedEvent
from analytics_svc.purchase import PurchaseCreated
from chassis import postgres
from tests.conftest import pool
from tests.integration.purchase_events import GOLDEN, Sold, expected, query, read_models, sold, some_sales

UTC_ZONE = ZoneInfo("UTC")
SUMS = "daily_sales_by_branch, product_sales_daily, customer_loyalty, customer_loyalty_chain, sales_totals"
ROLL_UPS = (
    "daily_sales_of_chain, monthly_sales_by_branch, product_sales_totals, product_sales_of_chain_sums,"
    " product_sales_of_chain_notes"
)


@pytest.fixture
async def consumer_pool(analytics_db: str) -> AsyncIterator[postgres.Pool]:
    async with pool(analytics_db, "analytics_consumer") as opened:
        yield opened


def decoded(sales: list[Sold], zone: str = "UTC") -> list[PurchaseCreated]:
    return [decode(sale.body(), ZoneInfo(zone)) for sale in sales]


async def apply_batch(
    pool: postgres.Pool, events: list[PurchaseCreated], unfit: list[QuarantinedEvent] | None = None
) -> Applied:
    """As the consumer does it; conflicts are tried again."""
    while True:
        try:
            async with pool.connection() as connection, connection.pipeline(), connection.transaction():
                return await apply(connection, events, unfit or [])
        except postgres.CONFLICT:
            continue


async def test_golden_example_counts_as_it_stands(consumer_pool: postgres.Pool, analytics_db: str) -> None:
    """The contract's example adds 142.50 and 3 units, however often it is applied."""
    golden = decode(GOLDEN, UTC_ZONE)
    assert await apply_batch(consumer_pool, [golden, golden]) == Applied(1, 1, 0, [], [])
    assert await apply_batch(consumer_pool, [golden]) == Applied(0, 1, 0, [], [])
    day = date(2026, 1, 6)
    month = date(2026, 1, 1)
    assert read_models(analytics_db) == {
        "daily": {(day, branch_id): (14_250, 3, 1, 0) for branch_id in (0, 1)},
        "monthly": {(branch_id, month): (14_250, 3, 1, 0) for branch_id in (0, 1)},
        "products": {(day, 1, 1001): (2, 1_780), (day, 1, 2007): (1, 12_470)},
        "products_of_chain": {
            (*period, product_id): sold
            for period in (("day", day), ("month", month), ("all", date.min))
            for product_id, sold in ((1001, (2, 1_780)), (2007, (1, 12_470)))
        },
        "product_totals": {(1, 1001): (2, 1_780), (1, 2007): (1, 12_470)},
        "loyalty": {},
        "totals": {0: (14_250, 3, 1, 0, 0), 1: (14_250, 3, 1, 0, 0)},
    }
    assert query(analytics_db, "SELECT revenue_sum FROM daily_sales_by_branch") == [(Decimal("142.50"),)]
    assert query(analytics_db, "SELECT event_id::text, event_type FROM analytics_event_log") == [
        ("019b92cd-80a0-7c3e-8f5a-2b6d1c0e4f77", "PurchaseCreated")
    ]


async def test_order_duplicates_and_rivals_change_nothing(consumer_pool: postgres.Pool, analytics_db: str) -> None:
    """Shuffled and repeated batches of any size, by two appliers at once, end in the sums computed by other means."""
    sales = some_sales(600, seed=7, days=45)  # parts of two months
    chance = random.Random(8)

    def deliveries() -> list[list[PurchaseCreated]]:
        shuffled = decoded(sales + chance.choices(sales, k=200))
        chance.shuffle(shuffled)
        batches = []
        while shuffled:
            size = chance.randint(1, 90)
            batches.append(shuffled[:size])
            shuffled = shuffled[size:]
        return batches

    async def applier() -> int:
        return sum([(await apply_batch(consumer_pool, batch)).counted for batch in deliveries()])

    assert sum(await asyncio.gather(applier(), applier())) == 600
    assert read_models(analytics_db) == expected(sales)


async def test_events_fold_into_another_schema(consumer_pool: postgres.Pool, analytics_db: str) -> None:
    """With another search path, the same statements fill shadow tables and leave the real ones alone."""
    sales = some_sales(50, seed=10)
    query(analytics_db, "CREATE SCHEMA shadow; GRANT USAGE ON SCHEMA shadow TO analytics_consumer")
    for table in f"{SUMS}, {ROLL_UPS}".split(", "):
        query(analytics_db, f"CREATE TABLE shadow.{table} (LIKE public.{table} INCLUDING ALL)")
    query(analytics_db, "GRANT ALL ON ALL TABLES IN SCHEMA shadow TO analytics_consumer")
    async with consumer_pool.connection() as connection, connection.transaction():
        await connection.execute("SET LOCAL search_path = shadow")
        await fold(connection, decoded(sales))
    assert read_models(analytics_db) == expected([])
    assert read_models(analytics_db, "shadow") == expected(sales)


async def test_days_are_cut_in_the_chains_zone(consumer_pool: postgres.Pool, analytics_db: str) -> None:
    """A sale belongs to the business day of its time in the zone, also around midnight and changes of the clock."""
    zone = "America/New_York"
    moments = [datetime(2026, 3, 8, 4, 59, 59, tzinfo=UTC) + timedelta(hours=n) for n in range(30)]
    sales = [sold("1.00", purchase_time=moment) for moment in moments]
    await apply_batch(consumer_pool, decoded(sales, zone))
    assert read_models(analytics_db) == expected(sales, zone)
    assert {day for day, _ in read_models(analytics_db)["daily"]} == {
        date(2026, 3, 7),
        date(2026, 3, 8),
        date(2026, 3, 9),
    }


async def test_sums_stay_exact_at_the_contracts_limits(consumer_pool: postgres.Pool, analytics_db: str) -> None:
    """Thousands of the largest amounts add up to the cent."""
    largest = Decimal("9999999999999999.99")
    sales = [sold(str(largest)) for _ in range(2_000)]
    await apply_batch(consumer_pool, decoded(sales))
    await apply_batch(consumer_pool, decoded([sold("0.01")]))
    assert query(analytics_db, "SELECT revenue_sum FROM sales_totals WHERE branch_id = 0") == [
        (largest * 2_000 + Decimal("0.01"),)
    ]


async def test_failed_transaction_leaves_nothing(consumer_pool: postgres.Pool, analytics_db: str) -> None:
    """When anything fails, the events are not remembered either, and count when they come again."""
    events = decoded(some_sales(20, seed=1))
    query(analytics_db, "ALTER TABLE sales_totals ADD CONSTRAINT none CHECK (items_sum < 0)")
    with pytest.raises(psycopg.errors.CheckViolation):
        await apply_batch(consumer_pool, events)
    query(analytics_db, "ALTER TABLE sales_totals DROP CONSTRAINT none")
    assert read_models(analytics_db) == expected([])
    assert (await apply_batch(consumer_pool, events)).counted == 20


async def test_freshness_moves_with_what_is_new(consumer_pool: postgres.Pool, analytics_db: str) -> None:
    """The newest batch's time is stored; batches of known events do not touch it."""
    freshness = "SELECT applied_at, now() - applied_at < interval '1 minute' FROM freshness"
    assert query(analytics_db, freshness) == [(None, None)]
    events = decoded([sold("1.00")])
    await apply_batch(consumer_pool, events)
    ((first, recent),) = query(analytics_db, freshness)
    assert recent
    await apply_batch(consumer_pool, events)
    assert query(analytics_db, freshness)[0][0] == first
    await apply_batch(consumer_pool, decoded([sold("1.00")]))
    assert query(analytics_db, freshness)[0][0] > first


def unfit(body: bytes = b"poison", **changes: Any) -> QuarantinedEvent:
    return QuarantinedEvent(None, "UNDECODABLE", "no JSON", body, {"headers": {"n": 1}})._replace(**changes)


async def test_poison_is_kept_once(consumer_pool: postgres.Pool, analytics_db: str) -> None:
    """The same poison, delivered again, finds its row; another reason or event makes another."""
    event_id = sold().event_id
    assert (await apply_batch(consumer_pool, [], [unfit(), unfit()])).quarantined == 1
    assert (await apply_batch(consumer_pool, [], [unfit()])).quarantined == 0
    others = [unfit(reason="APPLY_FAILED"), unfit(event_id=event_id), unfit(b"other"), unfit()]
    assert (await apply_batch(consumer_pool, [], others)).quarantined == 3
    assert query(analytics_db, "SELECT body, properties FROM quarantined_events WHERE event_id IS NOT NULL") == [
        (b"poison", {"headers": {"n": 1}})
    ]
    count = "SELECT quarantined_count FROM freshness"
    assert query(analytics_db, count) == [(4,)]
    query(analytics_db, "DELETE FROM quarantined_events WHERE reason = 'APPLY_FAILED'")
    assert query(analytics_db, count) == [(3,)]
    query(analytics_db, "TRUNCATE quarantined_events")
    assert query(analytics_db, count) == [(0,)]


async def test_rivals_with_the_same_poison_do_not_deadlock(consumer_pool: postgres.Pool, analytics_db: str) -> None:
    """Two appliers with the same events and the same poison in opposite order wait for each other, at worst."""
    sales = some_sales(60, seed=3)
    poison = [unfit(b"%d" % n) for n in range(60)]

    async def applier(step: int) -> None:
        for start in range(0, 60, 10):
            part = slice(start, start + 10)
            async with consumer_pool.connection() as connection, connection.pipeline(), connection.transaction():
                await apply(connection, decoded(sales[part])[::step], poison[part][::step])

    await asyncio.gather(applier(1), applier(-1))
    assert read_models(analytics_db) == expected(sales)
    assert query(analytics_db, "SELECT quarantined_count FROM freshness") == [(60,)]


REFUSED = {
    "analytics_consumer": [
        "CREATE TABLE mine (n int)",
        "DROP TABLE product_sales_daily",
        "ALTER TABLE freshness ADD COLUMN mine int",
        "TRUNCATE customer_loyalty",
        "DELETE FROM analytics_event_log",
        "UPDATE analytics_event_log SET processed_at = now()",
        "UPDATE analytics_settings SET time_zone = 'UTC'",
        "UPDATE quarantined_events SET body = ''",
        "UPDATE schema_migrations SET version = 2",
    ],
    "analytics_server": [
        "CREATE TABLE mine (n int)",
        "UPDATE daily_sales_by_branch SET items_sum = 0",
        "INSERT INTO analytics_event_log (event_id, event_type) VALUES (gen_random_uuid(), 'PurchaseCreated')",
        "DELETE FROM customer_loyalty",
        "UPDATE monthly_sales_by_branch SET items_sum = 0",
        "UPDATE freshness SET quarantined_count = 0",
        "DELETE FROM quarantined_events",
        "UPDATE analytics_settings SET time_zone = 'UTC'",
    ],
}


@pytest.mark.parametrize(("role", "statement"), [(role, text) for role, texts in REFUSED.items() for text in texts])
def test_roles_may_do_their_job_only(analytics_db: str, role: str, statement: str) -> None:
    """The consumer runs no DDL, deletes no event and changes no evidence; the server writes nothing."""
    with psycopg.connect(analytics_db) as connection:
        connection.execute(f"SET ROLE {role}".encode())
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement.encode())


async def test_an_id_that_is_counted_with_other_content(analytics_db: str) -> None:
    """Whichever comes first counts; another one with its id is told from a duplicate, also within one batch."""
    sale = sold("1.00", "2.00", customer_id=str(uuid.uuid4()))
    others = [
        sale._replace(lines=tuple((product + 500, qty, price) for product, qty, price in sale.lines)),
        sale._replace(branch_id=2),
        sale._replace(customer_id=None),
        sale._replace(purchase_time=sale.purchase_time + timedelta(seconds=1)),
    ]
    same = sale._replace(lines=tuple(reversed(sale.lines)))
    first, *rest = decoded([sale, sale, same, *others])
    async with pool(analytics_db, "analytics_consumer") as opened, opened.connection() as connection:
        for batch, counted in (([first, *rest], 1), (rest, 0), (list(reversed(rest)), 0)):
            async with connection.transaction():
                applied = await apply(connection, batch, [])
            assert (applied.counted, applied.duplicates) == (counted, 2)
            assert {id(event) for event in applied.conflicting} == {id(event) for event in rest[2:]}
    assert read_models(analytics_db) == expected([sale])
