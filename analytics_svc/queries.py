"""The questions that are answered, one function each. They read sums that are there already."""

from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any, LiteralString, NamedTuple

from psycopg import AsyncClientCursor

from chassis.postgres import Connection

COUNT_MAX = 2**62  # above every count of purchases
TOP_PRODUCTS_MAX = 1_000  # ties included: with many products that sold once, ties may be all of them


class Reader(NamedTuple):
    """A connection, and how long its caller waits for an answer."""

    connection: Connection
    timeout_ms: int


class Days(NamedTuple):
    """A range of business days, both inclusive."""

    first: date
    last: date


ALL_DAYS = Days(date.min, date.max)


class Freshness(NamedTuple):
    """How far an answer goes."""

    applied_at: datetime | None
    complete_through_at: datetime | None
    quarantined_count: int


class Answer(NamedTuple):
    rows: list[tuple[Any, ...]]
    freshness: Freshness


async def daily_sales(
    reader: Reader,
    days: Days,
    branch_ids: Sequence[int],
    *,
    after: tuple[date, int] | None,
    limit: int,
) -> Answer:
    """Rows of (day, branch, revenue, items, purchases, those with a customer), by day, then branch."""
    after_day, after_branch_id = after or (date.min, 0)
    return await _ask(
        reader,
        """
        SELECT day, branch_id, revenue_sum::text, items_sum, purchases_count, purchases_with_customer_count
        FROM daily_sales_by_branch
        WHERE day BETWEEN greatest(%(first)s, %(after_day)s) AND %(last)s
            AND (day, branch_id) > (%(after_day)s, %(after_branch_id)s)
            AND (branch_id = ANY (%(branch_ids)s::int[]) OR %(branch_ids)s::int[] = '{}')
        ORDER BY day, branch_id
        LIMIT %(limit)s
        """,
        {
            "first": days.first,
            "last": days.last,
            "branch_ids": list(branch_ids),
            "after_day": after_day,
            "after_branch_id": after_branch_id,
            "limit": limit,
        },
    )


async def product_sales(
    reader: Reader,
    days: Days,
    branch_ids: Sequence[int],
    product_ids: Sequence[int],
    *,
    after: tuple[date, int, int] | None,
    limit: int,
) -> Answer:
    """Rows of (day, branch, product, quantity, revenue), by day, branch, product."""
    after_day, after_branch_id, after_product_id = after or (date.min, 0, 0)
    return await _ask(
        reader,
        """
        SELECT day, branch_id, product_id, qty_sum, revenue_sum::text
        FROM product_sales_daily
        WHERE day BETWEEN greatest(%(first)s, %(after_day)s) AND %(last)s
            AND (day, branch_id, product_id) > (%(after_day)s, %(after_branch_id)s, %(after_product_id)s)
            AND (branch_id = ANY (%(branch_ids)s::int[]) OR %(branch_ids)s::int[] = '{}')
            AND (product_id = ANY (%(product_ids)s::int[]) OR %(product_ids)s::int[] = '{}')
        ORDER BY day, branch_id, product_id
        LIMIT %(limit)s
        """,
        {
            "first": days.first,
            "last": days.last,
            "branch_ids": list(branch_ids),
            "product_ids": list(product_ids),
            "after_day": after_day,
            "after_branch_id": after_branch_id,
            "after_product_id": after_product_id,
            "limit": limit,
        },
    )


async def top_products(
    reader: Reader,
    days: Days,
    branch_id: int | None,
    *,
    limit: int,
    by_revenue: bool,
    include_ties: bool,
) -> Answer:
    """Rows of (product, quantity, revenue), the best first. One above TOP_PRODUCTS_MAX when there are more ties."""
    return await _ask(
        reader,
        """
        WITH sold AS (
            SELECT product_id, sum(qty_sum) AS quantity, sum(revenue_sum) AS revenue
            FROM product_sales_daily
            WHERE day BETWEEN %(first)s AND %(last)s AND (branch_id = %(branch_id)s OR %(branch_id)s::int IS NULL)
            GROUP BY product_id
        ), measured AS (
            SELECT *, CASE WHEN %(by_revenue)s THEN revenue ELSE quantity END AS measure FROM sold
        ), ranked AS (
            SELECT *, rank() OVER (ORDER BY measure DESC) AS place, -- equal products have the same
                row_number() OVER (ORDER BY measure DESC, product_id) AS position
            FROM measured
        )
        SELECT product_id, quantity::bigint, revenue::text
        FROM ranked
        WHERE CASE WHEN %(include_ties)s THEN place ELSE position END <= %(limit)s
        ORDER BY position
        LIMIT %(most)s
        """,
        {
            "first": days.first,
            "last": days.last,
            "branch_id": branch_id,
            "by_revenue": by_revenue,
            "include_ties": include_ties,
            "limit": limit,
            "most": TOP_PRODUCTS_MAX + 1,
        },
    )


async def loyal_customers(
    reader: Reader,
    purchases_min: int,
    branch_id: int | None,
    *,
    after: tuple[int, str] | None,
    limit: int,
) -> Answer:
    """Rows of (customer, purchases, time of the latest), most purchases first, then by customer.

    `after` is the last row's (purchases, customer). Counts are negative in the comparison as they are in the index:
    that makes the order one ascending pair, in which a page starts where the previous one ended.
    """
    after_count, after_customer_id = after or (COUNT_MAX, "00000000-0000-0000-0000-000000000000")
    parameters = {
        "purchases_min": purchases_min,
        "after_count": after_count,
        "after_customer_id": after_customer_id,
        "limit": limit,
    }
    if branch_id is None:
        return await _ask(
            reader,
            """
            SELECT customer_id::text, purchases_count, last_purchase_at
            FROM customer_loyalty_chain AS loyal
            WHERE -purchases_count <= -%(purchases_min)s
                AND (-purchases_count, customer_id) > (-%(after_count)s, %(after_customer_id)s::uuid)
            ORDER BY -purchases_count, loyal.customer_id -- not the text of that name above
            LIMIT %(limit)s
            """,
            parameters,
        )
    return await _ask(
        reader,
        """
        SELECT customer_id::text, purchases_count, last_purchase_at
        FROM customer_loyalty AS loyal
        WHERE branch_id = %(branch_id)s AND -purchases_count <= -%(purchases_min)s
            AND (-purchases_count, customer_id) > (-%(after_count)s, %(after_customer_id)s::uuid)
        ORDER BY -purchases_count, loyal.customer_id
        LIMIT %(limit)s
        """,
        {**parameters, "branch_id": branch_id},
    )


async def customer_loyalty(reader: Reader, customer_id: str) -> Answer:
    """Rows of (branch, purchases, time of the latest), by branch; none for an unknown customer."""
    return await _ask(
        reader,
        """
        SELECT branch_id, purchases_count, last_purchase_at
        FROM customer_loyalty
        WHERE customer_id = %(customer_id)s
        ORDER BY branch_id
        """,
        {"customer_id": customer_id},
    )


async def sales_summary(reader: Reader, days: Days | None, branch_id: int | None) -> Answer:
    """One row of (revenue, items, purchases, unique customers); those are None for a range of days."""
    if days is None:
        return await _ask(
            reader,
            """
            SELECT coalesce(sum(revenue_sum), 0.00)::text, coalesce(sum(items_sum), 0)::bigint,
                coalesce(sum(purchases_count), 0)::bigint, coalesce(sum(unique_customers_count), 0)::bigint
            FROM sales_totals -- one row, or none before the first purchase
            WHERE branch_id = coalesce(%(branch_id)s, 0) -- 0 is the whole chain
            """,
            {"branch_id": branch_id},
        )
    return await _ask(
        reader,
        """
        SELECT coalesce(sum(revenue_sum), 0.00)::text, coalesce(sum(items_sum), 0)::bigint,
            coalesce(sum(purchases_count), 0)::bigint, NULL
        FROM daily_sales_by_branch
        WHERE day BETWEEN %(first)s AND %(last)s AND (branch_id = %(branch_id)s OR %(branch_id)s::int IS NULL)
        """,
        {"first": days.first, "last": days.last, "branch_id": branch_id},
    )


async def page_token_key(connection: Connection) -> bytes:
    """The secret that signs page tokens, the same for all servers of this database."""
    row = await (await connection.execute("SELECT page_token_key FROM analytics_settings")).fetchone()
    assert row is not None  # checked at the start of the process
    key: bytes = row[0]
    return key


async def _ask(reader: Reader, question: LiteralString, parameters: Mapping[str, Any]) -> Answer:
    """Read the answer and its freshness from one snapshot.

    Statements sent as one message are one transaction and one round trip, at a third of the cost of BEGIN, SET, two
    SELECTs and COMMIT. Such a message has no parameters of its own, so the client quotes them into the text.
    """
    cursor = AsyncClientCursor(reader.connection)
    await cursor.execute(
        "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY;"
        "SET LOCAL statement_timeout = %(timeout_ms)s;"
        "SELECT applied_at, complete_through_at, quarantined_count FROM freshness;" + question,
        {"timeout_ms": reader.timeout_ms, **parameters},
    )
    freshness = await (await cursor.set_result(-2)).fetchone()
    assert freshness is not None  # made by the migration, never deleted
    return Answer(await (await cursor.set_result(-1)).fetchall(), Freshness(*freshness))
