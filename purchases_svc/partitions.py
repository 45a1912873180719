"""Months of purchases and days of events, created ahead of time, and on demand for whatever a clock says."""

import asyncio
import datetime
from collections.abc import Iterable

import psycopg
import structlog
from prometheus_client import Gauge
from psycopg_pool import PoolTimeout

from chassis.lifecycle import Backoff
from chassis.postgres import Pool

MONTHS_AHEAD = 2  # besides the current one
DAYS_AHEAD = 3
CHECK_EVERY_S, TRY_AGAIN_S = 3600.0, 5.0
# Creating one waits a second at most for its lock, so that nobody queues up behind it; then it tries again.
ATTEMPTS_MAX = 10

AHEAD_DAYS = Gauge(
    "purchases_partitions_ahead_days", "For so long from now there are partitions; NaN while nobody knows.", ["table"]
)

log = structlog.get_logger()


class Partitions:
    """Knows which partitions exist, and has the missing ones made."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._months: set[datetime.date] = set()
        self._days: set[datetime.date] = set()
        self._making = asyncio.Lock()
        for table in ("purchases", "outbox_events"):
            AHEAD_DAYS.labels(table).set(float("nan"))

    def forget(self) -> None:
        """Somebody dropped a partition that we counted on."""
        self._months.clear()
        self._days.clear()

    def has(self, purchase_time: datetime.datetime, recorded_at: datetime.datetime) -> bool:
        """Whether a sale of that time, recorded at that moment, has its partitions, so far as we know; both in UTC."""
        return recorded_at.date() in self._days and purchase_time.date().replace(day=1) in self._months

    async def ensure(self, months: Iterable[datetime.date], days: Iterable[datetime.date]) -> None:
        """Make what is missing, each in a transaction of its own.

        Raises:
            psycopg.Error: it cannot be made: no connection, no lock, or a month that no purchase can lie in.
        """
        months, days = set(months) - self._months, set(days) - self._days
        if not months and not days:
            return  # nearly always; and nobody waits here for what somebody else lacks
        async with self._making:
            for month in sorted(months - self._months):
                await self._call("SELECT ensure_purchases_month(%s)", month)
                self._months.add(month)
            for day in sorted(days - self._days):
                await self._call("SELECT ensure_outbox_day(%s)", day)
                self._days.add(day)

    async def _call(self, statement: str, argument: datetime.date) -> None:
        backoff = Backoff(0.05, 1.0)
        for attempt in range(1, ATTEMPTS_MAX + 1):
            try:
                async with self._pool.connection() as connection:
                    await connection.execute(statement, [argument])
                return
            except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                if attempt == ATTEMPTS_MAX:
                    raise
                await asyncio.sleep(backoff.next_s())

    async def keep(self) -> None:
        """Create the months and days to come, now and every hour."""
        while True:
            pause_s = CHECK_EVERY_S if await self.look_ahead() else TRY_AGAIN_S
            await asyncio.sleep(pause_s)

    async def look_ahead(self) -> bool:
        """Create the months and days to come; False when that failed, which must not take the sales down with it."""
        months, days = _upcoming(datetime.datetime.now(datetime.UTC).date())
        try:
            await self.ensure(months, days)
        except (psycopg.Error, PoolTimeout) as error:
            log.warning("partitions are not taken care of", error=error)
            return False
        _show_end("purchases", _next(months[-1]))
        _show_end("outbox_events", days[-1] + datetime.timedelta(days=1))
        return True


def _show_end(table: str, end: datetime.date) -> None:
    at = datetime.datetime.combine(end, datetime.time(), datetime.UTC)
    day = datetime.timedelta(days=1)
    AHEAD_DAYS.labels(table).set_function(lambda: (at - datetime.datetime.now(datetime.UTC)) / day)


def _upcoming(today: datetime.date) -> tuple[list[datetime.date], list[datetime.date]]:
    months = [today.replace(day=1)]
    for _ in range(MONTHS_AHEAD):
        months.append(_next(months[-1]))
    return months, [today + datetime.timedelta(days=ahead) for ahead in range(DAYS_AHEAD + 1)]


def _next(month: datetime.date) -> datetime.date:
    return (month + datetime.timedelta(days=32)).replace(day=1)
