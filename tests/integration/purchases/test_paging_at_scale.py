"""Pages cost what they show, however many purchases and customers there are: counted in rows that PostgreSQL reads."""

import datetime
from collections.abc import AsyncIterator

import psycopg
import pytest

from chassis.postgres import Connection, Pool
from purchases_svc import customers, pages
from purchases_svc.sale import Purchase
from tests.conftest import pool
from tests.sizes import how_many

ROWS = how_many("PAGED_ROWS")
MONTHS, BRANCHES, LOYAL = 3, 20, 1_000  # so many purchases of one customer among them
PAGE = 50
PAGES = 8  # after the fifth, PostgreSQL plans without knowing the parameters

FIRST_DAY = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)
LOYAL_CUSTOMER = "00000000-0000-4000-8000-000000000001"


@pytest.fixture
async def reading(purchases_db: str) -> AsyncIterator[Pool]:
    """A database with many purchases, evenly over three months, each of one item; and as many customers."""
    with psycopg.connect(purchases_db, autocommit=True) as connection:
        for month in range(1, MONTHS + 1):
            connection.execute("SELECT ensure_purchases_month(%s)", [FIRST_DAY.date().replace(month=month)])
        connection.execute("INSERT INTO customers (customer_id) VALUES (%s)", [LOYAL_CUSTOMER])
        connection.execute("INSERT INTO customers SELECT gen_random_uuid() FROM generate_series(1, %s)", [ROWS])
        connection.execute(
            """
            WITH sold AS (
                SELECT n, %(first)s + n * (interval '89 days' / %(rows)s) AS t
                FROM generate_series(0, %(rows)s - 1) AS n
            ), purchase AS (
                INSERT INTO purchases (purchase_id, receipt_id, idempotency_key, branch_id, cashier_id, pos_id,
                                       customer_id, purchase_time, business_day, total_amount, item_count, event_id)
                SELECT overlay(uuid7_floor(t)::text PLACING right(md5(n::text), 12) FROM 25)::uuid, n::text,
                       gen_random_uuid(), 1 + n %% %(branches)s, 1, 'POS-1',
                       CASE WHEN n %% (%(rows)s / %(loyal)s) = 0 THEN %(customer)s::uuid END,
                       t, t::date, 1, 1, gen_random_uuid()
                FROM sold RETURNING purchase_id, purchase_time
            )
            INSERT INTO purchase_items (purchase_id, purchase_time, product_id, qty, unit_price, line_total)
            SELECT purchase_id, purchase_time, 1, 1, 1, 1 FROM purchase
            """,
            {
                "first": FIRST_DAY,
                "rows": ROWS,
                "branches": BRANCHES,
                "loyal": LOYAL,
                "customer": LOYAL_CUSTOMER,
            },
        )
        connection.execute("ANALYZE")
    async with pool(purchases_db, "purchases_service", size=1) as service:
        yield service


async def rows_read(connection: Connection) -> int:
    """By this connection lately, from all tables of purchases and customers: only differences mean something."""
    cursor = await connection.execute(
        "SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0)) FROM pg_stat_xact_user_tables"
        " WHERE relname ~ '^(purchases|purchase_items|customers)'"
    )
    row = await cursor.fetchone()
    assert row
    return int(row[0])


@pytest.mark.parametrize("filters", ["none", "branch", "customer", "range"])
async def test_pages_of_purchases_read_what_they_show(reading: Pool, filters: str) -> None:
    """Page after page, from the latest purchase and from the middle of all, with each filter, prepared or not."""
    middle = FIRST_DAY + datetime.timedelta(days=45)
    end = middle if filters == "range" else None
    start = FIRST_DAY if filters == "range" else None
    branch_id = 7 if filters == "branch" else None
    customer_id = LOYAL_CUSTOMER if filters == "customer" else None
    for begin in (None, (middle, "ffffffff-ffff-ffff-ffff-ffffffffffff")):
        before = begin
        seen: list[Purchase] = []
        for _ in range(PAGES):
            async with reading.connection() as connection, connection.transaction():
                earlier = await rows_read(connection)
                purchases, more = await pages.page(
                    connection,
                    limit=PAGE,
                    before=before,
                    branch_id=branch_id,
                    customer_id=customer_id,
                    start=start,
                    end=end,
                )
                # Of a branch, with as few branches as here, PostgreSQL may read the latest of all: that is cheaper.
                assert await rows_read(connection) - earlier <= (BRANCHES if branch_id else 3) * PAGE
            assert (len(purchases), more) == (PAGE, True)
            seen += purchases
            before = (purchases[-1].sale.purchase_time, purchases[-1].purchase_id)
        assert seen == sorted(seen, key=lambda p: (p.sale.purchase_time, p.purchase_id), reverse=True)


async def test_pages_of_customers_read_what_they_show(reading: Pool) -> None:
    """So for customers."""
    for begin in (None, "80000000-0000-4000-8000-000000000000"):
        after = begin
        for _ in range(PAGES):
            async with reading.connection() as connection, connection.transaction():
                earlier = await rows_read(connection)
                rows = await customers.page(connection, limit=PAGE, after=after)
                assert await rows_read(connection) - earlier <= 3 * PAGE
            assert len(rows) == PAGE
            after = rows[-1][0]


async def test_one_purchase_is_found_in_its_month(reading: Pool) -> None:
    """The id alone tells the month: one row is read, and the items."""
    async with reading.connection() as connection, connection.transaction():
        (purchase,), _ = await pages.page(
            connection, limit=1, before=None, branch_id=3, customer_id=None, start=None, end=None
        )
    for _ in range(PAGES):
        async with reading.connection() as connection, connection.transaction():
            earlier = await rows_read(connection)
            assert await pages.by_id(connection, purchase.purchase_id) == purchase
            assert await rows_read(connection) - earlier <= 5
