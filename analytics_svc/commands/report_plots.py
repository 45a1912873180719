"""The owner's page as a picture. The only file that knows matplotlib, which is an optional extra."""

import datetime
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window: a file is all we want

from matplotlib import dates as mdates
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, MaxNLocator

from analytics_svc.commands.figures import Report

SIZE_INCHES, DOTS_PER_INCH = (14, 9), 150
WEEK = 7
BRANCHES_MAX = 60  # rows of the heat map that can still be told apart
INK, FAINT, GRID, PAPER = "#0f172a", "#64748b", "#e2e8f0", "#ffffff"
BLUE, LIGHT, GREEN, AMBER = "#2563eb", "#93c5fd", "#059669", "#d97706"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "grid.color": GRID,
}


def draw(report: Report, path: Path) -> None:
    """Write a picture in the format that the file's name ends with; PNG when it does not say."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=SIZE_INCHES, facecolor=PAPER)
        _heading(figure, report)
        if report.days:
            grid = figure.add_gridspec(
                2, 12, left=0.065, right=0.965, top=0.775, bottom=0.09, hspace=0.42, wspace=3.2, height_ratios=(1, 1.15)
            )
            _days(figure.add_subplot(grid[0, :]), report)
            _branches(figure, figure.add_subplot(grid[1, :6]), report)
            _products(figure.add_subplot(grid[1, 6:9]), report)
            _customers(figure.add_subplot(grid[1, 9:]), report)
        figure.savefig(path, dpi=DOTS_PER_INCH, format=path.suffix.removeprefix(".") or "png")
        plt.close(figure)


def _heading(figure: Any, report: Report) -> None:
    whose = f"Branch {report.branch_id}" if report.branch_id else "The chain"
    figure.text(0.035, 0.92, whose, size=22, weight="bold")
    figure.text(0.035, 0.868, _period(report), size=11, color=FAINT)
    facts = [
        (f"{report.all_time.revenue:,.0f}", "revenue, all time"),
        (f"{report.all_time.purchases:,}", "purchases"),
        (f"{report.all_time.items:,}", "items"),
        (f"{report.unique_customers:,}", "customers"),
    ]
    for number, (value, name) in enumerate(reversed(facts)):
        x = 0.965 - 0.135 * number
        figure.text(x, 0.935, value, size=17, weight="bold", ha="right")
        figure.text(x, 0.908, name, size=10, color=FAINT, ha="right")
    as_of = "nothing was counted yet" if report.data_as_of is None else f"counted until {_moment(report.data_as_of)}"
    complete = f", complete up to {_moment(report.complete_through)}" if report.complete_through else ""
    missing = f", {report.quarantined:,} events in quarantine" if report.quarantined else ""
    figure.text(0.035, 0.022, as_of + complete + missing, size=9, color=FAINT)


def _days(axes: Any, report: Report) -> None:
    """Revenue a day, and the average of each week."""
    totals = [float(sum(values, Decimal())) for values in zip(*report.revenue.values(), strict=True)]
    axes.set_title("Revenue a day")
    axes.bar(report.days, totals, width=0.72, color=LIGHT, zorder=2)
    if len(totals) > WEEK:
        average = [sum(totals[end - WEEK : end]) / WEEK for end in range(WEEK, len(totals) + 1)]
        axes.plot(report.days[WEEK - 1 :], average, color=BLUE, linewidth=2.2, zorder=3, solid_capstyle="round")
        axes.annotate(
            "average of 7 days",
            (report.days[-1], average[-1]),
            (6, 0),
            textcoords="offset points",
            color=BLUE,
            size=9,
            va="center",
        )
    axes.yaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", zorder=0)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    locator = mdates.AutoDateLocator(minticks=4, maxticks=10)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(mdates.ConciseDateFormatter(locator))
    half = datetime.timedelta(hours=16)
    first, last = (datetime.datetime.combine(day, datetime.time()) for day in (report.days[0], report.days[-1]))
    axes.set_xlim(first - half, last + half + (last - first) * 0.1)


def _branches(figure: Any, axes: Any, report: Report) -> None:
    """A row for each branch, a cell for each day."""
    branches = dict(sorted(report.revenue.items(), key=lambda each: -sum(each[1]))[:BRANCHES_MAX])
    axes.set_title("By branch and day" if len(branches) == len(report.revenue) else f"The {BRANCHES_MAX} best branches")
    cells = [[float(value) for value in values] for values in branches.values()]
    edges = mdates.date2num([report.days[0], report.days[-1]])
    picture = axes.imshow(
        cells,
        aspect="auto",
        cmap="Blues",
        vmin=0,
        interpolation="nearest",
        extent=(edges[0] - 0.5, edges[1] + 0.5, len(cells) - 0.5, -0.5),
    )
    axes.set_yticks(*_labels([str(branch_id) for branch_id in branches]))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.xaxis_date()
    locator = mdates.AutoDateLocator(minticks=3, maxticks=6)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(mdates.ConciseDateFormatter(locator))
    scale = figure.colorbar(picture, ax=axes, pad=0.02, fraction=0.04, format=FuncFormatter(_thousands))
    scale.outline.set_visible(False)
    scale.ax.tick_params(length=0, labelsize=8)


def _products(axes: Any, report: Report) -> None:
    axes.set_title("Top products")
    values = [float(product.revenue) for product in report.top_products]
    _bars(axes, [str(p.product_id) for p in report.top_products], values, GREEN, [f"{v:,.0f}" for v in values])


def _customers(axes: Any, report: Report) -> None:
    axes.set_title("Most loyal, purchases")
    values = [customer.purchases for customer in report.loyal_customers]
    names = [customer.customer_id[:8] for customer in report.loyal_customers]
    _bars(axes, names, values, AMBER, [f"{value:,}" for value in values])


def _bars(axes: Any, names: Sequence[str], values: Sequence[float], colour: str, labels: Sequence[str]) -> None:
    places = range(len(names))
    bars = axes.barh(places, values, height=0.62, color=colour, zorder=2)
    axes.bar_label(bars, labels, padding=4, size=9, color=FAINT)
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlim(0, max(values, default=1) * 1.28)


def _labels(names: Sequence[str], most: int = 20) -> tuple[list[int], list[str]]:
    """So many that they do not touch."""
    step = -(-len(names) // most)
    return list(range(0, len(names), step)), list(names[::step])


def _period(report: Report) -> str:
    if not report.days:
        return "No sale has been counted yet."
    text = f"{report.days[0]:%d %B %Y} to {report.days[-1]:%d %B %Y}: {report.period.revenue:,}"
    if report.period_before.revenue:
        change = report.period.revenue / report.period_before.revenue - 1
        text += f"  ({change:+.1%} on the {len(report.days)} days before)"
    return text


def _moment(moment: datetime.datetime) -> str:
    return f"{moment:%d %b %Y %H:%M:%S} UTC"


def _thousands(value: float, _: int | None = None) -> str:
    return f"{value / 1e6:,.1f}m" if value >= 1e6 else f"{value / 1e3:,.0f}k" if value >= 1e4 else f"{value:,.0f}"
