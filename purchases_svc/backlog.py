"""The outbox's backlog limit: when nobody takes the events away, sales are refused before the disk is full.

Counting costs what the backlog is worth, when the database has enough to do. So one of all workers counts, and the
longer that takes, the more seldom.
"""

import asyncio

import psycopg
import structlog
from prometheus_client import Gauge
from psycopg_pool import PoolTimeout

from chassis.postgres import Pool

LOOK_EVERY_S = 2.0
PAUSE_FACTOR = 20  # a pause is so many times as long as counting took: at most a twentieth of a core
STATEMENT_TIMEOUT_S = 60.0

BACKLOG = Gauge("purchases_outbox_backlog", "Events that wait to be published, counted up to the limit.")
BACKLOG_MAX = Gauge("purchases_outbox_backlog_max", "The limit, at which sales are refused; 0 is none.")

log = structlog.get_logger()


class Backlog:
    """Knows whether more events wait in the outbox than may."""

    def __init__(self, pool: Pool, most: int) -> None:
        """`most` events may wait; 0 means any number. `pool` has a connection that nobody else needs for long."""
        self._pool, self._most = pool, most
        BACKLOG_MAX.set(most)
        self.full = False

    async def watch(self) -> None:
        """Look every two seconds."""
        while self._most:
            try:
                await self.look()
            except psycopg.errors.ReadOnlySqlTransaction:
                pass  # a standby, which stores no sale
            except (psycopg.Error, PoolTimeout) as error:
                log.warning("the outbox's backlog is not known", error=error)
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> int:
        """How many wait, by a count that is not old; 0 to `most`. Nobody waits for somebody else's counting."""
        async with self._pool.connection() as connection, connection.transaction():
            old = await connection.execute(_IF_OLD, [self._most, LOOK_EVERY_S, PAUSE_FACTOR])
            if old.rowcount:
                await connection.execute(_COUNT, {"most": self._most})
            cursor = await connection.execute("SELECT waiting FROM outbox_backlog")
            ((counted,),) = await cursor.fetchall()
        waiting = min(int(counted), self._most)
        BACKLOG.set(waiting)
        if self.full != (waiting >= self._most):
            self.full = not self.full
            log.warning("the outbox is full" if self.full else "the outbox has room again", waiting=waiting)
        return waiting


_IF_OLD = """
SELECT FROM outbox_backlog
WHERE counted_up_to < %s OR counted_at NOT BETWEEN
    clock_timestamp() - greatest(%s * interval '1 second', %s * took) AND clock_timestamp()
FOR UPDATE SKIP LOCKED
"""
_COUNT = """
WITH started AS MATERIALIZED (SELECT clock_timestamp() AS at),
counted AS MATERIALIZED (
    SELECT at, outbox_waiting(greatest(%(most)s, counted_up_to)::int) AS waiting FROM started, outbox_backlog
)
UPDATE outbox_backlog SET waiting = counted.waiting, counted_up_to = greatest(%(most)s, counted_up_to),
    counted_at = clock_timestamp(), took = clock_timestamp() - counted.at
FROM counted
"""
