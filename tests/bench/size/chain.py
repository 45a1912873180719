"""Read models of a large chain, made by SQL: as if it had sold the same way on each of many days."""

import datetime
from collections.abc import Callable

import psycopg

from tests.bench.analytics.years import DAY, ROLL_UPS, SUMS

PRODUCTS = 5_000  # of the chain
PRODUCTS_A_DAY = 400  # of them, that a branch sells on a day
PURCHASES_A_DAY = 50  # of a branch, half of them known customers'
CUSTOMERS = 1_200  # of a branch; each buys in another one, too

_DAY = f"""
INSERT INTO product_sales_daily
SELECT %(day)s, branch_id, product_id, quantity, quantity * 8.90
FROM generate_series(1, %(branches)s) AS branch_id
CROSS JOIN LATERAL (
    SELECT 1 + (place * 12 + branch_id * 7 + %(number)s) %% {PRODUCTS}, 1 + (place + branch_id) %% 9
    FROM generate_series(0, {PRODUCTS_A_DAY - 1}) AS place
) AS sold (product_id, quantity)
ORDER BY 2, 3
"""
_BRANCHES = f"""
INSERT INTO daily_sales_by_branch
SELECT day, branch_id, sum(revenue_sum), sum(qty_sum), {PURCHASES_A_DAY}, {PURCHASES_A_DAY // 2}
FROM product_sales_daily GROUP BY 1, 2 ORDER BY 1, 2;
"""
_CUSTOMERS = f"""
INSERT INTO customer_loyalty
SELECT md5(n::text)::uuid, branch_id, 1 + n %% 40, %(last)s::timestamptz + n %% 86400 * interval '1 second'
FROM generate_series(1, %(branches)s * {CUSTOMERS}) AS n
CROSS JOIN LATERAL (VALUES (1 + n %% %(branches)s), (1 + n * 7 %% %(branches)s)) AS place (branch_id)
ON CONFLICT DO NOTHING
"""


def load(url: str, branches: int, first: datetime.date, last: datetime.date, loaded: Callable[[int], None]) -> None:
    """Sell from `first` to `last`; `loaded` is called with the number of rows by product of each day."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET synchronous_commit = off; SET work_mem = '256MB'")
        for number in range((last - first).days + 1):
            connection.execute(_DAY, {"day": first + number * DAY, "number": number, "branches": branches})
            loaded(branches * PRODUCTS_A_DAY)
        connection.execute(_CUSTOMERS, {"last": last, "branches": branches})
        for statements in (_BRANCHES, SUMS, ROLL_UPS):
            connection.execute(statements.encode())
        connection.execute("VACUUM (ANALYZE)")


def table_sizes(url: str) -> dict[str, tuple[int, int]]:
    """Rows, and bytes with all indexes, of each table that has some, the largest first."""
    with psycopg.connect(url) as connection:
        rows = connection.execute(
            "SELECT relname, reltuples::bigint, pg_total_relation_size(oid) FROM pg_class"
            " WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND reltuples > 1000 ORDER BY 3 DESC"
        ).fetchall()
    return {name: (count, size) for name, count, size in rows}
