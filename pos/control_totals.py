"""Do the read models say what was recorded? Compares by business day and branch, and waits until they do."""

import datetime
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pos.audit import Audited
from pos.client import DayTotals

POLL_S = 0.5
STALL_S = 120.0  # without any change for this long, something is broken rather than slow


class Lag(NamedTuple):
    """A day and branch on which the two sides differ; a side without a row counts as zeros."""

    recorded: DayTotals
    counted: DayTotals

    def __str__(self) -> str:
        day, branch_id, *recorded = self.recorded
        differences = [of - by for of, by in zip(self.counted[2:], recorded, strict=True)]
        words = ("purchases", "of them with a customer", "items", "cents of revenue")
        named = [f"{by:+,} {what}" for by, what in zip(differences, words, strict=True) if by]
        return f"{day}, branch {branch_id}: {', '.join(named)}"


class Comparison(NamedTuple):
    rows: int  # days and branches compared
    purchases: int  # recorded on them
    arrived: int  # of those, the purchases that the read models have
    lags: list[Lag]
    foreign_days: list[datetime.date]  # only the read models know them: others published events of their own
    audited: Audited | None = None  # what the system itself says in the end, of every read model

    @property
    def agrees(self) -> bool:
        return not self.lags and (self.audited is None or self.audited.agrees)


def compare(recorded: Iterable[DayTotals], counted: Iterable[DayTotals]) -> Comparison:
    """Compare all days on which anything was recorded; the read models' other days are foreign."""
    truth = {(row.day, row.branch_id): row for row in recorded}
    models = {(row.day, row.branch_id): row for row in counted}
    days = {day for day, _ in truth}
    keys = sorted(truth.keys() | {key for key in models if key[0] in days})
    pairs = [Lag(truth.get(key, _nothing(*key)), models.get(key, _nothing(*key))) for key in keys]
    return Comparison(
        rows=len(pairs),
        purchases=sum(pair.recorded.purchase_count for pair in pairs),
        arrived=sum(min(pair.recorded.purchase_count, pair.counted.purchase_count) for pair in pairs),
        lags=[pair for pair in pairs if pair.recorded != pair.counted],
        foreign_days=sorted({day for day, _ in models} - days),
    )


def wait_until_equal(
    read_recorded: Callable[[], Iterable[DayTotals]],
    read_counted: Callable[[], Iterable[DayTotals]],
    show: Callable[[Comparison], object],
    pause: Callable[[float], object] = time.sleep,
) -> Comparison:
    """Read and compare until both sides are equal, or nothing has changed for STALL_S seconds.

    `show` is told of every comparison; the last one is returned. The time that a service takes to answer does
    not count: a service that is down is waited for by the calls themselves.
    """
    recorded = list(read_recorded())
    seen: Comparison | None = None
    unchanged_s = 0.0
    while True:
        comparison = compare(recorded, read_counted())
        if comparison.foreign_days or any(lag.counted > lag.recorded for lag in comparison.lags):
            # The read models know more: others may sell at the same time, so read what is recorded by now.
            recorded = list(read_recorded())
            comparison = compare(recorded, read_counted())
        show(comparison)
        unchanged_s = unchanged_s + POLL_S if comparison == seen else 0.0
        if comparison.agrees or unchanged_s >= STALL_S:
            return comparison
        seen = comparison
        pause(POLL_S)


def _nothing(day: datetime.date, branch_id: int) -> DayTotals:
    return DayTotals(day, branch_id, 0, 0, 0, 0)
