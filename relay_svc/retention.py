"""Dropping days of the outbox that are older than the retention, and telling the operator what there is.

The purchases service creates the days, ahead of time and on demand: it is the one that cannot do without.
"""

import asyncio
import datetime
from typing import NamedTuple

import psycopg
import structlog
from psycopg_pool import PoolTimeout

from chassis.lifecycle import wait_set
from chassis.postgres import Pool

LOOK_EVERY_S = 3600.0
TRY_AGAIN_S = 60.0

log = structlog.get_logger()


class Day(NamedTuple):
    """A day (UTC) of the outbox; the number of events is an estimate, 0 while the day was never analysed."""

    day: datetime.date
    events: int
    bytes: int
    kept_for: str | None  # why it could not go, however old

    def verdict(self, first_kept: datetime.date) -> str:
        """What retention does with it."""
        if self.day >= first_kept:
            return "keep"
        return f"keep: {self.kept_for}" if self.kept_for else "drop"


async def first_kept(pool: Pool) -> datetime.date:
    """The first day that is kept, as the database's owner has decided."""
    async with pool.connection() as connection:
        cursor = await connection.execute("SELECT outbox_horizon()")
        ((day,),) = await cursor.fetchall()
        return day  # type: ignore[no-any-return]


async def days(pool: Pool) -> list[Day]:
    """All days, the oldest first."""
    async with pool.connection() as connection:
        cursor = await connection.execute("SELECT day, events, bytes, kept_for FROM outbox_days()")
        return [Day(*row) for row in await cursor.fetchall()]


async def drop_old_days(pool: Pool) -> list[datetime.date]:
    """Drop what is older than the retention, sent and listed; returns the days dropped. The rest waits."""
    horizon = await first_kept(pool)
    dropped = []
    for day in await days(pool):
        if day.day >= horizon:
            break
        if reason := day.kept_for or await _drop(pool, day.day):
            log.warning("a day of the outbox past its retention is kept", day=day.day, reason=reason)
        else:
            log.info("day of the outbox dropped", day=day.day, bytes=day.bytes)
            dropped.append(day.day)
    return dropped


async def _drop(pool: Pool, day: datetime.date) -> str | None:
    """Drop one day; or why not."""
    async with pool.connection() as connection:
        try:
            cursor = await connection.execute("SELECT drop_outbox_day(%s)", [day])
            row = await cursor.fetchone()
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            return "it is in use"
    return row[0] if row else None


async def keep(pool: Pool, stop: asyncio.Event) -> None:
    """Drop what is past its retention, now and every hour."""
    while not stop.is_set():
        try:
            await drop_old_days(pool)
        except (psycopg.Error, PoolTimeout) as error:
            log.warning("retention did not get through", error=error)
            await wait_set(stop, TRY_AGAIN_S)
        else:
            await wait_set(stop, LOOK_EVERY_S)
