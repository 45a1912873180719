"""Which days of the outbox a statement is about.

Each day is a partition, and each that a statement is planned for takes a lock, and one for each of its indexes. A
server has some thousands of locks for everybody. So statements name their days, in figures that the planner sees. Most
are about the few that are open; who asks about all takes some at a time, each in a transaction of its own.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import LiteralString, NamedTuple

from psycopg import sql

from chassis.postgres import Connection

DAYS_AT_ONCE = 100  # in one statement: some 600 locks
DAY_MS = 86_400_000


class Day(NamedTuple):
    """A day's events have ids from `first` on and before `end`."""

    first: str
    end: str


class Found(NamedTuple):
    """Days, and the snapshot in which they were found."""

    snapshot: str  # a pg_snapshot's text
    days: tuple[Day, ...]
    names: str | None  # theirs; None without days


OPEN: LiteralString = "settled_in IS NULL"
# The same as `names` of those that are open: whether they are still the same days.
NAMES_OF_OPEN = sql.SQL(
    "(SELECT string_agg(day::text, ' ' ORDER BY day) FROM outbox_calendar WHERE settled_in IS NULL)"
)


async def open_days(connection: Connection) -> Found:
    """Those that may be written to: whatever waits, as far as the snapshot shows it, is in one of them."""
    return await _find(connection, sql.SQL(OPEN))


async def with_failed(connection: Connection) -> Found:
    """Those that may have events that were given up."""
    return await _find(connection, sql.SQL(OPEN + " OR failed > 0"))


async def every_day(connection: Connection) -> Found:
    return await _find(connection, sql.SQL("true"))


async def since(connection: Connection, snapshot: str) -> Found:
    """Those that may have events which an earlier snapshot of this realm does not show."""
    settled_since = sql.SQL(
        "settled_in = transaction_ids_realm() AND last_xid >= pg_snapshot_xmin({}::pg_snapshot)"
    ).format(snapshot)
    return await _find(connection, sql.SQL(OPEN + " OR {}").format(settled_since))


async def _find(connection: Connection, which: sql.Composable) -> Found:
    statement = sql.SQL(
        "SELECT pg_current_snapshot()::text, uuid7_floor(day::timestamptz)::text,"
        " uuid7_floor((day + 1)::timestamptz)::text, day::text"
        " FROM (SELECT) AS always LEFT JOIN outbox_calendar ON {} ORDER BY day"
    )
    rows = await (await connection.execute(statement.format(which))).fetchall()
    names = " ".join(name for *_, name in rows if name)
    return Found(rows[0][0], tuple(Day(first, end) for _, first, end, _ in rows if first), names or None)


def within(days: Sequence[Day]) -> sql.Composable:
    """The condition that an event `e` is of one of the days, which are in order."""
    ranges: list[Day] = []
    for day in days:
        if ranges and ranges[-1].end == day.first:
            ranges[-1] = Day(ranges[-1].first, day.end)
        else:
            ranges.append(day)
    conditions = [sql.SQL("e.event_id >= {} AND e.event_id < {}").format(*each) for each in ranges]
    return sql.SQL("({})").format(sql.SQL(" OR ").join(conditions)) if conditions else sql.SQL("false")


def parts(days: Sequence[Day]) -> Iterator[Sequence[Day]]:
    """As many as one statement may be about; there is at least one part."""
    for first in range(0, max(len(days), 1), DAYS_AT_ONCE):
        yield days[first : first + DAYS_AT_ONCE]


def ids_in_parts(event_ids: Iterable[str]) -> Iterator[list[str]]:
    """Event ids, in order, of as many days as one statement may be about; there is at least one part."""
    part: list[str] = []
    for number, (_, ids) in enumerate(groupby(sorted(event_ids), key=_day_of)):
        if number and number % DAYS_AT_ONCE == 0:
            yield part
            part = []
        part += ids
    yield part


def _day_of(event_id: str) -> int:
    """By the time in a UUIDv7, in days since 1970."""
    return int(event_id[:8] + event_id[9:13], 16) // DAY_MS
