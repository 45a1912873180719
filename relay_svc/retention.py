"""Settling the days of the outbox in which nothing waits, and dropping those that are older than the retention.

The purchases service creates the days, ahead of time and on demand: it is the one that cannot do without.
"""

import asyncio
import datetime
from collections import defaultdict
from typing import NamedTuple

import psycopg
import structlog
from psycopg_pool import PoolTimeout

from chassis.lifecycle import wait_set
from chassis.postgres import Connection, Pool

LOOK_EVERY_S = 3600.0
TRY_AGAIN_S = 60.0

log = structlog.get_logger()


class Day(NamedTuple):
    """A day (UTC) of the outbox; the number of events is an estimate, 0 while the day was never analysed."""

    day: datetime.date
    events: int
    bytes: int
    kept_for: str | None  # why it cannot go, though it is older than what is kept

    def verdict(self, first_kept: datetime.date) -> str:
        """What retention does with it."""
        if self.day >= first_kept:
            return "keep"
        return f"keep: {self.kept_for}" if self.kept_for else "drop"


async def first_kept(connection: Connection) -> datetime.date:
    """The first day that is kept, as the database's owner has decided."""
    cursor = await connection.execute("SELECT outbox_horizon()")
    ((day,),) = await cursor.fetchall()
    return day  # type: ignore[no-any-return]


async def days(pool: Pool) -> list[Day]:
    """All days, the oldest first."""
    async with pool.connection() as connection:
        cursor = await connection.execute("SELECT day, events, bytes FROM outbox_days()")
        sizes = await cursor.fetchall()
        horizon = await first_kept(connection)
        return [
            Day(day, events, size, await _kept_for(connection, day) if day < horizon else None)
            for day, events, size in sizes
        ]


async def _kept_for(connection: Connection, day: datetime.date) -> str | None:
    cursor = await connection.execute("SELECT outbox_day_kept_for(%s)", [day])
    ((reason,),) = await cursor.fetchall()
    return reason  # type: ignore[no-any-return]


async def settle_days(pool: Pool, stop: asyncio.Event | None = None) -> list[datetime.date]:
    """Settle the days that are over and in which nothing waits, until `stop`; returns them. One that is in use is left
    for later."""
    settled = []
    async with pool.connection() as connection:
        cursor = await connection.execute(
            "SELECT day FROM outbox_calendar WHERE settled_in IS NULL AND day < now()::date ORDER BY day"
        )
        for (day,) in await cursor.fetchall():
            if stop and stop.is_set():
                break
            try:
                cursor = await connection.execute("SELECT settle_outbox_day(%s)", [day])
            except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                continue
            if await cursor.fetchall() == [(None,)]:
                settled.append(day)
    return settled


async def drop_old_days(pool: Pool, stop: asyncio.Event | None = None) -> list[datetime.date]:
    """Drop what is past the retention, sent and listed, until `stop`; returns the days dropped. The rest waits."""
    async with pool.connection() as connection:
        cursor = await connection.execute("SELECT day FROM outbox_calendar WHERE day < outbox_horizon() ORDER BY day")
        past = [day for (day,) in await cursor.fetchall()]
    dropped, kept = [], defaultdict[str, list[datetime.date]](list)
    for day in past:
        if stop and stop.is_set():
            break
        if reason := await _drop(pool, day):
            kept[reason].append(day)
        else:
            log.info("day of the outbox dropped", day=day)
            dropped.append(day)
    for reason, days_kept in kept.items():
        log.warning(
            "days of the outbox past their retention are kept", reason=reason, first=days_kept[0], days=len(days_kept)
        )
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


async def begin(pool: Pool, stop: asyncio.Event) -> None:
    """Settle days before anything is done with those that are open: after years without a relay, these may be so many
    that no statement can be about all."""
    try:
        await settle_days(pool, stop)
    except (psycopg.Error, PoolTimeout) as error:
        log.warning("days of the outbox are not settled", error=error)


async def keep(pool: Pool, stop: asyncio.Event) -> None:
    """Settle what is over and drop what is past its retention, now and every hour."""
    while not stop.is_set():
        try:
            await settle_days(pool, stop)
            await drop_old_days(pool, stop)
        except (psycopg.Error, PoolTimeout) as error:
            log.warning("retention did not get through", error=error)
            await wait_set(stop, TRY_AGAIN_S)
        else:
            await wait_set(stop, LOOK_EVERY_S)
