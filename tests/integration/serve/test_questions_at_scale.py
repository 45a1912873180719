"""Answers about the chain cost the same however many branches it has: counted in rows that PostgreSQL reads."""

from datetime import date, timedelta

import psycopg
import pytest

from analytics_svc.serve import queries
from analytics_svc.serve.queries import Days
from chassis.postgres import Connection
from tests.conftest import pool

FIRST, DAYS, BRANCHES, PRODUCTS = date(2026, 1, 1), 100, 40, 20
LAST = FIRST + timedelta(days=DAYS - 1)


@pytest.fixture
def chain_db(analytics_db: str) -> str:
    """Each branch sells each product once a day; the product's number is its price. A batch is still only noted."""
    with psycopg.connect(analytics_db, autocommit=True) as connection:
        connection.execute(
            """
            INSERT INTO product_sales_daily SELECT %(first)s::date + day, branch_id, product_id, 1, product_id
            FROM generate_series(0, %(days)s - 1) AS day, generate_series(1, %(branches)s) AS branch_id,
                generate_series(1, %(products)s) AS product_id;
            """,
            {"first": FIRST, "days": DAYS, "branches": BRANCHES, "products": PRODUCTS},
        )
        connection.execute(
            """
            INSERT INTO product_sales_of_chain_sums
            SELECT CASE WHEN day IS NOT NULL THEN 'day' WHEN month IS NOT NULL THEN 'month' ELSE 'all' END,
                coalesce(day, month, '0001-01-01'), product_id, sum(qty_sum), sum(revenue_sum)
            FROM product_sales_daily, date(date_trunc('month', day::timestamp)) AS month
            GROUP BY GROUPING SETS ((day, product_id), (month, product_id), (product_id))
            """
        )
        connection.execute(
            "INSERT INTO product_sales_of_chain_notes SELECT ARRAY [%s, %s]::date[], '{1,2}', '{5,5}', '{500,1000}'",
            [FIRST, LAST],
        )
        connection.execute("VACUUM ANALYZE")
    return analytics_db


async def rows_read(connection: Connection) -> int:
    """In this transaction."""
    cursor = await connection.execute(
        "SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0)) FROM pg_stat_xact_user_tables"
    )
    ((rows,),) = await cursor.fetchall()
    return int(rows)


@pytest.mark.parametrize(
    ("first", "last", "rows_max"),
    [
        (LAST, LAST, PRODUCTS),
        (LAST - timedelta(days=6), LAST, 7 * PRODUCTS),
        (LAST - timedelta(days=13), LAST, 14 * PRODUCTS),
        (FIRST, LAST, (4 + 15 + 15) * PRODUCTS),
        (FIRST + timedelta(days=20), LAST, (4 + 15 + 15) * PRODUCTS),
        (None, None, PRODUCTS),
    ],
)
async def test_top_products_of_the_chain_read_no_branches(
    chain_db: str, first: date | None, last: date | None, rows_max: int
) -> None:
    """A row for each product and day, or month; not for each branch. What was just sold is in the answer, too."""
    days = Days(first, last) if first and last else None
    async with pool(chain_db, "analytics_server", size=1) as opened:
        for _ in range(8):  # after the fifth, PostgreSQL plans without knowing the parameters
            async with opened.connection() as connection, connection.transaction():
                earlier = await rows_read(connection)
                answer = await queries.top_products(
                    connection, days, None, limit=1_000, by_revenue=False, include_ties=False
                )
                read = await rows_read(connection) - earlier
            assert read <= rows_max + 10  # with freshness, and notes
    each = BRANCHES * (DAYS if days is None else (days.last - days.first).days + 1)
    sold = {product_id: quantity for product_id, quantity, *_ in answer.rows}
    assert sold == {
        product_id: each + 5 * (product_id == 2) + 5 * (product_id == 1 and first in (FIRST, None))
        for product_id in range(1, PRODUCTS + 1)
    }
