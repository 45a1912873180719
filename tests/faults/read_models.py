"""Every read model against the sum of what was counted: own SQL and plain Python, whole cents."""

import datetime
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, LiteralString, NamedTuple

import psycopg

from tests.faults.findings import ALTERED, DOUBLED, LOST, Findings
from tests.faults.ledger import Sale

Connection = psycopg.Connection[tuple[Any, ...]]


class Table(NamedTuple):
    """A read model: how to read it (key first, money in cents), and what one sale adds to it."""

    query: LiteralString
    key: int  # how many columns of a row are its key
    rows: Callable[[Sale, datetime.date], Iterable[tuple[tuple[object, ...], Sequence[int]]]]
    maximum: int = -1  # the column that is a maximum instead of a sum


def _sums(sale: Sale) -> tuple[int, int, int, int]:
    return sale.cents, len(sale.items), 1, int(sale.customer_id is not None)


def _visits(sale: Sale, *key: object) -> Iterator[tuple[tuple[object, ...], Sequence[int]]]:
    if sale.customer_id:
        yield (sale.customer_id, *key), (1, sale.time_us)


_SUMS: LiteralString = "(revenue_sum * 100)::bigint, items_sum, purchases_count, purchases_with_customer_count"
_PRODUCT_SUMS: LiteralString = "qty_sum, (revenue_sum * 100)::bigint"
_VISITS: LiteralString = "purchases_count, (extract(epoch FROM last_purchase_at) * 1000000)::bigint"

TABLES = {
    "daily_sales_by_branch": Table(
        f"SELECT day, branch_id, {_SUMS} FROM daily_sales_by_branch",
        2,
        lambda sale, day: [((day, sale.branch_id), _sums(sale))],
    ),
    "daily_sales_of_chain": Table(
        f"SELECT day, {_SUMS} FROM daily_sales_of_chain", 1, lambda sale, day: [((day,), _sums(sale))]
    ),
    "monthly_sales_by_branch": Table(
        f"SELECT branch_id, month, {_SUMS} FROM monthly_sales_by_branch",
        2,
        lambda sale, day: [((branch, day.replace(day=1)), _sums(sale)) for branch in (0, sale.branch_id)],
    ),
    "product_sales_daily": Table(
        f"SELECT day, branch_id, product_id, {_PRODUCT_SUMS} FROM product_sales_daily",
        3,
        lambda sale, day: [((day, sale.branch_id, product), (1, cents)) for product, cents in sale.items],
    ),
    "product_sales_totals": Table(
        f"SELECT branch_id, product_id, {_PRODUCT_SUMS} FROM product_sales_totals",
        2,
        lambda sale, _: [((sale.branch_id, product), (1, cents)) for product, cents in sale.items],
    ),
    "product_sales_of_chain_sums": Table(  # and what is only noted so far
        "SELECT period, first_day, product_id, sum(qty_sum)::bigint, (sum(revenue_sum) * 100)::bigint"
        " FROM product_sales_of_chain GROUP BY 1, 2, 3",
        3,
        lambda sale, day: [
            ((period, first_day, product), (1, cents))
            for period, first_day in (("day", day), ("month", day.replace(day=1)), ("all", datetime.date.min))
            for product, cents in sale.items
        ],
    ),
    "customer_loyalty": Table(
        f"SELECT customer_id::text, branch_id, {_VISITS} FROM customer_loyalty",
        2,
        lambda sale, _: _visits(sale, sale.branch_id),
        maximum=1,
    ),
    "customer_loyalty_chain": Table(
        f"SELECT customer_id::text, {_VISITS} FROM customer_loyalty_chain", 1, lambda sale, _: _visits(sale), maximum=1
    ),
    "sales_totals": Table(
        f"SELECT branch_id, {_SUMS}, unique_customers_count FROM sales_totals",
        1,
        lambda sale, _: [((branch,), _sums(sale)) for branch in (0, sale.branch_id)],
    ),
}
OTHER_TABLES = {
    "analytics_event_log", "quarantined_events", "freshness", "cell_marks", "analytics_settings", "schema_migrations",
    "message_trials", "audit_status", "audit_parts", "forgotten_visits", "apply_lock",
    "product_sales_of_chain_notes",
}  # fmt: skip


def check_read_models(analytics: Connection, counted: Sequence[tuple[Sale, datetime.date]], findings: Findings) -> None:
    """Every table, row by row, is the sum of the sales that were counted, given with their business days."""
    for name, table in TABLES.items():
        wanted: dict[tuple[object, ...], list[Any]] = {}
        for sale, day in counted:
            for key, values in table.rows(sale, day):
                row = wanted.setdefault(key, [0] * len(values))
                for column, value in enumerate(values):
                    is_maximum = column == table.maximum
                    row[column] = max(row[column], value) if is_maximum else row[column] + value
        if name == "sales_totals":
            _add_unique_customers(wanted, [sale for sale, _ in counted])
        found = {tuple(row[: table.key]): list(row[table.key :]) for row in analytics.execute(table.query)}
        for key in sorted(wanted.keys() | found.keys(), key=repr):
            if wanted.get(key) != found.get(key):
                _differs(findings, name, key, wanted.get(key), found.get(key))


def _add_unique_customers(wanted: dict[tuple[object, ...], list[Any]], sales: Sequence[Sale]) -> None:
    for (branch,), row in wanted.items():
        row.append(len({s.customer_id for s in sales if s.customer_id and branch in (0, s.branch_id)}))


def _differs(
    findings: Findings, name: str, key: tuple[object, ...], wanted: list[Any] | None, found: list[Any] | None
) -> None:
    detail = f"{name} {tuple(map(str, key))}: {found} instead of {wanted}"
    findings.add(ALTERED, detail)
    if name == "daily_sales_by_branch":  # the table that counts each purchase exactly once
        more = (found or [0] * 4)[2] - (wanted or [0] * 4)[2]
        if more:
            findings.add(DOUBLED if more > 0 else LOST, detail, abs(more))


def unchecked_tables(analytics: Connection) -> set[str]:
    """Tables that are new since this checker was written: it says so, rather than pass them over."""
    rows = analytics.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
    return {str(name) for (name,) in rows} - TABLES.keys() - OTHER_TABLES
