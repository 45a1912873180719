"""Whether the database takes sales, and whether what it acknowledges would survive it."""

import asyncio
from collections.abc import Awaitable, Callable

import psycopg
import structlog
from prometheus_client import Gauge
from psycopg_pool import PoolTimeout

from chassis.errors import DatabaseUnavailable
from chassis.postgres import Connection, Pool
from chassis.standby import Standing, standing

LOOK_EVERY_S = 1.0

UNSAFE = Gauge(
    "purchases_failover_unsafe",
    "1 while the database has standbys and no commit waits for one: a failover loses acknowledged sales.",
)

log = structlog.get_logger()


class Primary:
    """Sees to it that the process is SERVING while its database is one that sales can be given to."""

    def __init__(
        self, pool: Pool, set_serving: Callable[[bool], Awaitable[None]], *, standby_required: bool = False
    ) -> None:
        """`standby_required`: nothing is acknowledged while commits wait for no standby."""
        self._pool, self._set_serving, self._standby_required = pool, set_serving, standby_required
        self._last: Standing | None = None

    async def watch(self) -> None:
        """Look every second. A database that cannot be reached says nothing new: each call finds out by itself."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self.look()
            except (psycopg.Error, PoolTimeout) as error:
                log.warning("the database's standing is not known", error=error)

    async def look(self) -> None:
        async with self._pool.connection() as connection:
            now = await standing(connection)
            if not now.takes_writes:
                await connection.close()  # the next one may lead to a server that does, or to what this one became
        if now == self._last:
            return
        self._last = now
        UNSAFE.set(now.failover_loses)
        if not now.takes_writes:
            log.error("the database takes no writes: it is a standby, or read-only")
        elif self._standby_required and not now.waits_for_standby:
            log.error("no commit waits for a standby, which is required: no sale is taken in")
        elif now.failover_loses:
            log.error("the database has standbys, but no commit waits for one: a failover loses acknowledged sales")
        await self._set_serving(now.takes_writes and (now.waits_for_standby or not self._standby_required))


async def require_standby(connection: Connection) -> None:
    """
    Raises:
        DatabaseUnavailable: commits wait for no standby.
    """
    if not (await standing(connection)).waits_for_standby:
        raise DatabaseUnavailable("the database has no synchronous standby, which is required")
