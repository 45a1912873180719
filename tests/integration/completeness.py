"""A world in miniature to put `complete_through_time` to the test: real databases and the real functions of purchases'
outbox, relay, consumer and keeper, driven step by step in an order that a seed decides.

Between any two statements of the keeper and of the relay's listing, anything else may happen: sales commit late or not
at all, relays crash before they mark what they published, messages overtake each other and come twice, events are
given up, requeued or quarantined, keepers die, databases are restored. After each step the world compares what
complete_through_time promises with what it knows of every sale.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from datetime import datetime, timedelta
from typing import Any

import psycopg

from analytics_svc.ingest.apply import apply
from analytics_svc.ingest.quarantine import QuarantinedEvent
from analytics_svc.proof import keeper
from analytics_svc.purchase import Item, PurchaseCreated
from analytics_svc.upstream.outbox import Listed
from relay_svc import days, inspection, outbox
from relay_svc.server import OutboxServicer
from retail.relay.v1.outbox_service_pb2 import ListCommittedEventIdsRequest
from tests.integration.outbox_events import new_ids
from tests.integration.purchase_events import NOON

WRITERS, RELAYS = 4, 2
DRAIN_STEPS_MAX = 3_000  # when nothing hinders any more, the keeper arrives long before

List = Callable[[str], AsyncGenerator[Listed, None]]


_MARK = "SELECT (SELECT after_snapshot FROM cell_marks), complete_through_at FROM freshness"


class Lied(AssertionError):
    """complete_through_time promised what was not so."""


class Gate:
    """Where a task stops before each statement, until it is told to go on."""

    def __init__(self) -> None:
        self._parked, self._go = asyncio.Event(), asyncio.Event()

    async def park(self) -> None:
        self._parked.set()
        await self._go.wait()
        self._go.clear()

    async def let_go(self, task: "asyncio.Task[Any]") -> None:
        """Let the task run until it parks again, or ends."""
        self._parked.clear()
        self._go.set()
        parked = asyncio.ensure_future(self._parked.wait())
        await asyncio.wait({task, parked}, return_when=asyncio.FIRST_COMPLETED, timeout=20)
        parked.cancel()


class Gated:
    """A connection (or its cursor) whose statements wait at the gate; not within the keeper's one transaction."""

    def __init__(self, real: Any, gate: Gate) -> None:
        self._real, self._gate, self._free = real, gate, False

    async def execute(self, *arguments: Any, **options: Any) -> Any:
        if not self._free:
            await self._gate.park()
        return await self._real.execute(*arguments, **options)

    async def fetchmany(self, size: int) -> Any:
        await self._gate.park()
        return await self._real.fetchmany(size)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        await self._gate.park()
        self._free = isinstance(self._real, psycopg.AsyncConnection) and self._real.info.dbname.count("analytics") > 0
        try:
            async with self._real.transaction():
                yield
        finally:
            self._free = False

    @asynccontextmanager
    async def cursor(self, name: str) -> AsyncIterator["Gated"]:
        async with self._real.cursor(name=name) as cursor:
            yield Gated(cursor, self._gate)


class GatedPool:
    def __init__(self, url: str, gate: Gate) -> None:
        self._url, self._gate = url, gate

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Gated]:
        async with await connect(self._url, "purchases_relay") as real:
            yield Gated(real, self._gate)


async def connect(url: str, role: str | None = None) -> "psycopg.AsyncConnection[Any]":
    connection = await psycopg.AsyncConnection.connect(url, autocommit=True)
    if role:
        await connection.execute(f"SET role {role}".encode())
    return connection


class World:
    """One history after another, in the same two databases."""

    def __init__(self, purchases_url: str, analytics_url: str) -> None:
        self._purchases_url, self._analytics_url = purchases_url, analytics_url
        self.list_committed: List = self._real_list  # what the keeper asks; tests plant bugs here
        self.moves = 0  # of complete_through_time, over all histories
        self.claims = 0  # sales that were checked to be settled when it passed them

    @asynccontextmanager
    async def open(self) -> AsyncIterator["World"]:
        self._gate = Gate()
        self._owner = await connect(self._purchases_url)
        self._analyst = await connect(self._analytics_url)
        self._writers = [await connect(self._purchases_url) for _ in range(WRITERS)]
        self._relays = [await connect(self._purchases_url, "purchases_relay") for _ in range(RELAYS)]
        self._consumer = await connect(self._analytics_url, "analytics_consumer")
        everybody = [self._owner, self._analyst, self._consumer, *self._writers, *self._relays]
        try:
            yield self
        finally:
            await self._stop_keeper()
            for connection in everybody:
                await connection.close()

    async def history(self, seed: int, steps: int) -> None:
        """Live through one; raise Lied if complete_through_time lies, goes back while the clock does not, or does not
        arrive at the end."""
        chance = self._chance = random.Random(seed)
        await self._begin()
        hardship = {name: chance.random() ** 2 for name in ("crash", "poison", "fail", "restore")}
        actions: list[tuple[Callable[[], Awaitable[None]], float]] = [
            (self._write, 3),
            (self._end_write, 3),
            (self._claim, 2),
            (self._settle_claim, 2),
            (self._consume, 3),
            (self._keep, 9),
            (self._requeue_failed, 0.3),
            (self._crash_keeper, 0.4 * hardship["crash"]),
            (self._take_backups, 0.5),
            (self._restore_purchases, 0.5 * hardship["restore"]),
            (self._restore_analytics, 0.5 * hardship["restore"]),
            (self._turn_clock, 0.8),
        ]
        self._hardship = hardship
        for _ in range(steps):
            (action,) = chance.choices([a for a, _ in actions], [weight for _, weight in actions])
            await action()
            await self._check()
        await self._arrive()

    async def _begin(self) -> None:
        await self._stop_keeper()
        await self._owner.execute("DELETE FROM outbox_events")
        for table in ("analytics_event_log", "quarantined_events"):
            await self._analyst.execute(f"DELETE FROM {table}".encode())
        await self._analyst.execute("DELETE FROM cell_marks")
        await self._analyst.execute("UPDATE freshness SET complete_through_at = NULL")
        self._committed: dict[str, datetime] = {}  # every sale, and a time by which its commit was over
        self._poison: set[str] = set()
        self._open_writes: dict[int, list[str]] = {}
        self._claims: dict[int, list[str]] = {}
        self._queue: list[str] = []
        self._complete_through: datetime | None = None
        self._snapshot: str | None = None
        self._backups: Any = None
        self._ahead, self._turned_back = timedelta(), False

    # The shop.

    async def _write(self) -> None:
        free = [n for n in range(WRITERS) if n not in self._open_writes]
        if not free:
            return
        writer = self._chance.choice(free)
        ids = new_ids(self._chance.randint(1, 3), age_s=self._chance.choice([0, 0, 0, 2]))
        await self._writers[writer].execute("BEGIN")
        await self._writers[writer].execute(
            """
            INSERT INTO outbox_events (event_id, event_type, aggregate_id, occurred_at, payload_json)
            SELECT id, 'PurchaseCreated', gen_random_uuid(), clock_timestamp(), '{}' FROM unnest(%s::uuid[]) AS id
            """,
            [ids],
        )
        self._open_writes[writer] = ids

    async def _end_write(self) -> None:
        if not self._open_writes:
            return
        writer = self._chance.choice(list(self._open_writes))
        ids = self._open_writes.pop(writer)
        if self._chance.random() < 0.15:
            await self._writers[writer].execute("ROLLBACK")
            return
        await self._writers[writer].execute("COMMIT")
        over = await self._purchases_clock()
        self._committed.update(dict.fromkeys(ids, over))
        self._poison.update(i for i in ids if self._chance.random() < self._hardship["poison"] / 3)

    async def _purchases_clock(self) -> datetime:
        row = await (await self._owner.execute("SELECT clock_timestamp()")).fetchone()
        assert row
        moment: datetime = row[0]
        return moment + self._ahead

    # The relays and the broker.

    async def _claim(self) -> None:
        free = [n for n in range(RELAYS) if n not in self._claims]
        if not free:
            return
        relay = self._chance.choice(free)
        await self._relays[relay].execute("BEGIN")
        found = await days.open_days(self._relays[relay])
        retries = await outbox.claim_retries(self._relays[relay], 2, found.days)
        claim = await outbox.claim(self._relays[relay], self._chance.randint(1, 5), outbox.START, found)
        self._claims[relay] = [event.event_id for event in [*retries, *claim.events]]
        self._queue += self._claims[relay]  # published; marked, if ever, by a later step

    async def _settle_claim(self) -> None:
        if not self._claims:
            return
        relay = self._chance.choice(list(self._claims))
        ids = self._claims.pop(relay)
        connection = self._relays[relay]
        if self._chance.random() < self._hardship["crash"] / 2:
            await connection.execute("ROLLBACK")  # it dies: they are published again
            return
        failed = [i for i in ids if self._chance.random() < self._hardship["fail"] / 4]
        for event_id in failed:
            self._queue = [i for i in self._queue if i != event_id]  # it was not published after all
        among = (await days.open_days(connection)).days
        await outbox.mark_sent(connection, [i for i in ids if i not in failed], among)
        await outbox.mark_faulty(connection, dict.fromkeys(failed, "no"), attempts_max=1)
        await connection.execute("COMMIT")

    async def _requeue_failed(self) -> None:
        among = await inspection.days_with(self._owner, "FAILED")
        ids = await inspection.failed_ids(self._owner, among, after=outbox.NIL, limit=100)
        await inspection.requeue(self._owner, ids)

    async def _consume(self) -> None:
        """One of the consumers applies some messages, in any order; it may die before the commit, or before the ack."""
        taken = self._chance.sample(self._queue, min(len(self._queue), self._chance.randint(1, 5)))
        dies = self._chance.random() < self._hardship["crash"] / 3
        good = [
            PurchaseCreated(i, NOON.date(), NOON, self._chance.randint(1, 3), None, 100, [Item(1, 1, 100)])
            for i in taken
            if i not in self._poison
        ]
        bad = [QuarantinedEvent(i, "TOTAL_MISMATCH", "no", i.encode(), {}) for i in taken if i in self._poison]
        async with self._consumer.transaction(force_rollback=dies):
            await apply(self._consumer, good, bad)
        if dies or self._chance.random() < self._hardship["crash"] / 3:
            return
        for event_id in taken:
            self._queue.remove(event_id)
        if taken and self._chance.random() < 0.2:
            self._queue.append(self._chance.choice(taken))  # the broker delivers one again

    # The keeper.

    async def _keep(self) -> None:
        """Let the keeper run its next statements; a new one takes over from one that has ended."""
        if self._keeper is None:
            self._keeper_connection = await connect(self._analytics_url, "analytics_consumer")
            working = keeper.Keeper(None, self.list_committed, self.requeue_lost)  # type: ignore[arg-type] # no run()
            self._keeper = asyncio.ensure_future(self._work(working))
            await asyncio.sleep(0)
        for _ in range(self._chance.choice([1, 1, 2, 5])):
            await self._gate.let_go(self._keeper)
            if self._keeper.done():
                self._keeper.result()  # raises what has ended it

    async def requeue_lost(self, _: Sequence[str]) -> int:
        """The broker of these histories loses nothing."""
        return 0

    _keeper: "asyncio.Task[None] | None" = None

    async def _work(self, working: keeper.Keeper) -> None:
        connection: Any = Gated(self._keeper_connection, self._gate)
        while True:
            await working.run_once(connection)

    async def _crash_keeper(self) -> None:
        await self._stop_keeper()

    async def _stop_keeper(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
            await self._keeper_connection.close()
            self._keeper = None

    async def _real_list(self, after_snapshot: str) -> AsyncGenerator[Listed, None]:
        """The relay's handler itself, on a connection of its own."""
        servicer: Any = OutboxServicer(None, None, GatedPool(self._purchases_url, self._gate), None, None)  # type: ignore[arg-type]
        request = ListCommittedEventIdsRequest(after_snapshot=after_snapshot, acknowledge=True)
        replies = servicer.ListCommittedEventIds(request, None)
        async with aclosing(replies):
            async for reply in replies:
                as_of = reply.as_of_time.ToDatetime(NOON.tzinfo) + self._ahead if reply.snapshot else None
                yield Listed(list(reply.event_ids), reply.snapshot, as_of)

    # Disasters.

    async def _take_backups(self) -> None:
        """Both databases' state, to be restored later; each on its own."""
        rows = await (await self._owner.execute("SELECT event_id::text, status FROM outbox_events")).fetchall()
        log = await (await self._analyst.execute("SELECT event_id::text FROM analytics_event_log")).fetchall()
        bad = await (await self._analyst.execute("SELECT event_id::text FROM quarantined_events")).fetchall()
        mark = await (await self._analyst.execute(_MARK)).fetchone()
        self._backups = dict(rows), {i for (i,) in log}, {i for (i,) in bad}, mark

    async def _end_transactions(self) -> None:
        for writer in list(self._open_writes):
            await self._writers[writer].execute("ROLLBACK")
        for relay in list(self._claims):
            await self._relays[relay].execute("ROLLBACK")
        self._open_writes.clear()
        self._claims.clear()
        await self._stop_keeper()

    async def _restore_purchases(self) -> None:
        """As of the backup: later sales are lost, statuses are old. Transaction ids have another meaning since.

        A real server would hand them out again; here the stored snapshot becomes one that the server cannot know.
        """
        if self._backups is None:
            return
        await self._end_transactions()
        statuses = self._backups[0]
        await self._owner.execute("DELETE FROM outbox_events WHERE event_id <> ALL(%s::uuid[])", [list(statuses)])
        for event_id, status in statuses.items():
            await self._owner.execute(
                "UPDATE outbox_events SET status = %s, next_attempt_at = %s WHERE event_id = %s",
                [status, "infinity" if status == "FAILED" else None, event_id],
            )
        self._committed = {i: over for i, over in self._committed.items() if i in statuses}
        await self._analyst.execute(
            """
            UPDATE cell_marks SET after_snapshot = CASE
                WHEN %s THEN regexp_replace(after_snapshot, '^[0-9]+', '1') -- another server
                ELSE regexp_replace(after_snapshot, ':[0-9]+:[0-9]+:.*$', ':90000000:90000000:') -- its own future
            END
            """,
            [self._chance.random() < 0.5],
        )
        cursor = await self._analyst.execute(_MARK)
        ((self._snapshot, _),) = await cursor.fetchall()

    async def _restore_analytics(self) -> None:
        """As of the backup: the log, the quarantine and the promise; what was counted since is missing."""
        if self._backups is None:
            return
        await self._end_transactions()
        _, log, bad, mark = self._backups
        await self._analyst.execute("DELETE FROM analytics_event_log WHERE event_id <> ALL(%s::uuid[])", [list(log)])
        await self._analyst.execute("DELETE FROM quarantined_events WHERE event_id <> ALL(%s::uuid[])", [list(bad)])
        marked = "UPDATE cell_marks SET (after_snapshot, complete_through_at) = (%s, %s)"
        await self._analyst.execute(marked, list(mark))
        await self._analyst.execute("UPDATE freshness SET complete_through_at = %s", [mark[1]])
        self._snapshot, self._complete_through = mark

    async def _turn_clock(self) -> None:
        """The purchases database's clock is an hour ahead, or right again; a listing under way ends before."""
        await self._stop_keeper()
        ahead = self._chance.choice([timedelta(), timedelta(hours=1)])
        self._turned_back |= ahead < self._ahead
        self._ahead = ahead

    # The truth.

    async def _check(self) -> None:
        cursor = await self._analyst.execute(_MARK)
        ((snapshot, promised),) = await cursor.fetchall()
        if (promised, snapshot) == (self._complete_through, self._snapshot):
            return
        went_back = promised is None or (self._complete_through is not None and promised < self._complete_through)
        if went_back and (promised is None or not self._turned_back):
            raise Lied(f"complete_through_time went back from {self._complete_through} to {promised}")
        self.moves += promised != self._complete_through
        self._complete_through, self._snapshot, self._turned_back = promised, snapshot, False
        before = [event_id for event_id, over in self._committed.items() if promised and over < promised]
        self.claims += len(before)
        if missing := await self._unsettled(before):
            raise Lied(f"{len(missing)} sales committed before {promised} are neither counted nor quarantined")

    async def _unsettled(self, ids: list[str]) -> list[str]:
        """Asked in other words than the keeper does."""
        cursor = await self._analyst.execute(
            "SELECT id::text FROM unnest(%s::uuid[]) AS id EXCEPT"
            " (SELECT event_id::text FROM analytics_event_log UNION SELECT event_id::text FROM quarantined_events)",
            [ids],
        )
        return [event_id for (event_id,) in await cursor.fetchall()]

    async def _arrive(self) -> None:
        """Remove every obstacle: the time must pass the last sale's commit."""
        self._hardship = dict.fromkeys(self._hardship, 0.0)
        while self._open_writes:
            await self._end_write()
        while self._claims:
            await self._settle_claim()
        # What was counted after a backup that was restored, or is given up, is published once more, by hand.
        await inspection.requeue(self._owner, await self._unsettled(list(self._committed)))
        last = await self._purchases_clock()
        for _ in range(DRAIN_STEPS_MAX):
            for action in (self._claim, self._settle_claim, self._consume, self._keep):
                await action()
            await self._check()
            if self._complete_through and self._complete_through > last:
                return
        raise Lied(f"complete_through_time stays at {self._complete_through}; the last sale was before {last}")


def margin(moment: datetime, seconds: float) -> datetime:
    return moment - timedelta(seconds=seconds)
