"""What somebody wants to see: which branch, and which days; read from the address of a page."""

import datetime
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlencode

from chassis.wire import ID_MAX
from pages_svc import words

DAY = datetime.timedelta(days=1)
EARLIEST = datetime.date(2000, 1, 1)  # no sale lies before it
DAYS_MAX = 3_660  # ten years
LOOKED_BACK = 28

RANGES = {"today": "Today", "7": "7 days", "28": "28 days", "month": "This month", "custom": "Other days"}


class Selection(NamedTuple):
    """As asked for; `range` is one of RANGES, or empty: nothing was said about days. Days are those of `custom`."""

    branch_id: int | None = None
    range: str = ""
    first: datetime.date | None = None
    last: datetime.date | None = None
    by_units: bool = False  # what makes a product the best; otherwise its revenue

    def address(self, path: str = "/", **changes: Any) -> str:
        """Where to find it, or what differs from it by `changes`."""
        chosen = self._replace(**changes)
        custom = chosen.range == "custom"
        named = {
            "branch": chosen.branch_id,
            "range": chosen.range,
            "first": chosen.first if custom else None,
            "last": chosen.last if custom else None,
            "best": "units" if chosen.by_units else None,
        }
        query = urlencode({name: value for name, value in named.items() if value})
        return f"{path}?{query}" if query else path


class Period(NamedTuple):
    """Business days, both inclusive, and those that they are compared with."""

    first: datetime.date
    last: datetime.date
    before_first: datetime.date
    before_last: datetime.date
    compared_with: str  # in words
    title: str

    @property
    def days(self) -> list[datetime.date]:
        return [self.first + n * DAY for n in range((self.last - self.first).days + 1)]


def read(query: Mapping[str, str]) -> tuple[Selection, dict[str, str]]:
    """What an address asks for, and by field what is wrong with it; what is wrong is left out."""
    wrong: dict[str, str] = {}
    branch_id = None
    if said := query.get("branch", "").strip():
        if said.isascii() and said.isdigit() and 0 < int(said) <= ID_MAX:
            branch_id = int(said)
        else:
            wrong["branch"] = f"“{said[:20]}” is no branch: branches are numbers from 1 on."
    chosen = query.get("range", "")
    if chosen and chosen not in RANGES:
        wrong["range"] = f"“{chosen[:20]}” is no range of days."
        chosen = ""
    first, last = (_day(query.get(name, ""), name, wrong) for name in ("first", "last"))
    if chosen == "custom":
        if not first and "first" not in wrong:
            wrong["first"] = "Say on which day to begin."
        if not last and "last" not in wrong:
            wrong["last"] = "Say on which day to end."
        if first and last:
            if last < first:
                wrong["last"] = "The last day is before the first."
            elif (last - first).days >= DAYS_MAX:
                wrong["last"] = f"At most {DAYS_MAX:,} days can be shown at once."
        if wrong.keys() & {"first", "last"}:
            chosen = ""
    return Selection(branch_id, chosen, first, last, query.get("best") == "units"), wrong


def _day(said: str, name: str, wrong: dict[str, str]) -> datetime.date | None:
    if not said.strip():
        return None
    try:
        day = datetime.date.fromisoformat(said.strip())
    except ValueError:
        wrong[name] = f"“{said[:20]}” is no day: write it as 2026-03-15."
        return None
    if not EARLIEST <= day <= datetime.date(9000, 1, 1):
        wrong[name] = "There are no sales so long ago, or so far ahead."
        return None
    return day


def resolve(selection: Selection, today: datetime.date, latest: datetime.date | None) -> Period:
    """The days that are meant. Where nothing was said and the last weeks have no sale, it is the latest that has."""
    match selection.range:
        case "today":
            return Period(today, today, today - DAY, today - DAY, "the whole day before", words.long_day(today))
        case "month":
            first = today.replace(day=1)
            before_last = min(first - DAY, (first - DAY).replace(day=1) + (today - first))
            before = before_last.replace(day=1), before_last
            return Period(first, today, *before, f"{words.days(*before)}", f"{today:%B %Y}")
        case "custom":
            assert selection.first and selection.last
            return _length(selection.first, selection.last)
        case "7" | "28":
            return _length(today - (int(selection.range) - 1) * DAY, today)
    anchor = today if latest is None or (today - latest).days < LOOKED_BACK else latest
    return _length(anchor - (LOOKED_BACK - 1) * DAY, anchor)


def _length(first: datetime.date, last: datetime.date) -> Period:
    """Compared with as many days before."""
    length = (last - first).days + 1
    before = max(first - length * DAY, EARLIEST - DAY), first - DAY
    with_what = "the day before" if length == 1 else f"the {length:,} days before"
    return Period(first, last, *before, with_what, words.days(first, last))
