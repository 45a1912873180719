"""How an idle relay hears of new events: it says that it waits, and whoever writes an event then tells it so.

NOTIFY takes a lock that all commits of the server share, so it is not sent by the transactions that write, and not
while the relay is busy anyway. What slips through between the two is found by looking.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from chassis.postgres import Pool

CHANNEL = "outbox_events"
LOOKS_S = (0.01, 0.02, 0.04)  # pauses before the relay asks to be told: nothing for a moment is not idle yet
# And after it has asked, or was told: whoever was about to commit then did not see that it waits, or thinks that it has
# been told already. Such transactions are over soon; what takes longer is found by polling.
LOOKS_AFTER_S = (0.05, 0.1, 0.2, 0.4)
WAITING_FOR_S = 10  # how long the word "I wait" counts; it is renewed with each look


class Wakeup:
    """Waits for events, `poll_every_s` at most."""

    def __init__(self, pool: Pool, poll_every_s: float) -> None:
        self._pool, self._poll_every_s = pool, poll_every_s

    @asynccontextmanager
    async def idle(self) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Yields what waits until it is time to look again."""
        looks, looks_after = iter(LOOKS_S), iter(LOOKS_AFTER_S)
        waiting = False

        async def wait() -> None:
            nonlocal waiting, looks_after
            if pause := next(looks, None):
                await asyncio.sleep(pause)
            elif not waiting:
                waiting = True
                await connection.execute(f"LISTEN {CHANNEL}")
                await connection.execute(_WAIT, [WAITING_FOR_S])
            else:
                pause_s = min(next(looks_after, self._poll_every_s), self._poll_every_s)
                async for _ in connection.notifies(timeout=pause_s, stop_after=1):
                    looks_after = iter(LOOKS_AFTER_S)
                await connection.execute(_WAIT, [WAITING_FOR_S])

        async with self._pool.connection() as connection:
            try:
                yield wait
            finally:
                if waiting and not connection.closed:
                    await connection.execute(f"UNLISTEN {CHANNEL}")
                    await connection.execute(
                        "DELETE FROM relay_waiting WHERE pid = pg_backend_pid() OR until < now()"  # those of the dead
                    )


_WAIT = """
INSERT INTO relay_waiting VALUES (pg_backend_pid(), now() + %s * interval '1 second')
ON CONFLICT (pid) DO UPDATE SET until = excluded.until
"""
