"""The outbox's backlog limit: when nobody takes the events away, sales are refused before the disk is full."""

import asyncio

import psycopg
import structlog
from prometheus_client import Gauge
from psycopg_pool import PoolTimeout

from chassis.postgres import Pool

LOOK_EVERY_S = 2.0

BACKLOG = Gauge("purchases_outbox_backlog", "Events that wait to be published, counted up to the limit.")

log = structlog.get_logger()


class Backlog:
    """Knows whether more events wait in the outbox than may."""

    def __init__(self, pool: Pool, most: int) -> None:
        """`most` events may wait; 0 means any number."""
        self._pool, self._most = pool, most
        self.full = False

    async def watch(self) -> None:
        """Look every two seconds. The count ends at the limit, so it costs what the backlog is worth."""
        while self._most:
            try:
                async with self._pool.connection() as connection:
                    cursor = await connection.execute("SELECT outbox_waiting(%s)", [self._most])
                    row = await cursor.fetchone()
            except (psycopg.Error, PoolTimeout) as error:
                log.warning("the outbox's backlog is not known", error=error)
            else:
                waiting = int(row[0]) if row else 0
                BACKLOG.set(waiting)
                if self.full != (waiting >= self._most):
                    self.full = not self.full
                    log.warning("the outbox is full" if self.full else "the outbox has room again", waiting=waiting)
            await asyncio.sleep(LOOK_EVERY_S)
