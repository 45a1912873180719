"""Read-your-writes: callers wait until the purchase of their consistency token is included in the answers.

One query looks for the ids of all callers at once: for a new one at once, for the others when something was announced.
Only who has to wait after the first look counts as waiting: whatever crowd waits, a purchase that is counted is found.
"""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import structlog

from analytics_svc.errors import NotYetVisible, PurchaseQuarantined
from analytics_svc.ingest.announce import Announcement
from analytics_svc.ingest.events import uuid7_time
from chassis.errors import DatabaseUnavailable, InvalidToken, Overloaded, ServiceError, ShuttingDown
from chassis.lifecycle import Backoff, wait_set
from chassis.postgres import UNAVAILABLE, Connection, Pool

WAIT_MAX_S = 10.0  # for callers that have more time
ANSWER_BEFORE_S = 0.05  # a caller's deadline: what it takes to tell it
ANSWER_EACH_S = 0.0025  # the same for each of those who wait already: their deadlines may be the same
CLOCKS_DIFFER = timedelta(days=1)  # at most, between the servers that make ids, and those that read them
WAITERS_MAX = 2_000  # callers at once: looking for them all takes a few milliseconds, up to a hundred times a second
PAUSE_S = 0.01  # after a look; who comes meanwhile is looked for together
RECHECK_S = 1.0  # should an announcement be late, because its listener's connection died quietly

log = structlog.get_logger()


class Look(NamedTuple):
    """What one look has found."""

    settled: dict[str, bool]  # event id → whether it is included; else it is quarantined
    complete_through_at: datetime | None


class Inclusion:
    """Looks for purchases on behalf of those who wait for them."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._waiting: dict[str, set[asyncio.Future[bool]]] = {}  # event id → who waits
        self._new: dict[asyncio.Future[bool], str] = {}  # those of them that nobody has looked for yet
        self._count = 0
        self._check_all = False
        self._wake = asyncio.Event()
        self._trouble = False
        self._draining = False

    async def wait(self, event_id: str, remaining_s: float | None) -> None:
        """Wait until an event is included: whatever reads from now on sees it. `remaining_s` is the caller's time.

        Raises:
            NotYetVisible: it was not in time.
            InvalidToken: no recorded purchase has it.
            PurchaseQuarantined: it was refused; waiting does not help.
            Overloaded, ShuttingDown, DatabaseUnavailable
        """
        if self._draining:
            raise ShuttingDown("this server is shutting down; try another one")
        patience_s = _patience_s(remaining_s, self._count)
        found: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(event_id, set()).add(found)
        self._count += 1
        self._new[found] = event_id
        self._wake.set()
        try:
            async with asyncio.timeout(patience_s):
                included = await found
        except TimeoutError:
            if self._trouble:
                raise DatabaseUnavailable("the database is not available") from None
            raise NotYetVisible(
                "the purchase of consistency_token is not included yet", metadata={"event_id": event_id}
            ) from None
        finally:
            self._count -= 1
            self._new.pop(found, None)
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
                self._trouble = self._check_all = True  # the new ones are new still
                self._wake.set()
                await asyncio.sleep(backoff.next_s())

    async def run_once(self) -> None:
        """Look for those who are new or, after an announcement, for all. Tell who is found, or would wait in vain."""
        new, check_all, self._check_all = dict(self._new), self._check_all, False
        ids = list(self._waiting if check_all else set(new.values()))
        if not ids:
            return
        async with self._pool.connection() as connection:
            look = await find_settled(connection, ids)
        for event_id, included in look.settled.items():
            for found in self._waiting.get(event_id, ()):
                if not found.done():
                    found.set_result(included)
        for found, event_id in new.items():
            self._new.pop(found, None)
            if not found.done() and (refusal := self._refusal(event_id, look)):
                found.set_exception(refusal)

    def _refusal(self, event_id: str, look: Look) -> ServiceError | None:
        """Why one that was not found should not wait."""
        if is_made_up(event_id, look.complete_through_at):
            return InvalidToken("no recorded purchase has this consistency_token")
        if self._count - len(self._new) > WAITERS_MAX:
            return Overloaded(f"{WAITERS_MAX} calls wait for their purchases already")
        return None


def is_made_up(event_id: str, complete_through_at: datetime | None) -> bool:
    """Whether an id that is not settled is that of no recorded purchase, by the time in it: it is to come, or from a
    time of which every purchase is settled."""
    recorded_at = uuid7_time(event_id)
    if recorded_at is None:
        return True
    try:
        moment = datetime.fromtimestamp(recorded_at, UTC)
    except (ValueError, OverflowError):  # of the year 10889, at most
        return True
    if moment > datetime.now(UTC) + CLOCKS_DIFFER:
        return True
    return complete_through_at is not None and moment < complete_through_at - CLOCKS_DIFFER


async def find_settled(connection: Connection, event_ids: Sequence[str]) -> Look:
    """Those events that are included or quarantined. Ids below the log's floor count as included."""
    cursor = await connection.execute(
        """
        SELECT complete_through_at, settled.id::text, included
        FROM freshness LEFT JOIN LATERAL (
            SELECT id, included
            FROM unnest(%s::uuid[]) AS id
            CROSS JOIN LATERAL (
                SELECT EXISTS (SELECT FROM analytics_event_log WHERE event_id = id)
                    OR coalesce(id < log_floor, false) AS included
            ) AS log
            WHERE included OR EXISTS (SELECT FROM quarantined_events WHERE event_id = id)
        ) AS settled ON true
        """,
        [list(event_ids)],
    )
    rows = await cursor.fetchall()
    return Look({event_id: included for _, event_id, included in rows if event_id}, rows[0][0])


def _patience_s(remaining_s: float | None, waiting: int) -> float:
    """How long a caller waits: until just before its deadline, but for a look at least where that is near.

    The more wait already, the earlier it is told: those who came together with one deadline are told one by one.
    """
    if remaining_s is None:
        return WAIT_MAX_S
    return min(max(remaining_s - ANSWER_BEFORE_S - waiting * ANSWER_EACH_S, remaining_s / 2), WAIT_MAX_S)
