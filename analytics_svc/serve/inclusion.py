"""Read-your-writes: callers wait until the purchase of their consistency token is included in the answers.

One query looks for the ids of all callers at once: for a new one at once, for the others when something was announced.
"""

import asyncio
from collections.abc import Sequence

import structlog

from analytics_svc.errors import NotYetVisible, PurchaseQuarantined
from analytics_svc.ingest.announce import Announcement
from chassis.errors import DatabaseUnavailable, Overloaded, ShuttingDown
from chassis.lifecycle import Backoff, wait_set
from chassis.postgres import UNAVAILABLE, Connection, Pool

WAIT_MAX_S = 10.0  # for callers that have more time
ANSWER_BEFORE_S = 0.05  # a caller's deadline: what it takes to tell it
WAITERS_MAX = 2_000  # callers at once: looking for them all takes a few milliseconds, up to a hundred times a second
PAUSE_S = 0.01  # after a look; who comes meanwhile is looked for together
RECHECK_S = 1.0  # should an announcement be late, because its listener's connection died quietly

log = structlog.get_logger()


class Inclusion:
    """Looks for purchases on behalf of those who wait for them."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._waiting: dict[str, set[asyncio.Future[bool]]] = {}  # event id → who waits
        self._count = 0
        self._unchecked: set[str] = set()
        self._check_all = False
        self._wake = asyncio.Event()
        self._trouble = False
        self._draining = False

    async def wait(self, event_id: str, remaining_s: float | None) -> None:
        """Wait until an event is included: whatever reads from now on sees it. `remaining_s` is the caller's time.

        Raises:
            NotYetVisible: it was not in time.
            PurchaseQuarantined: it was refused; waiting does not help.
            Overloaded, ShuttingDown, DatabaseUnavailable
        """
        if self._draining:
            raise ShuttingDown("this server is shutting down; try another one")
        if self._count >= WAITERS_MAX:
            raise Overloaded(f"{WAITERS_MAX} calls wait for their purchases already")
        found: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(event_id, set()).add(found)
        self._count += 1
        self._unchecked.add(event_id)
        self._wake.set()
        try:
            async with asyncio.timeout(_patience_s(remaining_s)):
                included = await found
        except TimeoutError:
            if self._trouble:
                raise DatabaseUnavailable("the database is not available") from None
            raise NotYetVisible(
                "the purchase of consistency_token is not included yet", metadata={"event_id": event_id}
            ) from None
        finally:
            self._count -= 1
            others = self._waiting[event_id]
            others.discard(found)
            if not others:
                del self._waiting[event_id]
        if not included:
            raise PurchaseQuarantined(
                "the event of the purchase is quarantined: it is not counted", metadata={"event_id": event_id}
            )

    def on_announcement(self, _announcement: Announcement) -> None:
        if self._waiting:
            self._check_all = True
            self._wake.set()

    def drain(self) -> None:
        """Send everybody to another server."""
        self._draining = True
        for found in [found for those in self._waiting.values() for found in those if not found.done()]:
            found.set_exception(ShuttingDown("this server is shutting down; try another one"))

    async def run(self) -> None:
        """Look whenever there is reason to, until cancelled."""
        backoff = Backoff(0.1, 2.0)
        while True:
            if not await wait_set(self._wake, RECHECK_S):
                self._check_all = True
            self._wake.clear()
            try:
                await self.run_once()
                self._trouble = False
                backoff.reset()
                await asyncio.sleep(PAUSE_S)
            except UNAVAILABLE as error:
                log.warning("cannot look for purchases that are waited for", error=error)
                self._trouble = self._check_all = True
                self._wake.set()
                await asyncio.sleep(backoff.next_s())

    async def run_once(self) -> None:
        """Look for those who are new or, after an announcement, for all; and tell who is found."""
        ids = list(self._waiting if self._check_all else self._unchecked & self._waiting.keys())
        self._check_all = False
        self._unchecked.clear()
        if not ids:
            return
        async with self._pool.connection() as connection:
            settled = await find_settled(connection, ids)
        for event_id, included in settled:
            for found in self._waiting.get(event_id, ()):
                if not found.done():
                    found.set_result(included)


async def find_settled(connection: Connection, event_ids: Sequence[str]) -> list[tuple[str, bool]]:
    """Those events that are included (True) or quarantined (False). Ids below the log's floor count as included."""
    cursor = await connection.execute(
        """
        SELECT id::text, included
        FROM unnest(%s::uuid[]) AS id
        CROSS JOIN LATERAL (
            SELECT EXISTS (SELECT FROM analytics_event_log WHERE event_id = id)
                OR EXISTS (SELECT FROM freshness WHERE id < log_floor) AS included
        ) AS log
        WHERE included OR EXISTS (SELECT FROM quarantined_events WHERE event_id = id)
        """,
        [list(event_ids)],
    )
    return await cursor.fetchall()


def _patience_s(remaining_s: float | None) -> float:
    """How long a caller waits: until just before its deadline, but for a look at least where that is near."""
    if remaining_s is None:
        return WAIT_MAX_S
    return min(max(remaining_s - ANSWER_BEFORE_S, remaining_s / 2), WAIT_MAX_S)
