"""Telling the query servers what a transaction changes: PostgreSQL's NOTIFY, delivered when it commits, or never."""

import json
from collections.abc import Collection
from datetime import date
from typing import Final, NamedTuple

from chassis.postgres import Connection

CHANNEL = "sales_applied"
PAYLOAD_ROWS_MAX = 7_900  # bytes; PostgreSQL takes less than 8,000, of which the number needs a few
_EVERYTHING_JSON = '"*"'

Row = tuple[date, int]  # business day and branch, the key of daily_sales_by_branch
EVERYTHING: Final = None  # in place of rows


class Announcement(NamedTuple):
    number: int  # one more than that of the one before, in the order of commits
    rows: frozenset[Row] | None  # of daily_sales_by_branch that changed; EVERYTHING: read them all again


async def announce(connection: Connection, changed: Collection[Row] | None, *, counted: bool) -> None:
    """Announce what the caller's transaction changes that a reader can see, as the last thing that it does.

    It holds the freshness row until the commit, so that announcements are numbered in the order of commits.
    `counted` says that purchases were added, which moves data_as_of_time.
    """
    await connection.execute(
        """
        WITH moved AS (
            UPDATE freshness SET
                announced_count = announced_count + 1,
                applied_at = CASE WHEN %s THEN greatest(applied_at, clock_timestamp()) ELSE applied_at END
            RETURNING announced_count
        )
        SELECT pg_notify('sales_applied', concat('{"number":', announced_count, ',"rows":', %s::text, '}')) FROM moved
        """,
        [counted, _rows_json(changed)],
    )


def parse(payload: str) -> Announcement | None:
    """Read an announcement; None when it is none of ours: every login of the database may send what it likes."""
    try:
        told = json.loads(payload)
        number, rows = told["number"], told["rows"]
        changed = EVERYTHING if rows == "*" else frozenset(_row(*row) for row in rows)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return Announcement(number, changed) if type(number) is int else None


def _row(day: str, branch_id: int) -> Row:
    if type(branch_id) is not int or not 0 < branch_id < 2**31:
        raise ValueError("no branch")
    return date.fromisoformat(day), branch_id


def _rows_json(changed: Collection[Row] | None) -> str:
    if changed is EVERYTHING:
        return _EVERYTHING_JSON
    text = "[" + ",".join(f'["{day}",{branch_id}]' for day, branch_id in changed) + "]"
    return text if len(text) <= PAYLOAD_ROWS_MAX else _EVERYTHING_JSON
