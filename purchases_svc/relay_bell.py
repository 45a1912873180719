"""Tells an idle relay that there is something to do.

NOTIFY takes a lock that all commits of the server share: within the transactions that record sales it costs more than
half of their number. So it is sent after the commit, only while a relay waits, and nobody waits for it.
"""

import asyncio

import psycopg
import structlog
from psycopg_pool import PoolTimeout

from chassis.postgres import Pool

log = structlog.get_logger()


class RelayBell:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._ringing: asyncio.Task[None] | None = None

    def ring(self) -> None:
        """Once is enough: whoever wakes up looks for everything that is there, and soon once more."""
        if self._ringing is None or self._ringing.done():
            self._ringing = asyncio.create_task(self._ring())

    async def _ring(self) -> None:
        try:
            async with self._pool.connection() as connection:
                await connection.execute("NOTIFY outbox_events")
        except (psycopg.Error, PoolTimeout) as error:
            log.debug("the relay was not told", error=error)  # it looks by itself, a little later
