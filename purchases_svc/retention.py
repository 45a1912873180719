"""Dropping months that are older than the retention, and telling the operator what there is.

How long purchases are kept is stored in the database. Only its owner writes it (`retail-purchases retention`), so that
no service can drop more, whatever has got hold of it.
"""

import asyncio
import datetime
from typing import NamedTuple

import psycopg
import structlog
from psycopg_pool import PoolTimeout

from chassis.postgres import Connection, Pool

LOOK_EVERY_S = 3600.0
TRY_AGAIN_S = 60.0
ROWS_PER_TRANSACTION = 10_000  # some hundred milliseconds: bounded, so that no transaction is long
# Of one such statement, and of dropping a month, which looks through the unsent events first.
STATEMENT_TIMEOUT_S = 60.0

log = structlog.get_logger()


class Month(NamedTuple):
    """A month of purchases; the number of purchases is an estimate, 0 while the month was never analysed."""

    month: datetime.date
    purchases: int
    bytes: int
    unsent: int  # events that are not sent

    def verdict(self, horizon: datetime.date | None) -> str:
        """What retention does with it."""
        if horizon is None or self.month >= horizon:
            return "keep"
        return f"keep: {self.unsent:,} events are not sent" if self.unsent else "drop"


def horizon(keep_months: int, today: datetime.date) -> datetime.date | None:
    """The first month that is kept, the current one besides `keep_months` full ones; None when everything is."""
    if keep_months == 0:
        return None
    months = today.year * 12 + today.month - 1 - keep_months
    return datetime.date(months // 12, months % 12 + 1, 1)


async def months(pool: Pool) -> list[Month]:
    """All months, the oldest first."""
    async with pool.connection() as connection:
        cursor = await connection.execute("SELECT month, purchases, bytes, unsent FROM purchases_months()")
        return [Month(*row) for row in await cursor.fetchall()]


async def kept_months(connection: Connection) -> int:
    """Full ones that are kept besides the current one; 0: all."""
    cursor = await connection.execute("SELECT keep_months FROM chain_settings")
    ((kept,),) = await cursor.fetchall()
    return int(kept)


async def first_kept(pool: Pool) -> datetime.date | None:
    """The first month that is kept, by the database's clock; None when everything is."""
    async with pool.connection() as connection:
        cursor = await connection.execute("SELECT retention_horizon()")
        ((month,),) = await cursor.fetchall()
        return month  # type: ignore[no-any-return]


async def drop_old_months(pool: Pool) -> list[datetime.date]:
    """Drop what is older than the retention and wholly sent; returns the months dropped.

    What could not be locked within a second, or is not sent, stays until the next time.
    """
    await delete_keys(pool)  # of months that were dropped by somebody who did not come that far
    horizon = await first_kept(pool)
    dropped = []
    for month in await months(pool):
        if horizon is None or month.month >= horizon:
            break
        reason = "some of its events are not sent" if month.unsent else await _drop(pool, month.month)
        if reason:
            log.warning("a month past its retention is kept", month=month.month, reason=reason)
        else:
            log.info("month dropped", month=month.month, purchases=month.purchases)
            dropped.append(month.month)
    await delete_keys(pool)
    await forget_till_places(pool)
    return dropped


async def _drop(pool: Pool, month: datetime.date) -> str | None:
    """Drop one month; or why not. From when it is closed, its sales are refused, also while it cannot be dropped."""
    async with pool.connection() as connection:
        try:
            await connection.execute("SELECT close_purchases_month(%s)", [month])  # commits
            cursor = await connection.execute("SELECT drop_purchases_month(%s)", [month])
            row = await cursor.fetchone()
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            return "it is in use"
    return row[0] if row else None


async def delete_keys(pool: Pool) -> None:
    """Delete the keys of dropped months, some at a time. A sale whose key is gone is refused for its age."""
    async with pool.connection() as connection:
        cursor = await connection.execute("SELECT dropped_months()")
        for (month,) in await cursor.fetchall():
            last = None
            while True:
                cursor = await connection.execute(
                    "SELECT delete_keys_of_dropped_month(%s, %s, %s)", [month, last, ROWS_PER_TRANSACTION]
                )
                row = await cursor.fetchone()
                if not row or not row[0]:
                    break
                last = row[0]


async def forget_till_places(pool: Pool) -> None:
    """Forget where sales of dropped months stood in their tills' journals, some at a time."""
    async with pool.connection() as connection:
        while True:
            cursor = await connection.execute("SELECT forget_till_places(%s)", [ROWS_PER_TRANSACTION])
            ((forgotten,),) = await cursor.fetchall()
            if not forgotten:
                return


class Retention:
    """Knows how many months are kept, and lets older ones go."""

    def __init__(self, pool: Pool, months: int) -> None:
        self._pool, self.months = pool, months

    async def keep(self) -> None:
        """Drop what is past its retention, now and every hour. It may end at any point."""
        while True:
            try:
                async with self._pool.connection() as connection:
                    self.months = await kept_months(connection)
                if self.months:
                    await drop_old_months(self._pool)
            except (psycopg.Error, PoolTimeout) as error:
                log.warning("retention did not get through", error=error)
                await asyncio.sleep(TRY_AGAIN_S)
            else:
                await asyncio.sleep(LOOK_EVERY_S)
