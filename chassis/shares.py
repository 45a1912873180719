"""Who may have how many of a pool's connections."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

from psycopg_pool import PoolTimeout

from chassis.postgres import Connection, Pool, PoolBusy


class Shares:
    """The connections of a pool, of which each kind of question has some at most: whatever a crowd asks, however long
    its answers take, other questions find a connection.
    """

    def __init__(self, pool: Pool, most: int, short: Collection[str] = ()) -> None:
        """`most`: connections for one kind, which are fewer than the pool has, unless that has only one. Of kinds that
        are `short`, whose answers take a moment, each may have all but one: what a crowd of them has, others have next.
        """
        self._pool, self._turns = pool, defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(most))
        for kind in short:
            self._turns[kind] = asyncio.Semaphore(max(pool.max_size - 1, 1))

    @asynccontextmanager
    async def connection(self, kind: str, timeout_s: float) -> AsyncIterator[Connection]:
        """A connection for a question of that kind; `timeout_s` bounds the wait for it, in seconds.

        Raises:
            PoolBusy: questions of this kind have all that they may, or all questions all there are.
            PoolTimeout: the database is not there.
        """
        turn, now = self._turns[kind], asyncio.get_running_loop().time
        until = now() + timeout_s
        self._pool.pending += 1
        try:
            async with asyncio.timeout_at(until):
                await turn.acquire()
        except TimeoutError as error:
            if self._pool.is_complete():
                raise PoolBusy(f"many questions of this kind are being answered: {kind}") from error
            raise PoolTimeout("no connection came before it was this one's turn") from error
        finally:
            self._pool.pending -= 1
        try:
            async with self._pool.connection(max(until - now(), 0.001)) as connection:
                yield connection
        finally:
            turn.release()
