"""The outcome of a demo run: as tables for people, as JSON for programs."""

import hashlib
import json
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chassis.wire import cents_text
from pos.analytics import Summary, TopProduct
from pos.audit import Audited
from pos.client import DayTotals
from pos.control_totals import STALL_S, Comparison

LOYAL_PURCHASES = 3  # a customer with at least so many is loyal
TOP_PRODUCTS = 5
TIED_SHOWN_MAX = 15
SHOWN_MAX = 10  # lagging rows, foreign days


class Sent(NamedTuple):
    """What happened at the tills."""

    sales: int
    replayed: int  # of them, sales that had been stored before
    duplicates: int  # sent a second time on purpose
    seconds: float

    @property
    def per_second(self) -> float:
        return self.sales / self.seconds if self.seconds else 0.0


class Answers(NamedTuple):
    """What the owner wants to know, of everything in the system; read through the analytics API alone."""

    summary: Summary
    daily_sales: list[DayTotals]
    loyal_customers: int
    top_products: list[TopProduct]  # and those that tie with the last of them


def as_json(answers: Answers, comparison: Comparison, sent: Sent) -> str:
    """One JSON object, put together by hand: revenue is an exact number with two decimals."""
    summary = answers.summary
    top = [{"product_id": p.product_id, "quantity": p.quantity} for p in answers.top_products[:TOP_PRODUCTS]]
    values = {
        "purchases": str(summary.purchase_count),
        "items": str(summary.item_count),
        "revenue": cents_text(summary.revenue_cents),
        "unique_customers": str(summary.unique_customer_count),
        "loyal_customers": str(answers.loyal_customers),
        "top_products": json.dumps(top),
        "daily_sales_sha256": json.dumps(daily_sales_sha256(answers.daily_sales)),
        "control_totals_agree": json.dumps(comparison.agrees),
        "duplicates_sent": str(sent.duplicates),
        "seconds": f"{sent.seconds:.3f}",
        "purchases_per_second": f"{sent.per_second:.1f}",
    }
    return "{\n" + ",\n".join(f'  "{key}": {value}' for key, value in values.items()) + "\n}\n"


def daily_sales_sha256(rows: list[DayTotals]) -> str:
    """SHA-256 in hex over lines `YYYY-MM-DD,branch,revenue,items`, sorted by day, then branch."""
    lines = [f"{r.day},{r.branch_id},{cents_text(r.revenue_cents)},{r.item_count}\n" for r in sorted(rows)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def print_all(answers: Answers, comparison: Comparison, sent: Sent, console: Console) -> None:
    console.print(_branches(answers))
    console.print(_top_products(answers))
    if (hidden := len(answers.top_products) - TIED_SHOWN_MAX) > 0:
        console.print(f"and {hidden:,} more products that sold as many as the last one")
    console.print(_facts(answers, comparison, sent))


def _facts(answers: Answers, comparison: Comparison, sent: Sent) -> Table:
    summary = answers.summary
    facts = Table.grid(padding=(0, 2))
    facts.add_row("Unique customers", f"{summary.unique_customer_count:,}")
    facts.add_row("Loyal customers", f"{answers.loyal_customers:,} with {LOYAL_PURCHASES} or more purchases")
    if summary.data_as_of:
        facts.add_row("Data as of", f"{summary.data_as_of:%Y-%m-%d %H:%M:%S} UTC")
    if summary.quarantined_count:
        facts.add_row(Text("In quarantine", "red"), f"{summary.quarantined_count:,} events, missing from all figures")
    facts.add_row("Control totals", _verdict(comparison))
    if audited := comparison.audited:
        facts.add_row("Audit", _audit_verdict(audited))
    if foreign := comparison.foreign_days:
        named = ", ".join(map(str, foreign[:SHOWN_MAX])) + (", …" if len(foreign) > SHOWN_MAX else "")
        facts.add_row(
            Text("Foreign days", "yellow"),
            f"{len(foreign):,} days have events of others and no recorded purchase; not compared: {named}",
        )
    facts.add_row(
        "Sent",
        f"{sent.sales:,} purchases in {sent.seconds:.1f} s, {sent.per_second:,.0f} per second; "
        f"{sent.duplicates:,} twice on purpose, {sent.replayed:,} had been stored before",
    )
    return facts


def _audit_verdict(audited: Audited) -> Text:
    if audited.agrees:
        foreign = f"; {audited.foreign_events:,} events of others are counted besides" if audited.foreign_events else ""
        every = f": every read model, and {audited.rows:,} rows of business day and branch{foreign}"
        return Text.assemble(("agrees", "green"), every)
    return Text("\n").join([Text("found", "red"), *map(Text, audited.problems[:SHOWN_MAX])])


def _verdict(comparison: Comparison) -> Text:
    if not comparison.lags:
        return Text.assemble(("agree", "green"), f" on all {comparison.rows:,} rows of business day and branch")
    lines = [
        f" on {len(comparison.lags):,} of {comparison.rows:,} rows of business day and branch, "
        f"and nothing has changed for {STALL_S:.0f} s; counted minus recorded:",
        *map(str, comparison.lags[:SHOWN_MAX]),
    ]
    if (hidden := len(comparison.lags) - SHOWN_MAX) > 0:
        lines.append(f"and {hidden:,} more")
    return Text.assemble(("differ", "red"), "\n".join(lines))


def _branches(answers: Answers) -> Table:
    table = _table("Revenue per branch", "branch", "purchases", "items", "revenue", "share")
    total_cents = sum(row.revenue_cents for row in answers.daily_sales)
    for branch_id in sorted({row.branch_id for row in answers.daily_sales}):
        rows = [row for row in answers.daily_sales if row.branch_id == branch_id]
        revenue_cents = sum(row.revenue_cents for row in rows)
        table.add_row(
            str(branch_id),
            f"{sum(row.purchase_count for row in rows):,}",
            f"{sum(row.item_count for row in rows):,}",
            _money(revenue_cents),
            f"{revenue_cents / (total_cents or 1):.1%}",
        )
    table.add_section()
    total = answers.summary
    table.add_row("all", f"{total.purchase_count:,}", f"{total.item_count:,}", _money(total.revenue_cents))
    return table


def _top_products(answers: Answers) -> Table:
    table = _table(f"Top {TOP_PRODUCTS} products by quantity", "product", "units", "revenue")
    for product in answers.top_products[:TIED_SHOWN_MAX]:
        table.add_row(str(product.product_id), f"{product.quantity:,}", _money(product.revenue_cents))
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _money(cents: int) -> str:
    """202719543 → `2,027,195.43`."""
    return f"{cents // 100:,}.{cents % 100:02d}"
