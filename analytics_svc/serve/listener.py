"""The one connection on which a query server hears what the write half announces.

Every login of the database may announce what it likes, so an announcement is only a hint. The count in the database
tells how many there were; what does not fit it has everything read again.

On a standby nothing can be heard. There it looks several times a second whether something was announced, and announces
everything.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

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
        self._covered = 0  # what these announced is told: everything is read again since

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
        self._tell_everything(await _announced_count(connection))
        await self._set_listening(True)
        backoff.reset()
        if deaf:
            await self._look(connection)
            return
        while True:
            heard = [parse(notify.payload) async for notify in connection.notifies(stop_after=1)]
            self._believe(heard, await _announced_count(connection))

    def _believe(self, announcements: Sequence[Announcement | None], count: int) -> None:
        """Pass on what may be true. Of two with one number, the first may have been the lie."""
        for announcement in announcements:
            if announcement and announcement.number <= self._covered:
                continue
            if announcement is None or not self._heard < announcement.number <= min(self._heard + 1, count):
                self._tell_everything(count)
                return
            self._heard = announcement.number
            self._tell(announcement)

    def _tell_everything(self, count: int) -> None:
        self._heard = self._covered = count
        self._tell(Announcement(count, EVERYTHING))

    async def _look(self, connection: Connection) -> None:
        """Until the standby is promoted: then there is something to hear."""
        while on_standby(connection):
            await asyncio.sleep(LOOK_EVERY_S)
            if (count := await _announced_count(connection)) != self._heard:
                self._tell_everything(count)


async def _announced_count(connection: Connection) -> int:
    cursor = await connection.execute("SELECT announced_count FROM freshness")
    ((count,),) = await cursor.fetchall()
    return int(count)
