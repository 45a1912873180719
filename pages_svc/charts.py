"""Charts as shapes in an SVG that is as wide as its place: along it in percent, upwards in pixels."""

import datetime
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

from pages_svc import words

HEIGHT = 200  # of the plot, in pixels
LINES = 5  # of the grid, at most
SERIES = 5  # that can be told apart by their colours; the last is what is left
COLUMNS_MAX = 62
LABELS_MAX = 5  # as many as have room on a phone
LABELLED = (1, 2, 7, 14, 28)  # every such column, where that is few enough
WEEK = 7
DAYS_BY_WEEK = 400  # up to here; months beyond


class Block(NamedTuple):
    """A part of a column. `x` and `width` are percent."""

    x: float
    y: float
    width: float
    height: float
    series: int  # 1 to SERIES


class Column(NamedTuple):
    blocks: list[Block]
    middle: float  # percent
    label: str  # empty: not every column has one
    says: str


class Line(NamedTuple):
    y: float
    label: str


class Columns(NamedTuple):
    columns: list[Column]
    lines: list[Line]
    series: dict[int, int]  # of each branch; what is not in here is in the last one
    each: str  # day, week or month
    height: int = HEIGHT


def columns(days: Sequence[datetime.date], revenue: Mapping[int, Mapping[datetime.date, int]]) -> Columns:
    """Revenue per day (per week or month, where there are many days), one block for each branch.

    `revenue` is in cents, by branch and day, the branches in the order in which they are stacked from below.
    """
    groups, each = _grouped(days)
    shown = list(revenue)
    own = len(shown) if len(shown) <= SERIES else SERIES - 1
    series = {branch: place + 1 for place, branch in enumerate(shown[:own])}
    sums: list[list[int]] = []
    for group in groups:
        column = [0] * SERIES
        for branch, by_day in revenue.items():
            column[series.get(branch, SERIES) - 1] += sum(by_day.get(day, 0) for day in group)
        sums.append(column)
    top, lines = _scale(max((sum(column) for column in sums), default=0))
    step = 100 / len(groups)
    least = math.ceil(len(groups) / LABELS_MAX)
    every = next((step for step in LABELLED if step >= least), least)
    made = []
    for place, (group, column) in enumerate(zip(groups, sums, strict=True)):
        blocks, base = [], float(HEIGHT)
        for index, cents in enumerate(column):
            if cents:
                height = HEIGHT * cents / top
                base -= height
                blocks.append(Block(place * step + 0.12 * step, base, 0.76 * step, height, index + 1))
        # Counted from the last one, which is what is looked for.
        labelled = (len(groups) - 1 - place) % every == 0
        name = _name(group, each)
        made.append(
            Column(blocks, (place + 0.5) * step, name if labelled else "", f"{name}: {words.amount(sum(column))}")
        )
    return Columns(made, lines, series, each)


def _grouped(days: Sequence[datetime.date]) -> tuple[list[list[datetime.date]], str]:
    if len(days) <= COLUMNS_MAX:
        return [[day] for day in days], "day"
    if len(days) <= DAYS_BY_WEEK:
        return _by(days, lambda day: day.isocalendar()[:2]), "week"
    return _by(days, lambda day: (day.year, day.month)), "month"


def _by(days: Sequence[datetime.date], key: Callable[[datetime.date], Hashable]) -> list[list[datetime.date]]:
    groups: dict[Hashable, list[datetime.date]] = {}
    for day in days:
        groups.setdefault(key(day), []).append(day)
    return list(groups.values())


def _name(group: Sequence[datetime.date], each: str) -> str:
    return f"{group[0]:%b %Y}" if each == "month" else words.short_day(group[0])


def _scale(most_cents: int) -> tuple[int, list[Line]]:
    """What the top of the plot stands for, and the lines of the grid: round numbers that people count in, and whole,
    as they are labelled.
    """
    most = max(most_cents / 100, 1.0)
    magnitude = 10 ** math.floor(math.log10(most / LINES))
    steps = (max(magnitude * factor, 1) for factor in (1, 2, 2.5, 5, 10, 20))
    step = next(step for step in steps if most <= LINES * step and step % 1 == 0)
    count = math.ceil(most / step)
    top = count * step
    lines = [Line(HEIGHT - HEIGHT * n * step / top, words.whole(round(100 * n * step))) for n in range(count + 1)]
    return round(100 * top), lines
