"""What each read model must hold: the one description that audit, repair and rebuild go by.

Two tables follow from the recorded purchases, day by day (`day.py`): what branches and what products sold. The event
log follows from them, too. All other tables follow from these three, within a range of their keys.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, LiteralString, NamedTuple

from analytics_svc.proof.verdicts import Finding
from chassis.postgres import Connection

DAY, CUSTOMERS, PRODUCTS, BRANCHES = "day", "customers", "products", "branches"  # by what ranges are cut
COLUMNS: dict[str, LiteralString] = {
    DAY: "day",
    CUSTOMERS: "customer_id",
    PRODUCTS: "product_id",
    BRANCHES: "branch_id",
}
NAMED_MAX = 20  # wrong rows of a model in one range that are named; all are counted

SUMS: tuple[LiteralString, ...] = ("revenue_sum", "items_sum", "purchases_count", "purchases_with_customer_count")
SOLD: tuple[LiteralString, ...] = ("qty_sum", "revenue_sum")
VISITS: tuple[LiteralString, ...] = ("purchases_count", "last_purchase_at")
_SUM_SUMS: LiteralString = """
    sum(revenue_sum) AS revenue_sum, sum(items_sum) AS items_sum, sum(purchases_count) AS purchases_count,
    sum(purchases_with_customer_count) AS purchases_with_customer_count
"""
_SUM_SOLD: LiteralString = "sum(qty_sum) AS qty_sum, sum(revenue_sum) AS revenue_sum"
_MONTH: LiteralString = "date(date_trunc('month', day::timestamp))"


class ReadModel(NamedTuple):
    """A table whose rows follow from others."""

    name: LiteralString
    key: tuple[LiteralString, ...]
    values: tuple[LiteralString, ...]
    kind: LiteralString  # its ranges are from %(first)s to %(last)s, both included, of this:
    cut: LiteralString = ""  # expression of its key
    should: LiteralString = ""  # the rows that it must have within such a range
    says: LiteralString = "say the purchases"
    # Where a repair writes, when `name` is a view that has some rows in several parts.
    table: LiteralString = ""

    @property
    def written(self) -> LiteralString:
        return self.table or self.name

    def stored(self) -> LiteralString:
        """The rows that it has within a range."""
        rows: LiteralString = f"SELECT * FROM {self.name} WHERE {self.cut}"
        if not self.table:
            return rows
        key: LiteralString = ", ".join(self.key)
        sums: LiteralString = ", ".join(f"sum({name}) AS {name}" for name in self.values)
        return f"SELECT {key}, {sums} FROM {self.name} WHERE {self.cut} GROUP BY {key}"


DAILY_SALES_BY_BRANCH = ReadModel(
    "daily_sales_by_branch",
    ("day", "branch_id"),
    SUMS,
    DAY,
)
PRODUCT_SALES_DAILY = ReadModel(
    "product_sales_daily",
    ("day", "branch_id", "product_id"),
    SOLD,
    DAY,
)
DAILY_SALES_OF_CHAIN = ReadModel(
    "daily_sales_of_chain",
    ("day",),
    SUMS,
    DAY,
    "day BETWEEN %(first)s::date AND %(last)s::date",
    f"""
    SELECT day, {_SUM_SUMS} FROM daily_sales_by_branch
    WHERE day BETWEEN %(first)s::date AND %(last)s::date GROUP BY day
    """,
    "says daily_sales_by_branch",
)
# Of a day whose purchases are past their retention, nobody knows more than whether these two say the same.
PRODUCTS_AND_SUMS = ReadModel(
    "daily_sales_by_branch",
    ("day", "branch_id"),
    ("revenue_sum", "items_sum"),
    DAY,
    "day BETWEEN %(first)s::date AND %(last)s::date",
    """
    SELECT day, branch_id, sum(revenue_sum) AS revenue_sum, sum(qty_sum) AS items_sum FROM product_sales_daily
    WHERE day BETWEEN %(first)s::date AND %(last)s::date GROUP BY day, branch_id
    """,
    "says product_sales_daily",
)
_BRANCHES: LiteralString = "branch_id BETWEEN %(first)s::bigint AND %(last)s::bigint"
MONTHLY_SALES_BY_BRANCH = ReadModel(
    "monthly_sales_by_branch",
    ("branch_id", "month"),
    SUMS,
    BRANCHES,
    _BRANCHES,
    f"""
    SELECT branch_id, {_MONTH} AS month, {_SUM_SUMS} FROM daily_sales_by_branch WHERE {_BRANCHES} GROUP BY 1, 2
    UNION ALL
    SELECT 0, {_MONTH}, {_SUM_SUMS} FROM daily_sales_of_chain WHERE %(first)s::bigint = 0 GROUP BY 2
    """,
    "say the days",
)
SALES_TOTALS = ReadModel(
    "sales_totals",
    ("branch_id",),
    (*SUMS, "unique_customers_count"),
    BRANCHES,
    _BRANCHES,
    f"""
    SELECT sums.*, coalesce(customers, 0) AS unique_customers_count
    FROM (
        SELECT branch_id, {_SUM_SUMS} FROM daily_sales_by_branch WHERE {_BRANCHES} GROUP BY branch_id
        UNION ALL
        SELECT 0, {_SUM_SUMS} FROM daily_sales_of_chain WHERE %(first)s::bigint = 0 HAVING count(*) > 0
    ) AS sums
    LEFT JOIN (
        SELECT branch_id, count(*) FROM customer_loyalty WHERE {_BRANCHES} GROUP BY branch_id
        UNION ALL
        SELECT 0, count(*) FROM customer_loyalty_chain WHERE %(first)s::bigint = 0
    ) AS came (branch_id, customers) USING (branch_id)
    """,
    "say the days and the customers' rows",
)
_PRODUCTS: LiteralString = "product_id BETWEEN %(first)s::bigint AND %(last)s::bigint"
PRODUCT_SALES_OF_CHAIN = ReadModel(
    "product_sales_of_chain",
    ("period", "first_day", "product_id"),
    SOLD,
    PRODUCTS,
    _PRODUCTS,
    f"""
    SELECT CASE WHEN day IS NOT NULL THEN 'day' WHEN month IS NOT NULL THEN 'month' ELSE 'all' END AS period,
        coalesce(day, month, '0001-01-01') AS first_day, product_id, {_SUM_SOLD}
    FROM product_sales_daily, {_MONTH} AS month WHERE {_PRODUCTS}
    GROUP BY GROUPING SETS ((day, product_id), (month, product_id), (product_id))
    """,
    "says product_sales_daily",
    table="product_sales_of_chain_sums",
)
PRODUCT_SALES_TOTALS = ReadModel(
    "product_sales_totals",
    ("branch_id", "product_id"),
    SOLD,
    PRODUCTS,
    _PRODUCTS,
    f"""
    SELECT branch_id, product_id, {_SUM_SOLD} FROM product_sales_daily WHERE {_PRODUCTS}
    GROUP BY branch_id, product_id
    """,
    "says product_sales_daily",
)
_CUSTOMERS: LiteralString = "customer_id BETWEEN %(first)s::uuid AND %(last)s::uuid"
_VISITS: LiteralString = f"""
    SELECT customer_id, branch_id, count(*) AS purchases_count, max(purchase_time) AS last_purchase_at
    FROM analytics_event_log WHERE customer_id IS NOT NULL AND day IS NOT NULL AND {_CUSTOMERS} GROUP BY 1, 2
    UNION ALL
    SELECT customer_id, branch_id, purchases_count, last_purchase_at FROM forgotten_visits WHERE {_CUSTOMERS}
"""
_SUM_VISITS: LiteralString = "sum(purchases_count) AS purchases_count, max(last_purchase_at) AS last_purchase_at"
CUSTOMER_LOYALTY = ReadModel(
    "customer_loyalty",
    ("customer_id", "branch_id"),
    VISITS,
    CUSTOMERS,
    _CUSTOMERS,
    f"SELECT customer_id, branch_id, {_SUM_VISITS} FROM ({_VISITS}) AS visits GROUP BY 1, 2",
    "says the event log",
)
CUSTOMER_LOYALTY_CHAIN = ReadModel(
    "customer_loyalty_chain",
    ("customer_id",),
    VISITS,
    CUSTOMERS,
    _CUSTOMERS,
    f"SELECT customer_id, {_SUM_VISITS} FROM ({_VISITS}) AS visits GROUP BY 1",
    "says the event log",
)

DERIVED = (
    DAILY_SALES_OF_CHAIN,
    CUSTOMER_LOYALTY,
    CUSTOMER_LOYALTY_CHAIN,
    PRODUCT_SALES_OF_CHAIN,
    PRODUCT_SALES_TOTALS,
    MONTHLY_SALES_BY_BRANCH,
    SALES_TOTALS,  # after the customers' rows, which it counts
)


class Wrong(NamedTuple):
    """What is wrong with a model within a range."""

    findings: list[Finding]  # some
    rows: int  # wrong ones in all
    keys: list[Any]  # those of the range that have a wrong row, in order: days, branches, products or customers


def of_kind(kind: str) -> list[ReadModel]:
    return [model for model in DERIVED if model.kind == kind]


async def find_wrong(connection: Connection, model: ReadModel, first: str, last: str) -> Wrong:
    """Compare a model with what it follows from, in one snapshot: right rows are right under any load."""
    column = COLUMNS[model.kind]
    key = ", ".join(model.key)
    cursor = await connection.execute(
        f"""
        SELECT {key}, {_prefixed("stored", model.values)}, {_prefixed("should", model.values)}
        FROM ({model.stored()}) AS stored FULL JOIN ({model.should}) AS should USING ({key})
        WHERE ({_prefixed("stored", model.values)}) IS DISTINCT FROM ({_prefixed("should", model.values)})
        ORDER BY {column}, {key}
        """,
        {"first": first, "last": last},
    )
    rows = await cursor.fetchall()
    place = model.key.index(column)
    named = [_finding(model, row) for row in rows[:NAMED_MAX]]
    return Wrong(named, len(rows), list(dict.fromkeys(row[place] for row in rows)))


async def replace(connection: Connection, model: ReadModel, first: str, last: str) -> int:
    """Make the rows of a range what they should be; returns how many were wrong.

    Alone with the apply lock, and with everything summed up.
    """
    key, columns = ", ".join(model.key), ", ".join((*model.key, *model.values))
    cursor = await connection.execute(
        f"""
        WITH wrong AS (
            SELECT {key}, {_prefixed("should", model.values)}, should IS NULL AS surplus
            FROM ({model.stored()}) AS stored
            FULL JOIN ({model.should}) AS should USING ({key})
            WHERE ({_prefixed("stored", model.values)}) IS DISTINCT FROM ({_prefixed("should", model.values)})
        ), deleted AS (
            DELETE FROM {model.written} AS stored USING wrong
            WHERE surplus AND ({_prefixed("stored", model.key)}) = ({_prefixed("wrong", model.key)})
        ), written AS (
            INSERT INTO {model.written} ({columns}) SELECT {columns} FROM wrong WHERE NOT surplus ORDER BY {key}
            ON CONFLICT ({key}) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in model.values)}
        )
        SELECT count(*) FROM wrong
        """,
        {"first": first, "last": last},
    )
    ((wrong,),) = await cursor.fetchall()
    return int(wrong)


async def add(connection: Connection, model: ReadModel, rows: Sequence[Sequence[object]]) -> int:
    """Add differences to a model's rows, each as its key and its values; returns how many those are. Alone with the
    apply lock.

    Not as apply() does it: what is taken away would be refused as a row before it meets the one that it changes.
    """
    if not rows:
        return 0
    names = (*model.key, *model.values)
    columns = ", ".join(names)
    same = f"({_prefixed('stored', model.key)}) = ({_prefixed('delta', model.key)})"
    delta = f"WITH delta AS (SELECT * FROM jsonb_populate_recordset(NULL::{model.name}, %s::jsonb))"
    empty = " AND ".join(f"stored.{name} = 0" for name in model.values)  # who never sold has no row
    values = [records(names, rows)]
    await connection.execute(
        f"""
        {delta}, updated AS (
            UPDATE {model.name} AS stored
            SET {", ".join(f"{name} = stored.{name} + delta.{name}" for name in model.values)}
            FROM delta WHERE {same}
        )
        INSERT INTO {model.name} ({columns}) SELECT {columns} FROM delta
        WHERE NOT EXISTS (SELECT FROM {model.name} AS stored WHERE {same}) ORDER BY {", ".join(model.key)}
        """,
        values,
    )
    await connection.execute(f"{delta} DELETE FROM {model.name} AS stored USING delta WHERE {same} AND {empty}", values)
    return len(rows)


def records(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows for jsonb_populate_recordset, which knows the types of a table's columns. Amounts are text, so exact."""
    return json.dumps([dict(zip(columns, row, strict=True)) for row in rows], default=str)


def _prefixed(table: LiteralString, columns: tuple[LiteralString, ...]) -> LiteralString:
    return ", ".join(f"{table}.{column}" for column in columns)


def _finding(model: ReadModel, row: tuple[Any, ...]) -> Finding:
    keys, values = row[: len(model.key)], row[len(model.key) :]
    named = dict(zip(model.key, keys, strict=True))
    pairs = zip(model.values, values[: len(model.values)], values[len(model.values) :], strict=True)
    differences = [
        f"{column} {_text(stored)}, not {_text(should)}" for column, stored, should in pairs if stored != should
    ]
    return Finding(
        model.name,
        ", ".join(f"{column} {value}" for column, value in named.items()),
        f"{'; '.join(differences)}, {model.says}",
        named.get("day"),
    )


def _text(value: Any) -> str:
    return "missing" if value is None else str(value)
