"""What becomes of messages: counted, or kept in quarantine, whatever they do to the transaction or to the process.

An event is at fault only when something else is not:
- the database refuses it alone, while it takes a made-up sale;
- the process dies of it, again and again, while it is tried alone. Deaths are counted in the database before each
  trial. A trial that takes long takes its count back: whoever lives that long does not die of the event, but waits,
  and may be killed for that.
"""

import asyncio
import uuid
from collections import Counter as Tally
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, date, datetime
from typing import NamedTuple
from zoneinfo import ZoneInfo

import psycopg
import structlog
from prometheus_client import Counter
from psycopg_pool import PoolTimeout

from analytics_svc.errors import quoted
from analytics_svc.ingest import event_log, lanes, messages, quarantine, trials
from analytics_svc.ingest.announce import announce
from analytics_svc.ingest.apply import Applied, apply
from analytics_svc.ingest.events import ID_MAX
from analytics_svc.ingest.messages import Event, Message
from analytics_svc.ingest.quarantine import QuarantinedEvent
from analytics_svc.purchase import PRODUCT_ID_MAX, Item, PurchaseCreated
from chassis import cells, traces
from chassis.cells import Cells
from chassis.postgres import Connection, Pool
from chassis.standby import make_durable

CONNECTION_WAIT_S = 1.0  # the pool is all ours: it lacks a connection only while the database is down
TRIAL_S = 1.0  # what kills does so in milliseconds
LANED_MIN = 100  # messages; fewer are counted in a moment, whose branches they are
WITHDRAWAL_S = 2.0  # a stopping process waits for it; the trial itself may hold the row, and hang
NOTED_MAX = 10_000  # messages of which this process remembers something; another one may settle them
FAILURES_MAX = 3  # of an event alone, with an error that may have other causes, such as a lost connection

# What the database says about the events it was given, rather than about itself. A retry would change nothing.
BLAMED_ON_EVENTS = (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.RaiseException)
# Classes of SQLSTATE that say nothing about the events: connections, the transaction's state (this process stood still
# for too long, the server became read-only), conflicts, room, locks, operators, the system.
BLAMED_ON_NONE = {"08", "25", "40", "53", "55", "57", "58"}

# Reasons; see `events`.
APPLY_FAILED = "APPLY_FAILED"
KILLS_CONSUMER = "KILLS_CONSUMER"
OLDER_THAN_FLOOR = "OLDER_THAN_FLOOR"
CONFLICTING_DUPLICATE = "CONFLICTING_DUPLICATE"

BELOW_FLOOR = "its id is below the floor of the event log: counted and forgotten, or not ours"
OTHER_CONTENT = "an event with this id is counted, and its content is another"

EVENTS = Counter("analytics_events_total", "Deliveries that were settled.", ["outcome"])
COUNTED, DUPLICATE, QUARANTINED = (EVENTS.labels(outcome) for outcome in ("counted", "duplicate", "quarantined"))
ALONE = Counter("analytics_events_tried_alone_total", "Trials of single messages, since a process died with them.")

ANY = cells.only("", "")  # where nobody says which cells there are

log = structlog.get_logger()


class Case(NamedTuple):
    message: Message
    event: Event
    span: traces.Span | None = None  # if it is traced


class Settler:
    """Settles messages in transactions of its own. What it cannot settle now, it raises for: then ask again later."""

    def __init__(self, pool: Pool, zone: ZoneInfo, deaths_max: int, listed: Callable[[], Cells] = lambda: ANY) -> None:
        """`deaths_max`: how many processes may die of a message, tried alone, before it is quarantined unread."""
        self._pool, self._zone, self._deaths_max, self._listed = pool, zone, deaths_max, listed
        self._failures: Tally[bytes] = Tally()  # by digest: that a message failed alone, and the process survived
        self._survived: Tally[bytes] = Tally()  # by digest: trials that are to be withdrawn

    def read(self, message: Message) -> Case:
        return Case(message, messages.read(message, self._zone, self._listed()))

    async def settle(self, cases: Sequence[Case], *, tried: bool = False) -> None:
        """Settle all of them, in as few transactions as the database takes; with `tried`, it ends their trials.

        An event that it refuses is found by halving; the others are settled.

        Raises:
            Exception: what the database, or a bug of ours, says to some of them, or to all.
        """
        while cases:
            try:
                applied, left = await self._apply(cases, tried)
            except Exception as error:
                if not _may_be_the_events_fault(error) or not await self._takes_sales():
                    raise
                if len(cases) == 1:
                    await self._blame(cases[0], error)
                    return
                middle = len(cases) // 2
                halves = [await _outcome(self.settle(half, tried=tried)) for half in (cases[:middle], cases[middle:])]
                for failed in filter(None, halves):
                    raise failed from None
                return
            if self._failures:
                for case in cases:
                    self._failures.pop(case.message.digest(), None)
            COUNTED.inc(applied.counted)
            DUPLICATE.inc(applied.duplicates)
            QUARANTINED.inc(applied.quarantined)
            cases = left

    async def settle_again(self, group: Sequence[Message]) -> None:
        """Settle messages that were delivered before: whoever had them may have died of one of them.

        First all together; those that were tried before, and were not settled then, one by one. Nothing is read before
        it is noted in the database.

        Raises:
            Exception: as `settle`.
        """
        digests = {message.digest() for message in group}
        async with self._pool.connection(CONNECTION_WAIT_S) as connection:
            digests -= await quarantine.digests(connection, KILLS_CONSUMER, digests)
            unseen = await trials.begin(connection, digests)
        if unseen:
            await self.settle([self.read(message) for message in group if message.digest() in unseen], tried=True)
        for message in group:
            if message.digest() in digests - unseen:
                await self._settle_alone(message)

    async def _settle_alone(self, message: Message) -> None:
        ALONE.inc()
        digest = message.digest()
        async with self._pool.connection(CONNECTION_WAIT_S) as connection:
            await trials.withdraw(connection, digest, self._survived.pop(digest, 0))
            deaths = await trials.begin_alone(connection, digest) - 1
        if deaths:
            log.warning("a process ended while it tried this message", message=_name(message), deaths=deaths)
        if deaths >= self._deaths_max:
            detail = f"{deaths} processes ended while they tried it alone"
            log.error("event quarantined unread", message=_name(message), reason=KILLS_CONSUMER, detail=detail)
            await self.settle([Case(message, messages.unread(message, KILLS_CONSUMER, detail))], tried=True)
            return
        trial = asyncio.create_task(self._read_and_settle(message))
        try:
            try:
                await asyncio.wait({trial}, timeout=TRIAL_S)
            finally:  # also when this is cancelled, as at the end of the time to stop in
                if not trial.done() or trial.exception():  # in either case it did not kill
                    await self._withdraw(digest)
            await trial
        finally:
            trial.cancel()

    async def _read_and_settle(self, message: Message) -> None:
        await self.settle([self.read(message)], tried=True)

    async def _withdraw(self, digest: bytes) -> None:
        try:
            async with asyncio.timeout(WITHDRAWAL_S), self._pool.connection(CONNECTION_WAIT_S) as connection:
                await trials.withdraw(connection, digest, 1)
        except Exception:
            _note(self._survived, digest)  # the database hears of it with the next trial

    async def _apply(self, cases: Sequence[Case], tried: bool) -> tuple[Applied, Sequence[Case]]:
        """The one transaction; of many messages, for those of some branches. Returns also those that are left."""
        left: Sequence[Case] = []
        with ExitStack() as until_committed:
            async with (
                self._pool.connection(CONNECTION_WAIT_S) as connection,
                connection.pipeline(),  # statements do not wait for each other's answers, where nobody reads them
                connection.transaction(),
            ):
                if len(cases) >= LANED_MIN and not tried:
                    cases, left = await _in_free_lane(connection, cases)
                until_committed.enter_context(_traced(cases))
                applied = await self._apply_now(connection, cases)
                if tried:
                    await trials.end(connection, [case.message.digest() for case in cases])
                if not (applied.counted or applied.quarantined):
                    await make_durable(connection)  # all is known here, but a standby may not know it yet
        return applied, left

    async def _apply_now(self, connection: Connection, cases: Sequence[Case]) -> Applied:
        applied = await apply(
            connection,
            [case.event for case in cases if isinstance(case.event, PurchaseCreated)],
            [case.event for case in cases if isinstance(case.event, QuarantinedEvent)],
        )
        if refused := _refused(applied):
            unfit = [
                messages.unfit(case.message, case.event.event_id, *refused[id(case.event)])
                for case in cases
                if id(case.event) in refused
            ]
            if quarantined := await quarantine.keep(connection, unfit):
                await announce(connection, (), counted=False)
            applied = applied._replace(quarantined=applied.quarantined + quarantined)
        return applied

    async def redrive(self, quarantine_id: str) -> bool | None:
        """Try a quarantined message again: whether it is counted now; None when it is not in quarantine."""
        try:
            return await self._redrive(quarantine_id)
        except BLAMED_ON_EVENTS as error:
            async with self._pool.connection() as connection:
                await quarantine.change_reason(connection, quarantine_id, APPLY_FAILED, _said(error))
            return False

    async def _redrive(self, quarantine_id: str) -> bool | None:
        async with self._pool.connection() as connection, connection.transaction():
            await event_log.enter(connection)
            kept = await quarantine.find(connection, quarantine_id)
            if kept is None:
                return None
            if not kept.counted or kept.reason == CONFLICTING_DUPLICATE:
                if kept.body_size > len(kept.body):
                    return False
                if kept.reason == KILLS_CONSUMER:
                    log.warning("trying an event that killed consumers", quarantine_id=quarantine_id)
                event = self.read(Message(kept.body, kept.properties)).event
                if isinstance(event, QuarantinedEvent):
                    await quarantine.change_reason(connection, quarantine_id, event.reason, event.detail)
                    return False
                if refused := _refused(await apply(connection, [event], [])):
                    await quarantine.change_reason(connection, quarantine_id, *refused[id(event)])
                    return False
            await quarantine.remove(connection, [quarantine_id])
            await announce(connection, (), counted=False)
        return True

    async def _takes_sales(self) -> bool:
        """Whether a sale of our making could be counted now, with all that belongs to it."""
        try:
            async with self._pool.connection(CONNECTION_WAIT_S) as connection, connection.transaction():
                await apply(connection, [_made_up_sale()], [])
                raise psycopg.Rollback
        except Exception as error:
            log.info("the database takes no sale at all", error=error)
            return False
        return True

    async def _blame(self, case: Case, error: Exception) -> None:
        """An event failed alone, while others pass: quarantine it, at once or, if it may be chance, the third time."""
        digest = case.message.digest()
        _note(self._failures, digest)
        if not isinstance(error, BLAMED_ON_EVENTS) and self._failures[digest] < FAILURES_MAX:
            raise error
        if isinstance(case.event, QuarantinedEvent):
            raise error  # it is not even fit to be kept: a bug of ours
        del self._failures[digest]
        detail = _said(error)
        log.error("event refused by the database", message=_name(case.message), error=error)
        unfit = messages.unfit(case.message, case.event.event_id, APPLY_FAILED, detail)
        await self.settle([Case(case.message, unfit)], tried=True)


def _traced(cases: Sequence[Case]) -> traces.Together:
    """The transaction, in the trace of each of them that has one."""
    return traces.together(
        "apply sales",
        "CLIENT",
        (case.span for case in cases),
        {"db.system.name": "postgresql", "db.operation.name": "apply", "db.operation.batch.size": len(cases)},
    )


async def _in_free_lane(connection: Connection, cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """Those to be settled now, and the others."""
    by_lane: dict[int, list[Case]] = {}
    for case in cases:
        branch_id = case.event.branch_id if isinstance(case.event, PurchaseCreated) else 0
        by_lane.setdefault(lanes.lane_of(branch_id), []).append(case)
    free = await lanes.enter_free(connection, by_lane)
    now = by_lane.pop(next(iter(by_lane)) if free is None else free)
    return now, [case for others in by_lane.values() for case in others]


def _note(tally: Tally[bytes], digest: bytes) -> None:
    """Count one more. Beyond NOTED_MAX digests, the one noted first is forgotten."""
    tally[digest] += 1
    if len(tally) > NOTED_MAX:
        del tally[next(iter(tally))]


def _refused(applied: Applied) -> dict[int, tuple[str, str]]:
    """Reason and detail for each event, by its identity: two with one id may differ."""
    return {id(event): (OLDER_THAN_FLOOR, BELOW_FLOOR) for event in applied.below_floor} | {
        id(event): (CONFLICTING_DUPLICATE, OTHER_CONTENT) for event in applied.conflicting
    }


def _may_be_the_events_fault(error: Exception) -> bool:
    if isinstance(error, psycopg.Error) and error.sqlstate:
        return error.sqlstate[:2] not in BLAMED_ON_NONE
    return not isinstance(error, PoolTimeout)  # a connection lost without a word, or a bug


def _said(error: Exception) -> str:
    if isinstance(error, psycopg.Error):
        return f"SQLSTATE {error.sqlstate}: {quoted(error.diag.message_primary)}"
    return f"{type(error).__name__}: {quoted(str(error))}"


def _made_up_sale() -> PurchaseCreated:
    item = Item(product_id=PRODUCT_ID_MAX, quantity=1, cents=1)
    return PurchaseCreated(
        str(uuid.UUID(int=uuid.uuid4().int | 0xF << 124)),  # above any floor
        date(1970, 1, 1),
        datetime(1970, 1, 1, tzinfo=UTC),
        ID_MAX,
        str(uuid.uuid4()),
        1,
        [item],
    )


def _name(message: Message) -> str:
    return quoted(message.properties.get("message_id"))


async def _outcome(work: Awaitable[None]) -> Exception | None:
    try:
        await work
    except Exception as error:
        return error
    return None
