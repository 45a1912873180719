"""The questions that are answered, one function each. They read sums that are there already.

How many rows an answer reads depends on what is asked, not on how much history there is: a range of days is made of
whole months, from the roll-ups, and the days at its ends. Branch 0 of a roll-up is the whole chain.

The chain's products are in two places, as the view has them: sums, and what was sold in the last moment.
"""

from calendar import monthrange
from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta
from functools import lru_cache
from typing import Any, LiteralString, NamedTuple

from chassis.postgres import Connection

DAY = timedelta(days=1)
COUNT_MAX = 2**62  # above every count of purchases
TOP_PRODUCTS_MAX = 1_000  # ties included: with many products that sold once, ties may be all of them
LOYAL_COUNT_MAX = 100_000  # of a chain with more, it is enough to know that there are more


class Days(NamedTuple):
    """A range of business days, both inclusive; empty when the last is before the first."""

    first: date
    last: date


ALL_DAYS = Days(date.min, date.max)
NO_DAYS = Days(date.max, date.min)


class Parts(NamedTuple):
    """A range of days as whole months, and the days at either end that they lack (1) or have too much (-1)."""

    months: Days  # first days of months
    start: Days
    start_sign: int
    end: Days
    end_sign: int


def parts(days: Days) -> Parts:
    """Make a range of as many whole months as possible, so that at most half a month of days remains at either end."""
    first_month, last_month = _bounds(days.first), _bounds(days.last)
    before = Days(first_month.first, days.first - DAY) if days.first > first_month.first else NO_DAYS
    behind = Days(days.last + DAY, last_month.last) if days.last < last_month.last else NO_DAYS
    if first_month == last_month:
        if _length(before) + _length(behind) < _length(days):
            return Parts(Days(first_month.first, first_month.first), before, -1, behind, -1)
        return Parts(NO_DAYS, days, 1, NO_DAYS, 1)
    start, end = Days(days.first, first_month.last), Days(last_month.first, days.last)
    months_first, months_last = first_month.first, last_month.first
    start_sign = end_sign = -1
    if _length(start) < _length(before):
        months_first, before, start_sign = first_month.last + DAY, start, 1
    if _length(end) < _length(behind):
        months_last, behind, end_sign = _bounds(last_month.first - DAY).first, end, 1
    return Parts(Days(months_first, months_last), before, start_sign, behind, end_sign)


def _bounds(day: date) -> Days:
    return _bounds_of(day.year, day.month)


@lru_cache(1_000)  # years of months; the calendar takes longer than all else here
def _bounds_of(year: int, month: int) -> Days:
    return Days(date(year, month, 1), date(year, month, monthrange(year, month)[1]))


def _length(days: Days) -> int:
    return max((days.last - days.first).days + 1, 0)


def _parameters(days: Days) -> dict[str, date | int]:
    months, start, start_sign, end, end_sign = parts(days)
    return {
        "months_first": months.first,
        "months_last": months.last,
        "start_first": start.first,
        "start_last": start.last,
        "start_sign": start_sign,
        "end_first": end.first,
        "end_last": end.last,
        "end_sign": end_sign,
    }


class Freshness(NamedTuple):
    """How far an answer goes."""

    applied_at: datetime | None
    complete_through_at: datetime | None
    quarantined_count: int
    furthest_behind: str  # the cell that complete_through_at waits for; empty where there is one


class Answer(NamedTuple):
    rows: list[tuple[Any, ...]]
    freshness: Freshness


async def daily_sales(
    connection: Connection,
    days: Days,
    branch_ids: Sequence[int],
    *,
    after: tuple[date, int] | None,
    limit: int,
) -> Answer:
    """Rows of (day, branch, revenue, items, purchases, those with a customer), by day, then branch."""
    after_day, after_branch_id = after or (days.first, 0)
    return await _ask(
        connection,
        """
        SELECT day, branch_id, revenue_sum::text, items_sum, purchases_count, purchases_with_customer_count
        FROM daily_sales_by_branch
        WHERE day BETWEEN %(after_day)s AND %(last)s AND (day, branch_id) > (%(after_day)s, %(after_branch_id)s)
        """
        + _filter("branch_id", branch_ids)
        + "ORDER BY day, branch_id LIMIT %(limit)s",
        "day, branch_id",
        {
            "last": days.last,
            "branch_id": _ids(branch_ids),
            "after_day": after_day,
            "after_branch_id": after_branch_id,
            "limit": limit,
        },
    )


async def product_sales(
    connection: Connection,
    days: Days,
    branch_ids: Sequence[int],
    product_ids: Sequence[int],
    *,
    after: tuple[date, int, int] | None,
    limit: int,
) -> Answer:
    """Rows of (day, branch, product, quantity, revenue), by day, branch, product."""
    after_day, after_branch_id, after_product_id = after or (days.first, 0, 0)
    in_range: LiteralString = "day BETWEEN %(after_day)s AND %(last)s"
    not_before: LiteralString = ""
    if after:
        not_before = "AND (day, branch_id, product_id) > (%(after_day)s, %(after_branch_id)s, %(after_product_id)s)"
    products = _filter("product_id", product_ids)
    source: LiteralString
    if branch_ids:
        # Through the days on which the branches were open: their rows are thinly spread over the index.
        source = f"""
            (SELECT day, branch_id FROM daily_sales_by_branch WHERE {in_range} {_filter("branch_id", branch_ids)})
                AS calendar
            CROSS JOIN LATERAL (
                SELECT product_id, qty_sum, revenue_sum FROM product_sales_daily AS sold
                WHERE sold.day = calendar.day AND sold.branch_id = calendar.branch_id {products} {not_before}
                ORDER BY product_id LIMIT %(limit)s
            ) AS sold
            """
    elif len(product_ids) > 1:
        source = f"""
            (SELECT day FROM daily_sales_of_chain WHERE {in_range}) AS calendar
            CROSS JOIN LATERAL (
                SELECT branch_id, product_id, qty_sum, revenue_sum FROM product_sales_daily AS sold
                WHERE sold.day = calendar.day AND product_id = ANY (ARRAY(
                    SELECT DISTINCT product_id FROM product_sales_of_chain WHERE period = 'all' {products}
                )) {not_before}
                ORDER BY branch_id, product_id LIMIT %(limit)s
            ) AS sold
            """
    else:
        source = f"product_sales_daily WHERE {in_range} {products} {not_before}"
    return await _ask(
        connection,
        f"""
        SELECT day, branch_id, product_id, qty_sum, revenue_sum::text FROM {source}
        ORDER BY day, branch_id, product_id LIMIT %(limit)s
        """,
        "day, branch_id, product_id",
        prepare=False,  # the best plan depends on how many ids and days are asked for
        parameters={
            "last": days.last,
            "branch_id": _ids(branch_ids),
            "product_id": _ids(product_ids),
            "after_day": after_day,
            "after_branch_id": after_branch_id,
            "after_product_id": after_product_id,
            "limit": limit,
        },
    )


async def top_products(
    connection: Connection,
    days: Days | None,
    branch_id: int | None,
    *,
    limit: int,
    by_revenue: bool,
    include_ties: bool,
) -> Answer:
    """Rows of (product, quantity, revenue), the best first. One above TOP_PRODUCTS_MAX when there are more ties."""
    sold: LiteralString
    if days is None and branch_id is None:
        sold = "SELECT product_id, qty_sum, revenue_sum FROM product_sales_of_chain WHERE period = 'all'"
        ranges: Mapping[str, date | int] = {}
    elif days is None:
        sold = "SELECT product_id, qty_sum, revenue_sum FROM product_sales_totals WHERE branch_id = %(branch_id)s"
        ranges = {}
    elif branch_id is None:
        sold = """
            SELECT product_id, qty_sum, revenue_sum FROM product_sales_of_chain
            WHERE period = 'month' AND first_day BETWEEN %(months_first)s AND %(months_last)s
            UNION ALL SELECT product_id, %(start_sign)s * qty_sum, %(start_sign)s * revenue_sum
            FROM product_sales_of_chain
            WHERE period = 'day' AND first_day BETWEEN %(start_first)s AND %(start_last)s
            UNION ALL SELECT product_id, %(end_sign)s * qty_sum, %(end_sign)s * revenue_sum
            FROM product_sales_of_chain WHERE period = 'day' AND first_day BETWEEN %(end_first)s AND %(end_last)s
            """
        ranges = _parameters(days)
    else:
        # By way of the branch's days: its products are thinly spread over the primary key.
        sold = """
            SELECT product_id, product.qty_sum, product.revenue_sum
            FROM daily_sales_by_branch AS daily JOIN product_sales_daily AS product USING (day, branch_id)
            WHERE daily.branch_id = %(branch_id)s AND day BETWEEN %(first)s AND %(last)s
            """
        ranges = days._asdict()
    measure: LiteralString = "revenue" if by_revenue else "quantity"
    best: LiteralString = (
        f"ORDER BY {measure} DESC FETCH FIRST (%(limit)s) ROWS WITH TIES"
        if include_ties
        else f"ORDER BY {measure} DESC, product_id LIMIT %(limit)s"
    )
    return await _ask(
        connection,
        f"""
        SELECT product_id, quantity::bigint, revenue::text, {measure} AS measure
        FROM (
            SELECT product_id, sum(qty_sum) AS quantity, sum(revenue_sum) AS revenue
            FROM ({sold}) AS sold
            GROUP BY product_id
            HAVING sum(qty_sum) > 0 -- of what is sold on other days of a month, nothing is left
            {best}
        ) AS best
        ORDER BY measure DESC, product_id LIMIT {TOP_PRODUCTS_MAX + 1}
        """,
        "measure DESC, product_id",
        {"branch_id": branch_id, "limit": limit, **ranges},
    )


async def loyal_customers(
    connection: Connection,
    purchases_min: int,
    branch_id: int | None,
    *,
    after: tuple[int, str] | None,
    limit: int,
    with_total: bool = False,
) -> Answer:
    """Rows of (customer, purchases, time of the latest), most purchases first, then by customer; `with_total`, each
    has the number of all that match, up to LOYAL_COUNT_MAX, in a fourth column.

    `after` is the last row's (purchases, customer). Counts are negative in the comparison as they are in the index:
    that makes the order one ascending pair, in which a page starts where the previous one ended.
    """
    after_count, after_customer_id = after or (COUNT_MAX, "00000000-0000-0000-0000-000000000000")
    source: LiteralString = (
        "customer_loyalty_chain AS loyal WHERE"
        if branch_id is None
        else "customer_loyalty AS loyal WHERE branch_id = %(branch_id)s AND"
    )
    total: LiteralString = f"""
        , (SELECT count(*) FROM
            (SELECT FROM {source} -purchases_count <= -%(purchases_min)s LIMIT {LOYAL_COUNT_MAX}) AS matching)
        """
    return await _ask(
        connection,
        f"""
        SELECT customer_id::text, purchases_count, last_purchase_at {total if with_total else ""}
        FROM {source} -purchases_count <= -%(purchases_min)s
            AND (-purchases_count, customer_id) > (-%(after_count)s, %(after_customer_id)s::uuid)
        ORDER BY -purchases_count, loyal.customer_id -- not the text of that name above
        LIMIT %(limit)s
        """,
        '-purchases_count, customer_id COLLATE "C"',
        {
            "branch_id": branch_id,
            "purchases_min": purchases_min,
            "after_count": after_count,
            "after_customer_id": after_customer_id,
            "limit": limit,
        },
    )


async def customer_loyalty(connection: Connection, customer_id: str) -> Answer:
    """Rows of (branch, purchases, time of the latest), by branch; none for an unknown customer."""
    return await _ask(
        connection,
        "SELECT branch_id, purchases_count, last_purchase_at FROM customer_loyalty WHERE customer_id = %(customer_id)s",
        "branch_id",
        {"customer_id": customer_id},
    )


async def sales_summary(connection: Connection, days: Days | None, branch_id: int | None) -> Answer:
    """One row of (revenue, items, purchases, unique customers); those are None for a range of days."""
    if days is None:
        return await _ask(
            connection,
            """
            SELECT coalesce(sum(revenue_sum), 0.00)::text, coalesce(sum(items_sum), 0)::bigint,
                coalesce(sum(purchases_count), 0)::bigint, coalesce(sum(unique_customers_count), 0)::bigint
            FROM sales_totals -- one row, or none before the first purchase
            WHERE branch_id = %(branch_id)s
            """,
            "1",
            {"branch_id": branch_id or 0},
        )
    daily: LiteralString = (
        "daily_sales_of_chain WHERE"
        if branch_id is None
        else "daily_sales_by_branch WHERE branch_id = %(branch_id)s AND"
    )
    return await _ask(
        connection,
        f"""
        SELECT coalesce(sum(sign * revenue_sum), 0.00)::text, coalesce(sum(sign * items_sum), 0)::bigint,
            coalesce(sum(sign * purchases_count), 0)::bigint, NULL
        FROM (
            SELECT 1 AS sign, revenue_sum, items_sum, purchases_count FROM monthly_sales_by_branch
            WHERE branch_id = %(branch_id)s AND month BETWEEN %(months_first)s AND %(months_last)s
            UNION ALL SELECT %(start_sign)s, revenue_sum, items_sum, purchases_count
            FROM {daily} day BETWEEN %(start_first)s AND %(start_last)s
            UNION ALL SELECT %(end_sign)s, revenue_sum, items_sum, purchases_count
            FROM {daily} day BETWEEN %(end_first)s AND %(end_last)s
        ) AS part
        """,
        "1",
        {"branch_id": branch_id or 0, **_parameters(days)},
    )


def _filter(column: LiteralString, ids: Sequence[int]) -> LiteralString:
    """A condition with the parameter of the column's name. One id is told apart: it has an order of its own."""
    return f"AND {column} = ANY (%({column})s) " if len(ids) > 1 else f"AND {column} = %({column})s " if ids else ""


def _ids(ids: Sequence[int]) -> Sequence[int] | int | None:
    return list(ids) if len(ids) > 1 else ids[0] if ids else None


async def _ask(
    connection: Connection,
    question: LiteralString,
    order: LiteralString,
    parameters: Mapping[str, Any],
    *,
    prepare: bool = True,
) -> Answer:
    """Read the answer and its freshness with one statement: one round trip, and one snapshot."""
    cursor = await connection.execute(
        f"""
        SELECT answer.*, applied_at, complete_through_at, quarantined_count, furthest_behind
        FROM freshness LEFT JOIN ({question}) AS answer ON true
        ORDER BY {order}
        """,
        parameters,
        prepare=prepare,
    )
    rows = await cursor.fetchall()
    # An empty answer comes as one row without values.
    return Answer([row[:-4] for row in rows] if rows[0][0] is not None else [], Freshness(*rows[0][-4:]))
