"""The one connection on which a query server hears what the write half announces.

On a standby nothing can be heard. There it looks several times a second whether something was announced, and announces
everything.
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from analytics_svc.ingest.announce import CHANNEL, EVERYTHING, Announcement, parse
from chassis.lifecycle import Backoff
from chassis.postgres import UNAVAILABLE, Connection, Pool, on_standby

LOOK_EVERY_S = 0.25

log = structlog.get_logger()


class Listener:
    """Passes announcements on. Nothing is missed: when the connection was lost, EVERYTHING is announced after it."""

    def __init__(
        self,
        pool: Pool,
        tell: Callable[[Announcement], None],
        set_listening: Callable[[bool], Awaitable[None]],
    ) -> None:
        """`set_listening` is told whether the database can be heard, which is whether it is there."""
        self._pool, self._tell, self._set_listening = pool, tell, set_listening
        self._heard = 0  # number of the last announcement

    async def run(self) -> None:
        """Listen until cancelled; over as many connections as it takes."""
        backoff = Backoff(0.1, 2.0)
        while True:
            try:
                async with self._pool.connection() as connection:
                    try:
                        await self._listen(connection, backoff)
                    finally:
                        await connection.close()  # the pool must not hand out one that listens
            except Exception as error:
                known = isinstance(error, UNAVAILABLE)
                await self._set_listening(False)
                pause_s = backoff.next_s()
                log.warning("announcements are not heard", error=error, exc_info=not known)
                await asyncio.sleep(pause_s)

    async def _listen(self, connection: Connection, backoff: Backoff) -> None:
        deaf = on_standby(connection)
        if not deaf:
            await connection.execute(f"LISTEN {CHANNEL}")
        # Listening first: what was announced before is in the count, what comes after is heard.
        self._heard = await _announced_count(connection)
        self._tell(Announcement(self._heard, EVERYTHING))
        await self._set_listening(True)
        backoff.reset()
        if deaf:
            await self._look(connection)
            return
        async for notify in connection.notifies():
            announcement = parse(notify.payload)
            if announcement.number <= self._heard:
                continue  # came while the count was read
            if announcement.number > self._heard + 1:  # never seen; but a gap must not go unnoticed
                announcement = announcement._replace(rows=EVERYTHING)
            self._heard = announcement.number
            self._tell(announcement)

    async def _look(self, connection: Connection) -> None:
        """Until the standby is promoted: then there is something to hear."""
        while on_standby(connection):
            await asyncio.sleep(LOOK_EVERY_S)
            if (count := await _announced_count(connection)) != self._heard:
                self._heard = count
                self._tell(Announcement(count, EVERYTHING))


async def _announced_count(connection: Connection) -> int:
    cursor = await connection.execute("SELECT announced_count FROM freshness")
    ((count,),) = await cursor.fetchall()
    return int(count)
