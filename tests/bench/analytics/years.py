"""Years of a chain's sales: in the purchases database, and as read models of the last days, months or all of them.

50 branches sell 200 of 5,000 products a day, in 50 purchases of 4 items; half of the purchases are known customers'.
"""

import datetime
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import psycopg

from tests.bench.history import LOADERS, SESSION

BRANCHES, PURCHASES_A_DAY, ITEMS, CUSTOMERS = 50, 50, 4, 100_000
ROWS_A_DAY = BRANCHES * PURCHASES_A_DAY * ITEMS  # of items; and of products, as no product is sold twice a day
DAY = datetime.timedelta(days=1)

_MONTHS = """
SELECT count(ensure_purchases_month(month::date)) FROM generate_series(
    date_trunc('month', %(first)s::timestamptz), %(last)s::timestamptz, interval '1 month') AS month
"""

# One day. Of each 25 products in a row, each branch sells one, the first of them more often than the last.
_DAY = f"""
WITH sale AS MATERIALIZED (
    SELECT uuidv7(moment - clock_timestamp()) AS purchase_id, moment AS purchase_time, branch_id, n,
        CASE WHEN random() < 0.5 THEN md5((random() * {CUSTOMERS})::int::text)::uuid END AS customer_id
    FROM generate_series(1, {BRANCHES}) AS branch_id
    CROSS JOIN generate_series(0, {PURCHASES_A_DAY - 1}) AS n
    CROSS JOIN LATERAL (
        SELECT %(day)s::timestamptz + interval '8 hours' + (n * 800 + random() * 800) * interval '1 second'
    ) AS t(moment)
), line AS MATERIALIZED (
    SELECT sale.*, 1 + 25 * place + floor(25 * power(random(), 2))::int AS product_id, (100 + 7 * place) * 0.01 AS price
    FROM sale CROSS JOIN generate_series(0, {ITEMS - 1}) AS item
    CROSS JOIN LATERAL (SELECT n * {ITEMS} + item + 0 * branch_id AS place) AS p
), new_purchase AS (
    INSERT INTO purchases (purchase_id, receipt_id, idempotency_key, branch_id, cashier_id, pos_id, customer_id,
        purchase_time, business_day, total_amount, item_count, event_id, created_at)
    SELECT purchase_id, n, gen_random_uuid(), branch_id, 17, 'POS-3', customer_id, purchase_time,
        (purchase_time AT TIME ZONE 'UTC')::date, sum(price), count(*), purchase_id, purchase_time
    FROM line GROUP BY purchase_id, n, branch_id, customer_id, purchase_time
)
INSERT INTO purchase_items (purchase_id, purchase_time, product_id, qty, unit_price, line_total)
SELECT purchase_id, purchase_time, product_id, 1, price, price FROM line
"""

# What the read models by day hold, and the customers; in the order of their keys.
_COPIES = {
    "product_sales_daily (day, branch_id, product_id, qty_sum, revenue_sum)": """
        SELECT business_day, branch_id, product_id, sum(qty), sum(line_total)
        FROM purchases JOIN purchase_items USING (purchase_id, purchase_time)
        WHERE purchase_time >= %(first)s AND purchase_time < %(next)s GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
        """,
    "daily_sales_by_branch"
    " (day, branch_id, revenue_sum, items_sum, purchases_count, purchases_with_customer_count)": """
        SELECT business_day, branch_id, sum(total_amount), sum(item_count), count(*),
            count(customer_id)
        FROM purchases WHERE purchase_time >= %(first)s AND purchase_time < %(next)s GROUP BY 1, 2 ORDER BY 1, 2
        """,
}
_COPY_CUSTOMERS = """
SELECT customer_id, branch_id, count(*), max(purchase_time) FROM purchases
WHERE customer_id IS NOT NULL AND purchase_time >= %(first)s GROUP BY 1, 2 ORDER BY 1, 2
"""
SUMS = """
INSERT INTO customer_loyalty_chain
SELECT customer_id, sum(purchases_count), max(last_purchase_at) FROM customer_loyalty GROUP BY 1 ORDER BY 1;

INSERT INTO sales_totals
SELECT coalesce(branch_id, 0), sum(revenue_sum), sum(items_sum), sum(purchases_count),
    sum(purchases_with_customer_count), 0
FROM daily_sales_by_branch GROUP BY GROUPING SETS ((branch_id), ());
UPDATE sales_totals SET unique_customers_count = CASE branch_id
    WHEN 0 THEN (SELECT count(*) FROM customer_loyalty_chain)
    ELSE (SELECT count(*) FROM customer_loyalty WHERE customer_loyalty.branch_id = sales_totals.branch_id) END;

UPDATE freshness SET applied_at = now();
"""
ROLL_UPS = """  -- of what is there by day
INSERT INTO daily_sales_of_chain
SELECT day, sum(revenue_sum), sum(items_sum), sum(purchases_count), sum(purchases_with_customer_count)
FROM daily_sales_by_branch GROUP BY day ORDER BY day;

INSERT INTO monthly_sales_by_branch
SELECT coalesce(branch_id, 0), month, sum(revenue_sum), sum(items_sum), sum(purchases_count),
    sum(purchases_with_customer_count)
FROM daily_sales_by_branch, date(date_trunc('month', day::timestamp)) AS month
GROUP BY GROUPING SETS ((branch_id, month), (month)) ORDER BY 1, 2;

INSERT INTO product_sales_totals
SELECT branch_id, product_id, sum(qty_sum), sum(revenue_sum) FROM product_sales_daily GROUP BY 1, 2 ORDER BY 1, 2;

INSERT INTO product_sales_of_chain_sums
SELECT CASE WHEN day IS NOT NULL THEN 'day' WHEN month IS NOT NULL THEN 'month' ELSE 'all' END,
    coalesce(day, month, '0001-01-01'), product_id, sum(qty_sum), sum(revenue_sum)
FROM product_sales_daily, date(date_trunc('month', day::timestamp)) AS month
GROUP BY GROUPING SETS ((day, product_id), (month, product_id), (product_id)) ORDER BY 1, 2, 3;
"""


def load_purchases(url: str, first: datetime.date, last: datetime.date, loaded: Callable[[int], None]) -> None:
    """Sell from `first` to `last`; `loaded` is called with the number of items of each day."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(_MONTHS, {"first": first, "last": last})
    over = Event()

    def load_share(share: int) -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(SESSION)
            for number in range(share, (last - first).days + 1, LOADERS):
                if over.is_set():
                    return
                connection.execute(_DAY, {"day": first + number * DAY})
                loaded(ROWS_A_DAY)

    with ThreadPoolExecutor(LOADERS) as loaders:
        try:
            list(loaders.map(load_share, range(LOADERS)))
        finally:
            over.set()  # on Ctrl-C, nobody begins another day
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM (ANALYZE) purchases, purchase_items")


def load_read_models(
    url: str, purchases_url: str, first: datetime.date, last: datetime.date, loaded: Callable[[int], None]
) -> None:
    """Make the read models of the sales from `first` to `last`, by COPY from one database to the other."""
    with psycopg.connect(purchases_url) as source, psycopg.connect(url) as target:
        source.execute("SET work_mem = '256MB'; SET max_parallel_workers_per_gather = 0")
        target.execute("SET work_mem = '256MB'; SET synchronous_commit = off")
        start = first
        while start <= last:
            end = min((start.replace(day=1) + 32 * DAY).replace(day=1), last + DAY)
            for table, rows in _COPIES.items():
                _copy(source, target, table, rows, {"first": start, "next": end})
            loaded((end - start).days * ROWS_A_DAY)
            start = end
        columns = "customer_loyalty (customer_id, branch_id, purchases_count, last_purchase_at)"
        _copy(source, target, columns, _COPY_CUSTOMERS, {"first": first})
        target.execute(SUMS)
        target.execute(ROLL_UPS)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM (ANALYZE)")


def _copy(
    source: psycopg.Connection, target: psycopg.Connection, table: str, rows: str, parameters: dict[str, datetime.date]
) -> None:
    with source.cursor() as out, target.cursor() as into:
        query = psycopg.ClientCursor(source).mogrify(rows.encode(), parameters)
        with (
            out.copy(f"COPY ({query}) TO STDOUT".encode()) as reading,
            into.copy(f"COPY {table} FROM STDIN".encode()) as writing,
        ):
            for data in reading:
                writing.write(data)


def some_customers(url: str, count: int) -> list[str]:
    """Some who are known to the database."""
    with psycopg.connect(url) as connection:
        rows = connection.execute("SELECT customer_id::text FROM customer_loyalty_chain LIMIT %s", [count]).fetchall()
    return [customer_id for (customer_id,) in rows]
