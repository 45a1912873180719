"""What a rebuild reads and writes in its final transaction: this session's temporary tables against the real ones.

Every function takes the rebuild's connection and commits nothing.
"""

from collections.abc import Callable, Collection, Sequence
from datetime import date, datetime
from typing import LiteralString, NamedTuple

from analytics_svc.proof import read_models
from analytics_svc.proof.read_models import BY_DAY, replace
from chassis.postgres import Connection

FOREIGN_IDS_MAX = 1_000  # named; all are counted


class Foreign(NamedTuple):
    """Events that were counted without having been recorded: published by others, or lost by a restore there."""

    total: int
    event_ids: list[str]  # some of them


async def wrong_customers(connection: Connection, day: date, day_of: Callable[[datetime], date]) -> list[str]:
    """Customers whose rows contradict each other, or what they bought on that day."""
    cursor = await connection.execute(
        """
        SELECT customer_id::text FROM (
            SELECT customer_id, sum(purchases_count) AS purchases_count, max(last_purchase_at) AS last_purchase_at
            FROM public.customer_loyalty GROUP BY customer_id
        ) AS branches FULL JOIN public.customer_loyalty_chain AS chain USING (customer_id)
        WHERE (branches.purchases_count, branches.last_purchase_at)
            IS DISTINCT FROM (chain.purchases_count, chain.last_purchase_at)
        UNION
        SELECT customer_id::text
        FROM pg_temp.customer_loyalty AS fresh
        LEFT JOIN public.customer_loyalty AS stored USING (customer_id, branch_id)
        WHERE stored.last_purchase_at IS NULL OR stored.last_purchase_at < fresh.last_purchase_at
            OR stored.purchases_count < fresh.purchases_count
        """
    )
    wrong = {customer_id for (customer_id,) in await cursor.fetchall()}
    # Who came last on that day came then as often as the day says, and at no other time.
    cursor = await connection.execute(
        """
        SELECT customer_id::text, stored.last_purchase_at
        FROM public.customer_loyalty AS stored
        LEFT JOIN pg_temp.customer_loyalty AS fresh USING (customer_id, branch_id)
        WHERE stored.last_purchase_at >= %(day)s::date - 1 AND stored.last_purchase_at < %(day)s::date + 2
            AND stored.last_purchase_at IS DISTINCT FROM fresh.last_purchase_at
        """,
        {"day": day},
    )
    wrong |= {customer_id for customer_id, last in await cursor.fetchall() if day_of(last) == day}
    return sorted(wrong)


async def _wrong_products(connection: Connection) -> set[int]:
    """Products whose sums of all time are not those of the months, or of which the branches are not the chain."""
    cursor = await connection.execute(
        """
        SELECT product_id FROM (
            SELECT product_id,
                sum(qty_sum) FILTER (WHERE branch_id = 0) AS qty,
                sum(qty_sum) FILTER (WHERE branch_id > 0) AS branch_qty,
                sum(revenue_sum) FILTER (WHERE branch_id = 0) AS revenue,
                sum(revenue_sum) FILTER (WHERE branch_id > 0) AS branch_revenue
            FROM public.product_sales_totals GROUP BY product_id
        ) AS totals FULL JOIN (
            SELECT product_id, sum(qty_sum) AS qty, sum(revenue_sum) AS revenue
            FROM public.product_sales_monthly GROUP BY product_id
        ) AS months USING (product_id)
        WHERE (totals.qty, branch_qty, totals.revenue, branch_revenue)
            IS DISTINCT FROM (months.qty, months.qty, months.revenue, months.revenue)
        """
    )
    return {product_id for (product_id,) in await cursor.fetchall()}


async def replace_day(connection: Connection, day: date, customers: Sequence[str]) -> int:
    """Write what the day and the customers should be, then what follows from them; returns how many rows were wrong."""
    month = day.replace(day=1)
    values = {"day": day, "months": [month], "month": month, "customers": list(customers)}
    wrong = {model: await replace(connection, model, where="day = %(day)s", values=values) for model in BY_DAY}
    repaired = sum(map(len, wrong.values()))
    if customers:
        for model in read_models.CUSTOMERS:
            where = "customer_id = ANY (%(customers)s::uuid[])"
            repaired += len(await replace(connection, model, where=where, values=values))
    for model, should, where in (
        (read_models.MONTHLY_SALES_BY_BRANCH, read_models.OF_MONTHS, "month = %(month)s"),
        (read_models.PRODUCT_SALES_MONTHLY, read_models.PRODUCTS_OF_MONTHS, "month = %(month)s"),
        (read_models.SALES_TOTALS, read_models.OF_ALL_TIME, "true"),
    ):
        repaired += len(await replace(connection, model, should, where, values))
    products = {product_id for _, _, product_id in wrong[read_models.PRODUCT_SALES_DAILY]}
    products |= await _wrong_products(connection)
    if products:
        values = {"product_ids": sorted(products)}
        where = "product_id = ANY (%(product_ids)s)"
        should = read_models.SOME_PRODUCTS_OF_ALL_TIME
        repaired += len(await replace(connection, read_models.PRODUCT_SALES_TOTALS, should, where, values))
    return repaired


async def replace_all(connection: Connection, complete_from: date | None) -> dict[str, int]:
    if complete_from is None:
        return {model.name: len(await replace(connection, model)) for model in read_models.ALL}
    values = {"day": complete_from}
    repaired = {
        model.name: len(await replace(connection, model, where="day >= %(day)s", values=values)) for model in BY_DAY
    }
    for model, should in (
        (read_models.MONTHLY_SALES_BY_BRANCH, read_models.OF_MONTHS),
        (read_models.PRODUCT_SALES_MONTHLY, read_models.PRODUCTS_OF_ALL_MONTHS),
        (read_models.PRODUCT_SALES_TOTALS, read_models.PRODUCTS_OF_ALL_TIME),
        (read_models.SALES_TOTALS, read_models.OF_ALL_TIME),
    ):
        repaired[model.name] = len(await replace(connection, model, should))
    return repaired


async def suspects(connection: Connection, where: LiteralString, day: date) -> dict[str, str | None]:
    """Events of these days that count without having been exported, and the purchases that they announced."""
    cursor = await connection.execute(
        f"""
        SELECT event_id::text, purchase_id::text FROM public.analytics_event_log AS stored
        WHERE {where}
            AND NOT EXISTS (SELECT FROM pg_temp.analytics_event_log AS fresh WHERE fresh.event_id = stored.event_id)
            AND NOT EXISTS (SELECT FROM rebuild_tail AS late WHERE late.event_id = stored.event_id)
        """,
        {"day": day},
    )
    return dict(await cursor.fetchall())


async def take_out_foreign(connection: Connection, event_ids: Collection[str]) -> Foreign:
    """Note on which days the log's events count now; returns those of the given ones that count no more.

    Their ids stay: delivered again, they must not count, either.
    """
    await connection.execute(
        """
        INSERT INTO public.analytics_event_log (event_id, day, event_type)
        SELECT event_id, day, event_type FROM pg_temp.analytics_event_log AS fresh
        WHERE NOT EXISTS (SELECT FROM public.analytics_event_log AS stored WHERE stored.event_id = fresh.event_id)
            AND event_id >= coalesce((SELECT log_floor FROM freshness), '00000000-0000-0000-0000-000000000000')
        ORDER BY event_id
        """
    )
    await connection.execute(
        """
        UPDATE public.analytics_event_log AS stored SET day = fresh.day
        FROM pg_temp.analytics_event_log AS fresh
        WHERE stored.event_id = fresh.event_id AND stored.day IS DISTINCT FROM fresh.day
        """
    )
    cursor = await connection.execute(
        """
        UPDATE public.analytics_event_log AS stored SET day = NULL
        WHERE event_id = ANY (%s::uuid[])
            AND NOT EXISTS (SELECT FROM pg_temp.analytics_event_log AS fresh WHERE fresh.event_id = stored.event_id)
        RETURNING event_id::text
        """,
        [list(event_ids)],
    )
    event_ids = sorted(event_id for (event_id,) in await cursor.fetchall())
    return Foreign(len(event_ids), event_ids[:FOREIGN_IDS_MAX])
