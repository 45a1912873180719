"""The owner's page on a terminal, wide or narrow."""

import datetime
from collections.abc import Sequence
from decimal import Decimal

from rich.box import ROUNDED, SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from analytics_svc.commands.figures import Report, Sums

WIDE = 92  # columns; from here on, two lists stand side by side
WIDTH_MAX = 120
CHART_ROWS = 6
LEVELS = " ▁▂▃▄▅▆▇█"
BAR_COLUMNS = 14
STALE_S = 60.0  # figures older than this are shown as such

GOOD, BAD, FAINT, ACCENT = "green", "red", "bright_black", "cyan"


def show(report: Report, console: Console) -> None:
    width = min(console.width, WIDTH_MAX)
    whose = f"Branch {report.branch_id}" if report.branch_id else "The chain"
    console.print()
    console.print(Panel(_headline(report, width), title=f"[bold]{whose}[/]", box=ROUNDED, width=width, padding=(0, 2)))
    if not report.days:
        console.print("No sale has been counted yet.", style=FAINT)
    else:
        console.print(_chart(report, width))
        console.print(_branches(report, width))
        lists = [_products(report), _customers(report)]
        if width >= WIDE:
            side_by_side = Table.grid(padding=(0, 4))
            side_by_side.add_row(*lists)
            console.print(side_by_side)
        else:
            for each in lists:
                console.print(each)
    console.print(_freshness(report))
    console.print()


def _headline(report: Report, width: int) -> RenderableType:
    """All time, and the days that the page is about."""
    facts = [
        ("revenue", f"{report.all_time.revenue:,}"),
        ("purchases", f"{report.all_time.purchases:,}"),
        ("items", f"{report.all_time.items:,}"),
        ("customers", f"{report.unique_customers:,}"),
        ("a purchase", f"{_average(report.all_time):,}"),
    ]
    columns = len(facts) if width >= WIDE else 3 if width >= 50 else 2
    grid = Table.grid(expand=True, padding=(0, 2))
    for start in range(0, len(facts), columns):
        grid.add_row(*(Text(value, style="bold") for _, value in facts[start : start + columns]))
        grid.add_row(*(Text(name, style=FAINT) for name, _ in facts[start : start + columns]))
    return grid


def _chart(report: Report, width: int) -> RenderableType:
    """Revenue of each day as columns, over an axis of days."""
    totals = [sum(values, Decimal()) for values in zip(*report.revenue.values(), strict=True)]
    most = max(totals)
    label = f"{most:,.0f}"
    room = width - len(label) - 3
    step = max(min(room // len(totals), 4), 1)
    bars = totals if len(totals) <= room else _squeezed(totals, room)
    most = max(bars) or Decimal(1)
    lines = []
    for row in reversed(range(CHART_ROWS)):
        cells = (_level(value / most * CHART_ROWS - row) for value in bars)
        margin = label if row == CHART_ROWS - 1 else "0" if row == 0 else ""
        columns = "".join(cell * max(step - 1, 1) + " " * (step > 1) for cell in cells)
        lines.append(Text.assemble((f" {margin:>{len(label)}} ", FAINT), (columns, ACCENT)))
    first, last = f"{report.days[0]:%d %b %Y}", f"{report.days[-1]:%d %b %Y}"
    gap = max(len(bars) * step - len(first) - len(last) - (step > 1), 1)
    lines.append(Text(" " * (len(label) + 2) + first + " " * gap + last, style=FAINT))
    title = Text.assemble(
        ("Revenue a day", "bold"), f"  {report.period.revenue:,} in {len(report.days)} days  ", _change(report)
    )
    return Group(title, *lines, Text())


def _branches(report: Report, width: int) -> Table:
    """Each branch's days as a line, its revenue, and its part of the whole."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("branch", justify="right")
    room = width - 40 if width >= 70 else width - 26
    days = report.days if len(report.days) <= room else []
    table.add_column(f"{report.days[0]:%d %b} – {report.days[-1]:%d %b}", no_wrap=True)
    table.add_column("revenue", justify="right")
    if width >= 70:
        table.add_column("share", justify="right")
    whole = sum((sum(values, Decimal()) for values in report.revenue.values()), Decimal()) or Decimal(1)
    for branch_id, values in report.revenue.items():
        shown = values if days else _squeezed(values, max(room, 1))
        sold = sum(values, Decimal())
        cells: list[RenderableType] = [str(branch_id), Text(sparkline(shown), style=ACCENT), f"{sold:,}"]
        if width >= 70:
            cells.append(f"{sold / whole:.1%}")
        table.add_row(*cells)
    return table


def _products(report: Report) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False, title="Top products", title_justify="left")
    for name in ("product", "units", "revenue"):
        table.add_column(name, justify="right")
    table.add_column("", no_wrap=True)
    most = max((product.revenue for product in report.top_products), default=Decimal()) or Decimal(1)
    for product in report.top_products:
        bar = Text(_bar(product.revenue / most), style=ACCENT)
        table.add_row(str(product.product_id), f"{product.quantity:,}", f"{product.revenue:,}", bar)
    return table


def _customers(report: Report) -> Table:
    title = "Most loyal customers"
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False, title=title, title_justify="left")
    table.add_column("customer", no_wrap=True)
    table.add_column("purchases", justify="right")
    table.add_column("last", justify="right", no_wrap=True)
    for customer in report.loyal_customers:
        table.add_row(customer.customer_id[:13] + "…", f"{customer.purchases:,}", f"{customer.last_purchase:%d %b %Y}")
    if not report.loyal_customers:
        table.add_row(Text("nobody came three times yet", style=FAINT))
    return table


def _freshness(report: Report) -> Text:
    if report.data_as_of is None:
        return Text("Nothing was counted yet.", style=FAINT)
    now = datetime.datetime.now(datetime.UTC)
    parts: list[tuple[str, str]] = [(f"newest sale counted {_ago(now - report.data_as_of)}", FAINT)]
    if report.complete_through is None:
        parts.append((" · completeness not known", BAD))
    else:
        behind = now - report.complete_through
        stale = behind.total_seconds() > STALE_S
        by = f", held back by cell {report.furthest_behind}" if stale and report.furthest_behind else ""
        parts.append((f" · complete up to {_ago(behind)}{by}", BAD if stale else GOOD))
    if report.quarantined:
        parts.append((f" · {report.quarantined:,} events in quarantine", BAD))
    return Text.assemble(*parts)


def sparkline(values: Sequence[Decimal]) -> str:
    """One character a value; a day without sales is a dot."""
    most = max(values) or Decimal(1)
    return "".join(LEVELS[max(round(value / most * 8), 1)] if value else "·" for value in values)


def _squeezed(values: Sequence[Decimal], room: int) -> list[Decimal]:
    """Neighbouring days as their average, so that all fit."""
    size = -(-len(values) // room)
    groups = [values[start : start + size] for start in range(0, len(values), size)]
    return [sum(group, Decimal()) / len(group) for group in groups]


def _level(height: Decimal) -> str:
    """A cell of a column that is so high above the cell's floor."""
    return LEVELS[int(min(max(height, Decimal()), Decimal(1)) * 8 + Decimal("0.5"))]


def _bar(part: Decimal) -> str:
    return "█" * max(round(part * BAR_COLUMNS), 1)


def _change(report: Report) -> tuple[str, str]:
    """Against as many days before; nothing when there were no sales then."""
    before = report.period_before.revenue
    if not before:
        return "", FAINT
    change = report.period.revenue / before - 1
    return f"{change:+.1%} on the {len(report.days)} days before", GOOD if change >= 0 else BAD


def _average(sums: Sums) -> Decimal:
    return (sums.revenue / sums.purchases if sums.purchases else Decimal()).quantize(Decimal("0.01"))


def _ago(time: datetime.timedelta) -> str:
    seconds = time.total_seconds()
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.1f} s ago"
