"""Dropping months that are older than the retention, and showing the operator what there is."""

import datetime
from typing import NamedTuple

import psycopg
import structlog

from chassis.postgres import Pool

KEYS_PER_TRANSACTION = 20_000  # bounded, so that no transaction is long

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


async def drop_old_months(pool: Pool, keep_months: int, today: datetime.date) -> list[datetime.date]:
    """Drop what is older than the retention and wholly sent; returns the months dropped.

    What could not be locked within a second, or is not sent, stays until the next time.
    """
    first_kept = horizon(keep_months, today)
    dropped = []
    for month in await months(pool):
        if first_kept is None or month.month >= first_kept:
            break
        if month.unsent:
            log.warning("a month past its retention is kept", month=month.month, unsent_events=month.unsent)
            continue
        async with pool.connection() as connection:
            while True:
                cursor = await connection.execute(
                    "SELECT delete_keys_of_month(%s, %s, %s)", [month.month, keep_months, KEYS_PER_TRANSACTION]
                )
                row = await cursor.fetchone()
                if not row or not row[0]:
                    break
            try:
                cursor = await connection.execute("SELECT drop_purchases_month(%s, %s)", [month.month, keep_months])
                row = await cursor.fetchone()
            except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                row = ("it is in use",)
        if row and row[0] is not None:
            log.warning("a month past its retention is kept", month=month.month, reason=row[0])
        else:
            log.info("month dropped", month=month.month, purchases=month.purchases)
            dropped.append(month.month)
    return dropped
