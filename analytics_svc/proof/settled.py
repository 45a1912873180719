"""Waiting until all that was recorded by some time is counted or quarantined."""

import asyncio
from datetime import date, datetime

from analytics_svc.upstream.source import Source
from chassis.postgres import Connection, Pool

POLL_S = 0.1
EMPTY_DAY = date(1999, 1, 1)  # before any purchase: costs nothing to ask about


async def wait_until_complete(pool: Pool, source: Source, recorded_by: datetime, wait_s: float) -> bool:
    """Wait `wait_s` at most until all that was recorded by then is counted or quarantined; whether it is.

    A promise that is later than the purchases' clock is none: their clock was ahead when it was made.
    """
    deadline = asyncio.get_running_loop().time() + wait_s
    while True:
        async with pool.connection() as connection:
            through = await complete_through(connection)
        if through is not None and through >= recorded_by and through <= await _now(source):
            return True
        if asyncio.get_running_loop().time() >= deadline:
            return False
        await asyncio.sleep(POLL_S)


async def complete_through(connection: Connection) -> datetime | None:
    cursor = await connection.execute("SELECT complete_through_at FROM freshness")
    ((through,),) = await cursor.fetchall()
    return through  # type: ignore[no-any-return]


async def _now(source: Source) -> datetime:
    """What the purchases' clock says."""
    return (await source.control_totals(EMPTY_DAY, EMPTY_DAY)).read_at
