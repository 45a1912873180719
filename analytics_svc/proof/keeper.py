"""Keeps the promise of `complete_through_time`: every purchase committed before it is counted or quarantined.

Each cell of the chain has a keeper of its own, and the time that answers bear is that of the cell which is the furthest
behind. One tick: list what was committed there since the last one (the relay reads the time first, then the ids), wait
until each of these ids is counted or quarantined, then store the listing's snapshot and time. One keeper of a cell
works at a time, whoever holds the lock. It does all on the connection that holds the lock: one that lost it can store
nothing any more.

- What holds the time back: an event that is FAILED, or lost between outbox and log, until it is requeued or its day is
  rebuilt. Quarantined events do not. An outage of the relay or a database does, too: no news, no promise.
- A purchases database that was restored, or has lost commits in a failover: the relay sees that the snapshot is not of
  its server's present history and lists everything. What the restored database has of before was counted then, or is
  waited for now; so the old promise still holds, and the time goes on from where it was.
- An analytics database that was restored brings along the snapshot, time and log of one moment: the promise goes on
  from there. What was counted since is missing, so the time stands still until that is published again or rebuilt.
- An outbox that has dropped what the stored snapshot does not have: the relay refuses to list, and the time stands
  still. A full rebuild counts what was recorded before it began, and stores where it began: from there it goes on.
- A clock of the purchases database that ran ahead, or is set back: a listing's time is then before the stored one, and
  new purchases commit before that, so the promise is false. It is taken back, loudly. Nothing else moves it back.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from datetime import datetime
from typing import NamedTuple
from zlib import crc32

import psycopg
import structlog
from prometheus_client import Counter, Gauge

from analytics_svc.errors import RelayUnavailable
from analytics_svc.ingest.announce import announce
from analytics_svc.upstream.outbox import EventsDropped, Listed, SnapshotRefused
from chassis.cells import DEFAULT
from chassis.lifecycle import Backoff
from chassis.postgres import UNAVAILABLE, Connection, Pool
from chassis.signs_of_life import HELD_IN_SILENCE_MAX_S, kept_alive

KEEPER_LOCK = 7_265_746_171  # any number; advisory locks are per database. The other cells' are far above
LOCK_EVERY_S = 1.0  # how often a standby tries to become the keeper
TICK_EVERY_S = 0.5  # from start to start; the time lags by half of it, and by what an event takes to be counted
CHECK_FIRST_S, CHECK_MOST_S = 0.05, 0.5  # pauses before an id that is waited for is looked up again
AWAITED_MAX = (
    1_000_000  # ids kept by a tick, 37 bytes each: the outbox's default limit. With more, it starts over later
)
SHOW_AFTER_S = 1.0  # of waiting: from then on the oldest id is shown to the retention of the log, and to people
WARN_AFTER_S = 30.0
LOST_AFTER_S, LOST_EVERY_S = 30.0, 5.0  # of waiting: from then on the relay is asked whether the broker has lost them

# For the keeper's sessions. One that is frozen or cut off must lose the lock, so that another process takes over.
KEEPER_SESSION = {"idle_session_timeout": f"{HELD_IN_SILENCE_MAX_S:g}s"}

CELL = ["cell"]
TICKS = Counter("analytics_keeper_ticks_total", "Times that complete_through_time was stored.", CELL)
TAKEN_BACK = Counter(
    "analytics_complete_through_taken_back_total",
    "Times that complete_through_time had to go back: a clock was wrong.",
    CELL,
)
LISTED = Counter("analytics_keeper_listed_total", "Event ids that the relay listed as committed.", CELL)
KEEPING = Gauge("analytics_keeper_active", "1 while this process is the keeper of complete_through_time.", CELL)
AWAITED = Gauge("analytics_keeper_awaited", "Committed events that the present tick still waits for.", CELL)
REBUILD_NEEDED = Gauge(
    "analytics_keeper_rebuild_needed",
    "1 while complete_through_time stands still because the outbox has dropped events that may not be counted.",
    CELL,
)
THROUGH = Gauge(
    "analytics_cell_complete_through_timestamp_seconds",
    "What the cell has committed before it is counted or quarantined; told by the cell's keeper, 0 by others.",
    CELL,
)

log = structlog.get_logger()


class Mark(NamedTuple):
    """How far the promise goes: the listing up to which everything is settled, and that listing's time."""

    snapshot: str | None
    complete_through: datetime | None


class Awaited(NamedTuple):
    """Ids that are not settled, in PostgreSQL's text form of an array: a million of them are 37 MB."""

    ids: str
    size: int
    oldest: str


class Keeper:
    """Moves a cell's complete_through_time; any number of processes may run one, and one of them works."""

    def __init__(
        self,
        pool: Pool,
        list_committed: Callable[[str], AsyncGenerator[Listed, None]],
        requeue_lost: Callable[[Sequence[str]], Awaitable[int]],
        *,
        cell: str = DEFAULT,
        awaited_max: int = AWAITED_MAX,
    ) -> None:
        """`requeue_lost` has those of the events published again that will never come by themselves."""
        self._pool, self._list_committed, self._requeue_lost = pool, list_committed, requeue_lost
        self._cell, self._awaited_max = cell, awaited_max
        self._log = log.bind(cell=cell)
        self._keeping, self._awaited, self._through = KEEPING.labels(cell), AWAITED.labels(cell), THROUGH.labels(cell)
        self._rebuild_needed, self._ticks = REBUILD_NEEDED.labels(cell), TICKS.labels(cell)
        self._listed, self._taken_back = LISTED.labels(cell), TAKEN_BACK.labels(cell)

    async def run(self) -> None:
        """Keep, or stand by for the one that does, until cancelled. Trouble only means that nothing new is promised."""
        backoff = Backoff(0.2, 5.0)
        while True:
            try:
                async with self._pool.connection() as connection:
                    try:
                        async with kept_alive(connection):
                            await self._keep(connection, backoff)
                    finally:
                        for gauge in (self._keeping, self._awaited, self._through):
                            gauge.set(0)
                        await connection.close()  # and with it goes the lock
            except Exception as error:
                known = isinstance(error, (*UNAVAILABLE, psycopg.Error, RelayUnavailable, EventsDropped))
                pause_s = backoff.next_s()
                self._log.warning(
                    "complete_through_time stands still; trying again",
                    error=error,
                    pause_s=round(pause_s, 1),
                    exc_info=not known,
                )
                await asyncio.sleep(pause_s)

    async def _keep(self, connection: Connection, backoff: Backoff) -> None:
        while not await try_lock(connection, self._cell):
            self._rebuild_needed.set(0)  # the other one tells
            await asyncio.sleep(LOCK_EVERY_S)
        self._keeping.set(1)
        await hold_back(connection, self._cell)
        self._log.info("this process keeps complete_through_time")
        while True:
            started = time.monotonic()
            await self.run_once(connection)
            backoff.reset()
            await asyncio.sleep(started + TICK_EVERY_S - time.monotonic())

    async def run_once(self, connection: Connection) -> bool:
        """One tick on the connection that holds the lock; True when the time has moved."""
        mark = await read_mark(connection, self._cell)
        try:
            try:
                awaited, listed = await self._list(connection, mark.snapshot or "")
            except SnapshotRefused as error:
                self._log.warning("the relay does not know the stored snapshot; listing everything", error=error)
                awaited, listed = await self._list(connection, "")
        except EventsDropped:
            self._rebuild_needed.set(1)
            raise
        self._rebuild_needed.set(0)
        await self._wait_settled(connection, awaited)
        if listed is None:
            return False  # there was more than could be kept: the next tick lists it
        assert listed.as_of is not None
        async with connection.transaction():
            moved = await store(connection, self._cell, mark, listed.snapshot, listed.as_of)
        if not moved:
            self._log.warning("complete_through_time was changed by others; starting over")
            return False
        if mark.complete_through and listed.as_of < mark.complete_through:
            self._taken_back.inc()
            self._log.error(
                "complete_through_time is taken back: the purchases database's clock was ahead, or is set back",
                promised=str(mark.complete_through),
                now=str(listed.as_of),
            )
        self._ticks.inc()
        self._through.set(listed.as_of.timestamp())
        return True

    async def _list(self, connection: Connection, after_snapshot: str) -> tuple[list[Awaited], Listed | None]:
        """What a listing has that is not settled, and its last part; that is None when it was too much to keep."""
        awaited: list[Awaited] = []
        count = 0
        async with aclosing(self._list_committed(after_snapshot)) as parts:
            async for part in parts:
                self._listed.inc(len(part.event_ids))
                if part.event_ids and (rest := await unsettled(connection, "{" + ",".join(part.event_ids) + "}")):
                    awaited.append(rest)
                    count += rest.size
                    self._awaited.set(count)
                if part.snapshot:
                    return awaited, part
                if count >= self._awaited_max:
                    return awaited, None
        raise RelayUnavailable("the listing has no end")

    async def _wait_settled(self, connection: Connection, awaited: list[Awaited]) -> None:
        """Part after part, so that each is looked up a few times, however long the others take."""
        begin, pauses, shown = time.monotonic(), Backoff(CHECK_FIRST_S, CHECK_MOST_S), None
        warn_at, lost_at = begin + WARN_AFTER_S, begin + LOST_AFTER_S
        while awaited:
            rest = await unsettled(connection, awaited[0].ids)
            if rest is None:
                awaited.pop(0)
                continue
            if rest.size < awaited[0].size:
                pauses.reset()
            awaited[0] = rest
            count = sum(part.size for part in awaited)
            oldest = min(part.oldest for part in awaited)
            self._awaited.set(count)
            now = time.monotonic()
            if now > begin + SHOW_AFTER_S and oldest != shown:
                await show_oldest(connection, self._cell, oldest)
                shown = oldest
            if now > warn_at:
                self._log.warning("complete_through_time waits for events", awaited=count, oldest_event_id=oldest)
                warn_at = now + WARN_AFTER_S
            if now > lost_at:
                with suppress(RelayUnavailable):
                    await self._requeue_lost(rest.ids.strip("{}").split(","))
                lost_at = time.monotonic() + LOST_EVERY_S
            await asyncio.sleep(pauses.next_s())
        self._awaited.set(0)


async def try_lock(connection: Connection, cell: str) -> bool:
    """Become the cell's keeper, for as long as the connection lives; False when there is another one."""
    lock = KEEPER_LOCK + (0 if cell == DEFAULT else crc32(cell.encode()) << 30)
    cursor = await connection.execute("SELECT pg_try_advisory_lock(%s)", [lock])
    ((locked,),) = await cursor.fetchall()
    return bool(locked)


async def hold_back(connection: Connection, cell: str) -> None:
    """From now on the time of all cells is not later than this one's, of which maybe nothing is known yet."""
    await connection.execute("INSERT INTO cell_marks (cell) VALUES (%s) ON CONFLICT DO NOTHING", [cell])


async def read_mark(connection: Connection, cell: str) -> Mark:
    cursor = await connection.execute(
        "SELECT after_snapshot, complete_through_at FROM cell_marks WHERE cell = %s", [cell]
    )
    rows = await cursor.fetchall()
    return Mark(*rows[0]) if rows else Mark(None, None)


async def unsettled(connection: Connection, ids: str) -> Awaited | None:
    """Those of the ids that are neither counted nor quarantined; None when there is none.

    The log has forgotten ids below its floor, none of which was waited for: they count as settled.
    """
    cursor = await connection.execute(
        """
        SELECT array_agg(id)::text, count(*), min(id::text)
        FROM unnest(%s::uuid[]) AS id
        WHERE NOT EXISTS (SELECT FROM analytics_event_log WHERE event_id = id)
            AND NOT EXISTS (SELECT FROM quarantined_events WHERE event_id = id)
            AND NOT EXISTS (SELECT FROM freshness WHERE id < log_floor)
        """,
        [ids],
    )
    (row,) = await cursor.fetchall()
    return Awaited(*row) if row[1] else None


async def show_oldest(connection: Connection, cell: str, event_id: str) -> None:
    """Show what is waited for: the log's retention stops there."""
    async with connection.transaction():
        await _alone(connection)
        await connection.execute("UPDATE cell_marks SET oldest_awaited_id = %s WHERE cell = %s", [event_id, cell])
        await connection.execute(_SUM_UP)


async def store(connection: Connection, cell: str, before: Mark, snapshot: str, as_of: datetime) -> bool:
    """Promise that everything up to a listing is settled; False when the mark is no longer the one it started from.

    Later than the listing's time, the promise would be false: purchases that commit from now on are not in it.
    """
    await _alone(connection)
    cursor = await connection.execute(
        """
        INSERT INTO cell_marks AS mark (cell, after_snapshot, complete_through_at)
        VALUES (%(cell)s, %(snapshot)s, %(as_of)s)
        ON CONFLICT (cell) DO UPDATE SET
            after_snapshot = excluded.after_snapshot,
            complete_through_at = excluded.complete_through_at,
            oldest_awaited_id = NULL
        WHERE mark.after_snapshot IS NOT DISTINCT FROM %(before)s
        """,
        {"cell": cell, "snapshot": snapshot, "as_of": as_of, "before": before.snapshot},
    )
    if cursor.rowcount:
        await connection.execute(_SUM_UP)
        await announce(connection, (), counted=False)
    return bool(cursor.rowcount)


async def _alone(connection: Connection) -> None:
    """Until the commit no other keeper stores: in what it reads then, all cells' marks are the newest."""
    await connection.execute("SELECT FROM freshness FOR UPDATE")


# What holds of all cells: the time stands still while nothing is known of one of them.
_SUM_UP = """
    UPDATE freshness SET
        complete_through_at = CASE WHEN known THEN least_through ELSE complete_through_at END,
        oldest_awaited_id = lowest_id,
        furthest_behind = CASE WHEN cells > 1 THEN least_cell ELSE '' END
    FROM (
        SELECT bool_and(complete_through_at IS NOT NULL) AS known, min(complete_through_at) AS least_through,
            min(oldest_awaited_id::text)::uuid AS lowest_id, count(*) AS cells,
            (array_agg(cell ORDER BY complete_through_at NULLS FIRST, cell))[1] AS least_cell
        FROM cell_marks
    ) AS marks
"""
