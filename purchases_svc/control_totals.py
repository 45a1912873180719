"""Control totals, and the range of days that they are of. Every function takes the connection and commits nothing."""

import datetime
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple
from zoneinfo import ZoneInfo

from chassis.postgres import Connection
from chassis.zones import business_day
from purchases_svc import windows
from purchases_svc.sale import EARLIEST
from purchases_svc.windows import DAY, NEWEST_AHEAD


class ControlTotals(NamedTuple):
    """Sums over the purchases of one branch on one business day; `revenue` is an exact decimal as text."""

    day: datetime.date
    branch_id: int
    purchase_count: int
    purchase_with_customer_count: int
    item_count: int
    revenue: str


async def control_totals(
    connection: Connection,
    *,
    first: datetime.date,
    last: datetime.date,
    branch_ids: Sequence[int],
    after: tuple[datetime.date, int] | None,
    limit: int,
    end: datetime.datetime | None = None,
) -> list[ControlTotals]:
    """Sums per business day and branch, from the purchases' own counts; with `end`, of those before it."""
    start = max(first, after[0]) if after else first
    window = windows.around(start, last)
    if end is not None:
        window = {**window, "to": min(window["to"], end)}
    cursor = await connection.execute(
        """
        SELECT business_day, branch_id, count(*), count(customer_id), sum(item_count), sum(total_amount)::text
        FROM purchases
        WHERE business_day BETWEEN %(start)s AND %(last)s
          AND purchase_time >= %(from)s AND purchase_time < %(to)s
          AND (%(all_branches)s OR branch_id = ANY(%(branch_ids)s))
          AND (business_day, branch_id) > (%(after_day)s, %(after_branch)s)
        GROUP BY business_day, branch_id
        HAVING branch_id NOT IN (SELECT branch_id FROM unlisted_branches)
        ORDER BY business_day, branch_id LIMIT %(limit)s
        """,
        {
            "start": start,
            "last": last,
            **window,
            "all_branches": not branch_ids,
            "branch_ids": list(branch_ids),
            "after_day": after[0] if after else datetime.date.min,
            "after_branch": after[1] if after else 0,
            "limit": limit,
        },
        prepare=False,
    )
    return [ControlTotals(*row) for row in await cursor.fetchall()]


async def stored_range(connection: Connection) -> tuple[datetime.date, datetime.date] | None:
    """The first and the last business day with a purchase; None when there is none."""
    newest = datetime.datetime.now(datetime.UTC) + NEWEST_AHEAD
    for first, end in windows.back(EARLIEST, newest):
        cursor = await connection.execute(
            "SELECT max(business_day) FROM purchases WHERE purchase_time >= %s AND purchase_time < %s",
            [first - DAY, end],  # a sale of the next day may be a little older, where clocks were set back
            prepare=False,
        )
        ((latest,),) = await cursor.fetchall()
        if latest is not None:
            earliest = await next_day(connection, EARLIEST.date() - DAY, latest)
            return earliest or latest, latest
    return None


async def next_day(connection: Connection, day: datetime.date, last: datetime.date) -> datetime.date | None:
    """The first business day with a purchase from `day` to `last`, both inclusive."""
    for first, end in windows.ahead(day, last + DAY):
        cursor = await connection.execute(
            """
            SELECT min(business_day) FROM purchases
            WHERE business_day >= %(first)s AND business_day < %(end)s
              AND purchase_time >= %(from)s AND purchase_time < %(to)s
            """,
            {"first": first, "end": end, **windows.around(first, end - DAY)},
            prepare=False,
        )
        ((found,),) = await cursor.fetchall()
        if found is not None:
            assert isinstance(found, datetime.date)
            return found
    return None


async def read_marks(connection: Connection, zone: ZoneInfo) -> tuple[datetime.datetime, datetime.date | None]:
    """The time by now, after whatever was read before; and the first business day of which nothing was dropped."""
    cursor = await connection.execute(
        # its default: nothing was
        "SELECT clock_timestamp(), nullif(dropped_before, '2000-01-01') FROM chain_settings"
    )
    ((read_at, dropped_before),) = await cursor.fetchall()
    return read_at, first_day_from(dropped_before, zone) if dropped_before else None


@cache
def first_day_from(month: datetime.date, zone: ZoneInfo) -> datetime.date:
    """The first business day of which no moment is before that month (UTC).

    The last moment before need not lie on the last of these days: clocks may have been set back over midnight, which
    they are at whole minutes.
    """
    start = datetime.datetime.combine(month, datetime.time(), datetime.UTC)
    before = (start - n * datetime.timedelta(minutes=1) - datetime.timedelta.resolution for n in range(24 * 60))
    return max(business_day(moment, zone) for moment in before) + datetime.timedelta(days=1)
