"""Ranges of days as whole months and days: right to the day, and never many days."""

import random
from collections import Counter
from collections.abc import Iterator
from datetime import date, timedelta

import pytest

from analytics_svc.serve.queries import ALL_DAYS, NO_DAYS, Days, parts

DAY = timedelta(days=1)


def days_of(days: Days) -> Iterator[date]:
    day = days.first
    while day <= days.last:
        yield day
        day += DAY


def counted(days: Days) -> Counter[date]:
    """How often each day counts in a sum that is put together from the parts."""
    months, start, start_sign, end, end_sign = parts(days)
    assert months.first.day == months.last.day == 1 or months == NO_DAYS
    counts = Counter(
        day for first in days_of(months) if first.day == 1 for day in days_of(Days(first, end_of_month(first)))
    )
    for edge, sign in ((start, start_sign), (end, end_sign)):
        for day in days_of(edge):
            counts[day] += sign
    return Counter({day: count for day, count in counts.items() if count})


def end_of_month(first: date) -> date:
    return (first + 31 * DAY).replace(day=1) - DAY


def test_every_day_of_a_range_counts_once() -> None:
    """For ranges of any length, from any day, over leap years and turns of the year."""
    chance = random.Random(5)
    lengths = [*range(70), *(chance.randrange(70, 900) for _ in range(30))]
    for length in lengths:
        for _ in range(20):
            first = date(2023, 11, 1) + chance.randrange(500) * DAY
            days = Days(first, first + length * DAY)
            assert counted(days) == Counter(days_of(days)), days


def test_few_days_remain() -> None:
    """At most half a month at either end, however long the range."""
    for first in days_of(Days(date(2024, 1, 1), date(2024, 3, 31))):
        for last in days_of(Days(first, first + 100 * DAY)):
            _, start, _, end, _ = parts(Days(first, last))
            assert len(list(days_of(start))) <= 16 and len(list(days_of(end))) <= 16


@pytest.mark.parametrize("days", [ALL_DAYS, Days(date.min, date.min), Days(date.max, date.max)])
def test_the_ends_of_the_calendar(days: Days) -> None:
    """The first and the last day that there are do not lead out of the calendar."""
    months, start, _, end, _ = parts(days)
    if days == ALL_DAYS:
        assert (months, start, end) == (Days(date.min, date(9999, 12, 1)), NO_DAYS, NO_DAYS)
    else:
        assert (months, start, end) == (NO_DAYS, days, NO_DAYS)
