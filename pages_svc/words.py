"""How numbers, amounts and times are written for people."""

import datetime
from zoneinfo import ZoneInfo

MINUS = "−"


def amount(cents: int) -> str:
    """1234550 → `12,345.50`."""
    sign = MINUS if cents < 0 else ""
    return f"{sign}{abs(cents) // 100:,}.{abs(cents) % 100:02d}"


def plain(cents: int) -> str:
    """For programs: no thousands, a point."""
    return f"{cents // 100}.{cents % 100:02d}"


def whole(cents: int) -> str:
    """An amount for an axis: 1234550 → `12,346`."""
    return f"{(cents + 50) // 100:,}"


def number(count: int) -> str:
    return f"{count:,}"


def counted(count: int, one: str) -> str:
    """`1 event`, `2 events`."""
    return f"{count:,} {one}{'' if count == 1 else 's'}"


def percent(part: int, of: int) -> str:
    """`34.5 %`; a dash when there is nothing to be a part of."""
    return f"{1000 * part // of / 10:.1f} %" if of else "–"


def per(total: int, count: int) -> int | None:
    """What falls to each, half up; None when there is none."""
    return (2 * total + count) // (2 * count) if count else None


def ratio(total: int, count: int) -> str:
    """`5.4`; a dash when there is none."""
    return f"{total / count:,.1f}" if count else "–"


class Change:
    """How something compares with what it was."""

    def __init__(self, now: int, before: int) -> None:
        self.known = before > 0
        self.permille = round(1000 * (now - before) / before) if self.known else 0

    @property
    def direction(self) -> str:
        return "up" if self.permille > 0 else "down" if self.permille < 0 else "level"

    def __str__(self) -> str:
        if not self.known:
            return "–"
        sign = {"up": "+", "down": MINUS, "level": "±"}[self.direction]
        return f"{sign}{abs(self.permille) / 10:,.1f} %"


def clock(moment: datetime.datetime, zone: ZoneInfo, today: datetime.date) -> str:
    """`12:03:07`, with its day unless that is today."""
    local = moment.astimezone(zone)
    return f"{local:%H:%M:%S}" if local.date() == today else f"{local.day} {local:%b %Y, %H:%M:%S}"


def clock_in(moment: datetime.datetime, zone: datetime.tzinfo) -> str:
    """With its day and zone, whenever it is read."""
    local = moment.astimezone(zone)
    return f"{local.day} {local:%b %Y, %H:%M:%S} ({zone})"


def day(date: datetime.date) -> str:
    return f"{date.day} {date:%b %Y}"


def short_day(date: datetime.date) -> str:
    return f"{date.day} {date:%b}"


def long_day(date: datetime.date) -> str:
    return f"{date:%A}, {date.day} {date:%B %Y}"


def days(first: datetime.date, last: datetime.date) -> str:
    """`2 – 29 Nov 2026`, as short as it can be said."""
    if first == last:
        return day(first)
    if (first.year, first.month) == (last.year, last.month):
        return f"{first.day} – {day(last)}"
    return f"{short_day(first) if first.year == last.year else day(first)} – {day(last)}"


def span(seconds: float) -> str:
    """How long something takes or is ago: `0.4 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    rest = int(seconds)
    for size, unit, lesser, lesser_unit in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s")):
        if rest >= size:
            more = rest % size // lesser
            return f"{rest // size} {unit} {more} {lesser_unit}" if more else f"{rest // size} {unit}"
    return f"{rest} s"
