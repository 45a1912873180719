"""The read models by name, and how one is made equal to what it should be."""

from collections.abc import Mapping
from typing import Any, LiteralString, NamedTuple

from chassis.postgres import Connection

SUMS: tuple[LiteralString, ...] = ("revenue_sum", "items_sum", "purchases_count", "purchases_with_customer_count")
SOLD: tuple[LiteralString, ...] = ("qty_sum", "revenue_sum")
VISITS: tuple[LiteralString, ...] = ("purchases_count", "last_purchase_at")


class ReadModel(NamedTuple):
    """A table whose rows follow from the purchases."""

    name: LiteralString
    key: tuple[LiteralString, ...]
    values: tuple[LiteralString, ...]


PRODUCT_SALES_DAILY = ReadModel("product_sales_daily", ("day", "branch_id", "product_id"), SOLD)
DAILY_SALES_BY_BRANCH = ReadModel("daily_sales_by_branch", ("day", "branch_id"), SUMS)
DAILY_SALES_OF_CHAIN = ReadModel("daily_sales_of_chain", ("day",), SUMS)
CUSTOMER_LOYALTY = ReadModel("customer_loyalty", ("customer_id", "branch_id"), VISITS)
CUSTOMER_LOYALTY_CHAIN = ReadModel("customer_loyalty_chain", ("customer_id",), VISITS)
MONTHLY_SALES_BY_BRANCH = ReadModel("monthly_sales_by_branch", ("branch_id", "month"), SUMS)
PRODUCT_SALES_MONTHLY = ReadModel("product_sales_monthly", ("month", "product_id"), SOLD)
PRODUCT_SALES_TOTALS = ReadModel("product_sales_totals", ("branch_id", "product_id"), SOLD)
SALES_TOTALS = ReadModel("sales_totals", ("branch_id",), (*SUMS, "unique_customers_count"))

BY_DAY = (PRODUCT_SALES_DAILY, DAILY_SALES_BY_BRANCH, DAILY_SALES_OF_CHAIN)
CUSTOMERS = (CUSTOMER_LOYALTY, CUSTOMER_LOYALTY_CHAIN)
ROLL_UPS = (MONTHLY_SALES_BY_BRANCH, PRODUCT_SALES_MONTHLY, PRODUCT_SALES_TOTALS, SALES_TOTALS)
ALL = (*BY_DAY, *CUSTOMERS, *ROLL_UPS)
LOG: LiteralString = "analytics_event_log"

# What the tables by day and by customer say that the roll-ups should hold; the narrower, the cheaper.
OF_CHAIN: LiteralString = """
    SELECT day, sum(revenue_sum) AS revenue_sum, sum(items_sum) AS items_sum, sum(purchases_count) AS purchases_count,
        sum(purchases_with_customer_count) AS purchases_with_customer_count
    FROM public.daily_sales_by_branch
    GROUP BY day
"""
OF_MONTHS: LiteralString = """
    SELECT coalesce(branch_id, 0) AS branch_id, month, sum(revenue_sum) AS revenue_sum, sum(items_sum) AS items_sum,
        sum(purchases_count) AS purchases_count, sum(purchases_with_customer_count) AS purchases_with_customer_count
    FROM public.daily_sales_by_branch, date(date_trunc('month', day::timestamp)) AS month
    GROUP BY GROUPING SETS ((branch_id, month), (month))
"""
PRODUCTS_OF_MONTHS: LiteralString = """
    SELECT month, product_id, sum(qty_sum) AS qty_sum, sum(revenue_sum) AS revenue_sum
    FROM unnest(%(months)s::date[]) AS month
    JOIN public.product_sales_daily ON day >= month AND day < month + interval '1 month'
    GROUP BY month, product_id
"""
PRODUCTS_OF_ALL_MONTHS: LiteralString = """
    SELECT month, product_id, sum(qty_sum) AS qty_sum, sum(revenue_sum) AS revenue_sum
    FROM public.product_sales_daily, date(date_trunc('month', day::timestamp)) AS month
    GROUP BY month, product_id
"""
PRODUCTS_OF_ALL_TIME: LiteralString = """
    SELECT coalesce(branch_id, 0) AS branch_id, product_id, sum(qty_sum) AS qty_sum, sum(revenue_sum) AS revenue_sum
    FROM public.product_sales_daily
    GROUP BY GROUPING SETS ((branch_id, product_id), (product_id))
"""
SOME_PRODUCTS_OF_ALL_TIME: LiteralString = """
    SELECT coalesce(branch_id, 0) AS branch_id, product_id, sum(qty_sum) AS qty_sum, sum(revenue_sum) AS revenue_sum
    FROM public.product_sales_daily
    WHERE product_id = ANY (%(product_ids)s)
    GROUP BY GROUPING SETS ((branch_id, product_id), (product_id))
"""
OF_ALL_TIME: LiteralString = """
    SELECT branch_id, revenue_sum, items_sum, purchases_count, purchases_with_customer_count,
        coalesce(customers, 0) AS unique_customers_count
    FROM (
        SELECT coalesce(branch_id, 0) AS branch_id, sum(revenue_sum) AS revenue_sum, sum(items_sum) AS items_sum,
            sum(purchases_count) AS purchases_count, sum(purchases_with_customer_count) AS purchases_with_customer_count
        FROM public.daily_sales_by_branch
        GROUP BY GROUPING SETS ((branch_id), ())
        HAVING count(*) > 0
    ) AS sums
    LEFT JOIN (
        SELECT branch_id, count(*) FROM public.customer_loyalty GROUP BY branch_id
        UNION ALL SELECT 0, count(*) FROM public.customer_loyalty_chain
    ) AS came (branch_id, customers) USING (branch_id)
"""


async def replace(
    connection: Connection,
    model: ReadModel,
    should: LiteralString | None = None,
    where: LiteralString = "true",
    values: Mapping[str, Any] | None = None,
) -> list[tuple[Any, ...]]:
    """Make the rows that fulfil `where` equal to those of `should`; returns the keys of the rows that were wrong.

    Without `should`, they are the rows of this session's temporary table of the same name. Only differences are
    written, so queries never see a gap, and what is right costs no more than a comparison.
    """
    fresh = f"({should})" if should else f"pg_temp.{model.name}"
    key, columns = ", ".join(model.key), ", ".join((*model.key, *model.values))
    old = ", ".join(f"stored.{column}" for column in model.values)
    new = ", ".join(f"fresh.{column}" for column in model.values)
    wrong = await connection.execute(
        f"""
        WITH fresh AS (SELECT {columns} FROM {fresh} AS fresh WHERE {where}),
        stored AS (SELECT {columns} FROM public.{model.name} AS stored WHERE {where}),
        wrong AS (
            SELECT {key}, {new}, fresh IS NULL AS surplus
            FROM stored FULL JOIN fresh USING ({key})
            WHERE ({old}) IS DISTINCT FROM ({new})
        ),
        deleted AS (
            DELETE FROM public.{model.name} AS stored USING wrong
            WHERE surplus AND ({", ".join(f"stored.{column}" for column in model.key)})
                = ({", ".join(f"wrong.{column}" for column in model.key)})
        ),
        written AS (
            INSERT INTO public.{model.name} ({columns})
            SELECT {columns} FROM wrong WHERE NOT surplus ORDER BY {key}
            ON CONFLICT ({key}) DO UPDATE SET
                {", ".join(f"{column} = excluded.{column}" for column in model.values)}
        )
        SELECT {key} FROM wrong
        """,
        values or {},
    )
    return await wrong.fetchall()
