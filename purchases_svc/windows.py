"""Ranges of time in parts, so that whoever looks for something opens few partitions, however many there are."""

import datetime
from collections.abc import Iterator

DAY = datetime.timedelta(days=1)
NEWEST_AHEAD = datetime.timedelta(days=400)  # no purchase is later: a year ahead, and what clocks differ

Window = tuple[datetime.datetime, datetime.datetime]  # from, up to


def back(first: datetime.datetime, end: datetime.datetime) -> Iterator[Window]:
    """The time from `first` up to `end`, the latest part first: a year, then twice as long each time.

    Whoever asks for what is new looks into few partitions, however many there are; who has to look at them all does
    so in a few steps.
    """
    year = datetime.timedelta(days=366)
    length = max(end - (datetime.datetime.now(datetime.UTC) - year), year)  # what is to come has few months, if any
    while end > first:
        start = max(end - length, first) if end - first > length else first
        yield start, end
        end, length = start, 2 * length


def ahead(first: datetime.date, end: datetime.date) -> Iterator[tuple[datetime.date, datetime.date]]:
    """The days from `first` up to `end`, the earliest part first, likewise."""
    length = datetime.timedelta(days=31)
    while first < end:
        last = first + length if end - first > length else end
        yield first, last
        first, length = last, 2 * length


def around(first: datetime.date, last: datetime.date) -> dict[str, datetime.datetime]:
    """Times between which all sales of these business days lie, in any time zone: by them, PostgreSQL finds the
    partitions before it runs the query, and does not open the others. It needs plain values for that.
    """
    midnight = datetime.time(tzinfo=datetime.UTC)
    return {
        "from": datetime.datetime.combine(max(first, datetime.date.min + DAY) - DAY, midnight),
        "to": datetime.datetime.combine(min(last, datetime.date.max - 2 * DAY) + 2 * DAY, midnight),
    }
