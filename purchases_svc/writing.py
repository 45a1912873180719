"""The connections of the write path: none of them may hang, and nothing is acknowledged before it is safe."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from chassis.postgres import Connection, Pool, patience
from purchases_svc.primary import require_standby

# The part of a flush's time for a try, where somebody waits at a till. What takes longer is tried on another
# connection, and answered before the till's deadline: of 10 s, 2.5 s and the second that it takes to cut off a
# connection, beside the 5 s of `pos.calls.ATTEMPT_TIMEOUT_S`.
AT_A_TILL = 4


class Writing:
    def __init__(self, pool: Pool, patience_s: float, *, standby_required: bool) -> None:
        self.pool, self.patience_s = pool, patience_s
        self._standby_required = standby_required

    @asynccontextmanager
    async def connection(self, *, at_a_till: bool = False) -> AsyncIterator[Connection]:
        """A connection that is given up when the server is frozen and does not even end its statements in time."""
        async with self.pool.connection() as connection:
            with patience(connection, self.patience_s / AT_A_TILL if at_a_till else self.patience_s):
                yield connection

    async def confirm(self, connection: Connection) -> None:
        """Nothing is acknowledged without a standby that is required: commits may have stopped waiting for one.

        Raises:
            DatabaseUnavailable
        """
        if self._standby_required:
            await require_standby(connection)
