"""What the read models say about each other: most rows can be told from others, and a wrong one contradicts them.

All are written in the same transactions, so each of these statements must find nothing, under any load. They do not
know what was recorded: that is `audit`'s part.
"""

from collections.abc import AsyncIterator, Sequence
from datetime import date
from typing import Any, LiteralString, NamedTuple

from analytics_svc.proof import read_models
from analytics_svc.proof.read_models import SOLD, VISITS
from chassis.postgres import Pool

NAMED_MAX = 20  # rows of one check


class Finding(NamedTuple):
    """A row, or a sum of rows, of a read model that another one contradicts."""

    table: str
    key: str  # such as `day 2026-03-01, branch_id 2`
    detail: str
    day: date | None  # rebuilding this day repairs it; None: the last day does, or any


class _Check(NamedTuple):
    table: str
    key: tuple[LiteralString, ...]
    values: tuple[LiteralString, ...]
    stored: LiteralString
    should: LiteralString
    says: str  # who contradicts


def _table(model: read_models.ReadModel, should: LiteralString, says: str, where: LiteralString = "true") -> _Check:
    return _Check(model.name, model.key, model.values, f"SELECT * FROM public.{model.name} WHERE {where}", should, says)


_OF_DAYS = (
    _Check(
        "product_sales_daily",
        ("day", "branch_id"),
        ("items_sum", "revenue_sum"),
        """
        SELECT day, branch_id, sum(qty_sum) AS items_sum, sum(revenue_sum) AS revenue_sum
        FROM product_sales_daily WHERE day = ANY (%(days)s) GROUP BY day, branch_id
        """,
        "SELECT day, branch_id, items_sum, revenue_sum FROM daily_sales_by_branch WHERE day = ANY (%(days)s)",
        "daily_sales_by_branch",
    ),
    _Check(
        "analytics_event_log",
        ("day",),
        ("purchases_count",),
        """
        SELECT day, count(*) AS purchases_count
        FROM analytics_event_log WHERE day = ANY (%(logged_days)s) GROUP BY day
        """,
        "SELECT day, purchases_count FROM daily_sales_of_chain WHERE day = ANY (%(logged_days)s)",
        "daily_sales_of_chain",
    ),
    _table(
        read_models.PRODUCT_SALES_MONTHLY,
        read_models.PRODUCTS_OF_MONTHS,
        "product_sales_daily",
        "month = ANY (%(months)s)",
    ),
)
_OF_ALL = (
    _table(read_models.DAILY_SALES_OF_CHAIN, read_models.OF_CHAIN, "daily_sales_by_branch"),
    _table(read_models.MONTHLY_SALES_BY_BRANCH, read_models.OF_MONTHS, "daily_sales_by_branch"),
    _table(read_models.SALES_TOTALS, read_models.OF_ALL_TIME, "daily_sales_by_branch and the customers' rows"),
    _Check(
        "product_sales_totals",
        ("product_id",),
        SOLD,
        "SELECT product_id, qty_sum, revenue_sum FROM product_sales_totals WHERE branch_id = 0",
        """
        SELECT product_id, sum(qty_sum) AS qty_sum, sum(revenue_sum) AS revenue_sum
        FROM product_sales_monthly GROUP BY product_id
        """,
        "product_sales_monthly",
    ),
    _Check(
        "product_sales_totals",
        ("product_id",),
        SOLD,
        """
        SELECT product_id, sum(qty_sum) AS qty_sum, sum(revenue_sum) AS revenue_sum
        FROM product_sales_totals WHERE branch_id > 0 GROUP BY product_id
        """,
        "SELECT product_id, qty_sum, revenue_sum FROM product_sales_totals WHERE branch_id = 0",
        "the chain's row",
    ),
    _Check(
        "customer_loyalty",
        ("customer_id",),
        VISITS,
        """
        SELECT customer_id, sum(purchases_count) AS purchases_count, max(last_purchase_at) AS last_purchase_at
        FROM customer_loyalty GROUP BY customer_id
        """,
        "SELECT customer_id, purchases_count, last_purchase_at FROM customer_loyalty_chain",
        "customer_loyalty_chain",
    ),
    _Check(
        "customer_loyalty",
        ("branch_id",),
        ("purchases_count",),
        "SELECT branch_id, sum(purchases_count) AS purchases_count FROM customer_loyalty GROUP BY branch_id",
        """
        SELECT branch_id, purchases_with_customer_count AS purchases_count
        FROM sales_totals WHERE branch_id > 0 AND purchases_with_customer_count > 0
        """,
        "sales_totals",
    ),
    _Check(
        "freshness",
        ("only_row",),
        ("quarantined_count",),
        "SELECT only_row, quarantined_count FROM freshness",
        "SELECT true AS only_row, count(*) AS quarantined_count FROM quarantined_events",
        "quarantined_events",
    ),
)
_OF_WHOLE_HISTORY = (_table(read_models.PRODUCT_SALES_TOTALS, read_models.PRODUCTS_OF_ALL_TIME, "product_sales_daily"),)


async def find(
    pool: Pool, days: Sequence[date], logged_days: Sequence[date], *, whole_history: bool = False
) -> AsyncIterator[list[Finding]]:
    """One check after the other: those of the days, and all whose cost does not grow with the days' sales.

    `logged_days` are those of them whose events are all in the log. `whole_history` adds the check that reads every
    product row.
    """
    months = sorted({day.replace(day=1) for day in days})
    values = {"days": list(days), "logged_days": list(logged_days), "months": months}
    for check in (*_OF_DAYS, *_OF_ALL, *(_OF_WHOLE_HISTORY if whole_history else ())):
        yield await _run(pool, check, values)


async def _run(pool: Pool, check: _Check, values: dict[str, Any]) -> list[Finding]:
    key = ", ".join(check.key)
    stored = ", ".join(f"stored.{column}" for column in check.values)
    should = ", ".join(f"should.{column}" for column in check.values)
    async with pool.connection() as connection:
        cursor = await connection.execute(
            f"""
            SELECT {key}, {stored}, {should}
            FROM ({check.stored}) AS stored FULL JOIN ({check.should}) AS should USING ({key})
            WHERE ({stored}) IS DISTINCT FROM ({should})
            ORDER BY {key}
            LIMIT {NAMED_MAX}
            """,
            values,
        )
        rows = await cursor.fetchall()
    return [_finding(check, row) for row in rows]


def _finding(check: _Check, row: tuple[Any, ...]) -> Finding:
    keys, values = row[: len(check.key)], row[len(check.key) :]
    named = dict(zip(check.key, keys, strict=True))
    pairs = zip(check.values, values[: len(check.values)], values[len(check.values) :], strict=True)
    differences = [
        f"{column} {_text(stored)}, not {_text(should)}" for column, stored, should in pairs if stored != should
    ]
    return Finding(
        check.table,
        ", ".join(f"{column} {value}" for column, value in named.items()),
        f"{'; '.join(differences)}, says {check.says}",
        named.get("day") or named.get("month"),
    )


def _text(value: Any) -> str:
    return "missing" if value is None else str(value)
