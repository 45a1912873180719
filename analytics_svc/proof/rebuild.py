"""Repairs from what was recorded: of one day, and of everything, day by day, while live events go on.

A full rebuild has counted everything committed before it began: where that was, it asks the relay first of all, and
stores it for the keeper in the end. So complete_through_time goes on after events were dropped that it would wait for.

A repair that dies leaves what it has repaired so far; its locks end with its session.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import date
from typing import NamedTuple

import structlog

from analytics_svc.errors import HistoryDropped, PurchaseExists, PurchasesUnavailable, RebuildRunning, RelayUnavailable
from analytics_svc.ingest.apply import apply
from analytics_svc.ingest.event_log import FORGET_LOCK, HOLD_MAX_S
from analytics_svc.ingest.summing import Summing
from analytics_svc.proof import keeper, parts, read_models, repair
from analytics_svc.proof.day import Proof, prove_day
from analytics_svc.proof.parts import Part
from analytics_svc.proof.repair import Repaired, Touched
from analytics_svc.purchase import PurchaseCreated
from analytics_svc.upstream.outbox import Listed
from analytics_svc.upstream.source import Source
from chassis import postgres
from chassis.lifecycle import Backoff
from chassis.postgres import Connection, Pool

ONE_REPAIR_LOCK = 7_265_746_176  # any number; advisory locks are per database
LOCK_ATTEMPTS, LOCK_PAUSE_S = 20, 0.1  # the session of one that died ends within moments
STATEMENT_TIMEOUT_S = 300.0  # a look at a range of a long history takes seconds
CONFLICTS_PATIENCE_S = 30.0  # with other applies, until some purchases are counted; one takes milliseconds
LINES_AT_ONCE = 10_000  # counted in one transaction, well within HOLD_MAX_S
PROOF_ATTEMPTS = 8  # of one day, while the purchases service is away: about half a minute
NAMED_MAX = 10  # events that a log line or an error names
ROUNDS_MAX = 1_000  # of proof and repair of one day; each corrects a thousand entries of the log, and all else

log = structlog.get_logger()


@dataclass
class Rebuilt:
    """What a repair has done so far."""

    complete_from: date | None  # days before were left as they are: their purchases are past the retention
    purchases: int = 0  # recorded on the days in question
    added: int = 0  # purchases that had not been counted
    repaired: Repaired = field(default_factory=Repaired)
    foreign: list[str] = field(default_factory=list)  # events that count no more: nobody recorded them
    right: bool = True  # by the audit's own proof, afterwards


class Progress(NamedTuple):
    steps: int
    steps_done: int
    purchases: int
    stage: str


async def rebuild_day(url: str, source: Source, day: date) -> Rebuilt:
    """Repair a business day and what sums it up, its customers, and whatever else the audit knows to be wrong.

    Purchases of that day that were never counted are counted now. Safe to repeat.

    Raises:
        HistoryDropped: purchases of that day are past their retention, maybe since a moment ago.
        PurchaseExists: an event that counts there is of a recorded purchase that was not exported: a bug of ours.
        RebuildRunning, PurchasesUnavailable, TimeZonesDiffer: try again.
    """
    async with _repairing(url) as pool:
        complete_from = (await source.control_totals(day, day)).complete_from
        if complete_from and day < complete_from:
            raise HistoryDropped(
                f"the recorded purchases are complete from {complete_from} on; {day} cannot be rebuilt"
            )
        done = Rebuilt(complete_from)
        touched = await _rebuild_day(pool, source, day, done)
        await _require_history_since(source, day, complete_from)
        done.repaired += await repair.mend_touched(pool, touched)
        for kind in (read_models.CUSTOMERS, read_models.PRODUCTS):
            async with pool.connection() as connection:
                wrong = await parts.known_wrong(connection, kind)
            for part in wrong:
                done.repaired += await _rebuild_range(pool, part)
        done.repaired += await _rebuild_ranges(pool, read_models.BRANCHES)
    _tell(done, day=str(day))
    return done


async def rebuild_all(
    url: str,
    source: Source,
    today: date,
    *,
    show: Callable[[Progress], None] = lambda _: None,
    positions: Mapping[str, Callable[[], Awaitable[Listed]]] | None = None,
) -> Rebuilt:
    """Repair every day that is recorded or counted, then whatever follows from the days.

    With `positions`, which ask each cell's relay, its keeper goes on from where this began, unless it has come further
    itself, or the retention has dropped what this would have had to count.

    Raises:
        HistoryDropped, PurchaseExists: as `rebuild_day`.
        RebuildRunning, PurchasesUnavailable, TimeZonesDiffer: try again; what is repaired is.
    """
    async with _repairing(url) as pool:
        began = {cell: await _began(pool, cell, position) for cell, position in (positions or {}).items()}
        done = Rebuilt((await source.control_totals(today, today)).complete_from)
        days = await _days(pool, source)
        days = [day for day in days if not done.complete_from or day >= done.complete_from]
        for number, day in enumerate(days):
            show(Progress(len(days), number, done.purchases, str(day)))
            await _rebuild_day(pool, source, day, done)  # what follows is mended with everything else
        for kind in (read_models.CUSTOMERS, read_models.PRODUCTS, read_models.BRANCHES):
            show(Progress(len(days), len(days), done.purchases, kind))
            done.repaired += await _rebuild_ranges(pool, kind)
        await _require_history_since(source, today, done.complete_from)
        for cell, (mark, listed) in began.items():
            if listed and listed.as_of and not done.complete_from:  # it has not counted what was dropped
                async with pool.connection() as connection, connection.transaction():
                    await keeper.store(connection, cell, mark, listed.snapshot, listed.as_of)
    _tell(done)
    return done


def _tell(done: Rebuilt, **of: str) -> None:
    some = done.foreign[:NAMED_MAX]
    log.info("rebuilt", **of, purchases=done.purchases, added=done.added, repaired=done.repaired, foreign=some)


async def _rebuild_day(pool: Pool, source: Source, day: date, done: Rebuilt) -> Touched:
    """Returns whose other rows follow from what was changed.

    Where sales of other days count on this one, those days are repaired, too: that takes them from here. A day that was
    repaired has all that is recorded on it. So whatever the days have of each other, this comes to an end.
    """
    touched = Touched(set(), set(), set())
    waiting, mended = [day], set[date]()
    while waiting:
        proof, elsewhere = await _mend_day(pool, source, waiting[-1], done, touched)
        mended.add(waiting[-1])
        if not elsewhere:
            waiting.pop()
        elif mended.isdisjoint(elsewhere.values()):
            waiting += sorted(set(elsewhere.values()))
        else:
            raise _not_foreign(waiting[-1], elsewhere)
    done.purchases += proof.purchases
    done.right = proof.right
    return touched


async def _mend_day(
    pool: Pool, source: Source, day: date, done: Rebuilt, touched: Touched
) -> tuple[Proof, dict[str, date]]:
    """Prove and repair in turns, until the proof, which is the audit's own, finds nothing more to repair.

    What counts here and is recorded on other days is left to their repair; returns such events, and on which days.

    Raises:
        PurchaseExists: of what is recorded, nothing is taken out.
    """
    elsewhere: dict[str, date] = {}

    async def count(missing: Sequence[PurchaseCreated]) -> None:
        for batch in _batches(missing):
            done.added += await _count_missing(pool, batch)

    for _ in range(ROUNDS_MAX):
        async with pool.connection() as connection:
            began_at = await parts.begin(connection)
        proof = await _prove(pool, source, day, count)
        unknown = [event_id for event_id in proof.foreign if event_id not in elsewhere]
        elsewhere |= await _recorded_elsewhere(pool, source, day, unknown)
        foreign = [event_id for event_id in unknown if event_id not in elsewhere]
        if not (any(proof.difference) or foreign or proof.mistold or proof.visits is not None):
            break
        done.foreign += foreign
        done.repaired += await repair.mend_day(pool, proof._replace(foreign=foreign), touched)
    done.repaired += await repair.mend_range(pool, parts.of_day(day))
    if still := {event_id: elsewhere[event_id] for event_id in proof.foreign if event_id in elsewhere}:
        return proof, still
    async with pool.connection() as connection:
        if not proof.right:
            began_at, proof = await parts.begin(connection), await _prove(pool, source, day, count)
        await parts.store(connection, parts.of_day(day), began_at, proof.comparison)
    return proof, {}


async def _rebuild_ranges(pool: Pool, kind: str) -> Repaired:
    async with pool.connection() as connection:
        every = await parts.ranges(connection, kind)
    repaired = Repaired()
    for part in every:
        repaired += await _rebuild_range(pool, part)
    return repaired


async def _rebuild_range(pool: Pool, part: Part) -> Repaired:
    repaired = await repair.mend_range(pool, part)
    async with pool.connection() as connection:
        began_at = await parts.begin(connection)
        await parts.store(connection, part, began_at, await repair.prove_range(pool, part))
    return repaired


async def _prove(
    pool: Pool, source: Source, day: date, count: Callable[[Sequence[PurchaseCreated]], Awaitable[None]]
) -> Proof:
    """Again from the start when the purchases service was away."""
    backoff = Backoff(0.2, 10.0)
    for attempt in range(1, PROOF_ATTEMPTS + 1):
        try:
            return await prove_day(pool, source, day, count=count)
        except PurchasesUnavailable as error:
            if attempt == PROOF_ATTEMPTS:
                raise
            log.warning("export interrupted; trying again", day=str(day), error=error.message)
            await asyncio.sleep(backoff.next_s())
    raise AssertionError("it returns or raises")


async def _recorded_elsewhere(pool: Pool, source: Source, day: date, event_ids: Sequence[str]) -> dict[str, date]:
    """Of events that count on a day without being recorded on it, those that are recorded on another, and on which.

    The proof did not see them among the exported ones; GetPurchase is another question to the same service. What it
    finds is announced by another event, or is recorded elsewhere, or else one of the answers is wrong.

    Raises:
        PurchaseExists: that is so.
    """
    if not event_ids:
        return {}
    async with pool.connection() as connection:
        cursor = await connection.execute(
            "SELECT purchase_id::text, event_id::text FROM analytics_event_log"
            " WHERE event_id = ANY (%s::uuid[]) AND purchase_id IS NOT NULL",
            [list(event_ids)],
        )
        rows = await cursor.fetchall()
    claimed: dict[str | None, list[str]] = {}  # events, by the purchase that they name
    for purchase, event_id in rows:
        claimed.setdefault(purchase, []).append(event_id)
    recorded = {purchase: on for purchase in claimed if purchase and (on := await source.recorded_day(purchase))}
    elsewhere: dict[str, date] = {}
    exported = set()
    for other in sorted(set(recorded.values())):
        async with aclosing(source.export(other, other)) as chunks:
            async for chunk in chunks:
                for event in chunk:
                    if event.purchase_id in recorded:
                        exported.add(event.purchase_id)
                        if event.event_id in claimed[event.purchase_id]:
                            elsewhere[event.event_id] = other
    lost = {
        event_id: on for purchase, on in recorded.items() if purchase not in exported for event_id in claimed[purchase]
    }
    if lost := lost | {event_id: other for event_id, other in elsewhere.items() if other == day}:
        raise _not_foreign(day, lost)
    return elsewhere


def _not_foreign(day: date, recorded: dict[str, date]) -> PurchaseExists:
    named = ", ".join(sorted(recorded)[:NAMED_MAX])
    log.error("a repair would take recorded purchases out of the numbers: a bug", day=str(day), some=named)
    return PurchaseExists(
        f"{len(recorded)} events that count on {day} are of recorded purchases that the export does not have: {named}."
        " Nothing was taken out. That is a bug"
    )


async def _require_history_since(source: Source, day: date, complete_from: date | None) -> None:
    """Require that the retention has dropped nothing meanwhile: what it dropped was not looked at.

    Raises:
        HistoryDropped: it has.
    """
    now_from = (await source.control_totals(day, day)).complete_from
    if now_from != complete_from:
        raise HistoryDropped(f"the retention has just dropped purchases before {now_from}; try again")


async def _days(pool: Pool, source: Source) -> list[date]:
    """Every day on which either side knows a sale."""
    async with pool.connection() as connection:
        cursor = await connection.execute(
            "SELECT day FROM daily_sales_of_chain UNION SELECT DISTINCT day FROM daily_sales_by_branch"
            " UNION SELECT DISTINCT day FROM analytics_event_log WHERE day IS NOT NULL"
            " UNION SELECT first::date FROM audit_parts WHERE kind = 'day'"
        )
        days = {day for (day,) in await cursor.fetchall()}
    return sorted(days.union((await source.recorded_days("")).days))


async def _began(pool: Pool, cell: str, position: Callable[[], Awaitable[Listed]]) -> tuple[keeper.Mark, Listed | None]:
    """How far the cell's keeper has come, and how far the cell itself."""
    async with pool.connection() as connection:
        mark = await keeper.read_mark(connection, cell)
    try:
        return mark, await position()
    except RelayUnavailable as error:
        log.warning(
            "the relay cannot be asked, so this rebuild does not move complete_through_time", cell=cell, error=error
        )
        return mark, None


@asynccontextmanager
async def _repairing(url: str) -> AsyncIterator[Pool]:
    """A pool, and beside it a session that keeps other repairs away, and the log from forgetting.

    Raises:
        RebuildRunning: another one is at it.
    """
    async with (
        postgres.open_pool(
            url,
            role="analytics_consumer",
            application_name="analytics rebuild",
            size=4,
            statement_timeout_s=STATEMENT_TIMEOUT_S,
        ) as pool,
        pool.connection() as connection,
    ):
        if not await _lock_repairs(connection):
            raise RebuildRunning("another rebuild is running; try again when it is done")
        await connection.execute("SELECT pg_advisory_lock(%s)", [FORGET_LOCK])
        while await Summing(pool).run_once():
            pass  # in portions: what is left is summed up with the apply lock held
        yield pool
        await connection.execute("SELECT pg_advisory_unlock_all()")  # the session's end takes a moment to be seen


async def _lock_repairs(connection: Connection) -> bool:
    for _ in range(LOCK_ATTEMPTS):
        cursor = await connection.execute("SELECT pg_try_advisory_lock(%s)", [ONE_REPAIR_LOCK])
        if await cursor.fetchone() == (True,):
            return True
        await asyncio.sleep(LOCK_PAUSE_S)
    return False


def _batches(events: Sequence[PurchaseCreated]) -> Iterator[list[PurchaseCreated]]:
    """Some at a time, none with more than LINES_AT_ONCE unless it is a single one."""
    batch: list[PurchaseCreated] = []
    lines = 0
    for event in events:
        lines += len(event.items)
        if batch and lines > LINES_AT_ONCE:
            yield batch
            batch, lines = [], len(event.items)
        batch.append(event)
    yield batch


async def _count_missing(pool: Pool, events: Sequence[PurchaseCreated]) -> int:
    """Count those that never were, as the consumer would have.

    Raises:
        postgres.CONFLICT: again and again.
    """
    backoff, now = Backoff(0.01, 1.0), asyncio.get_running_loop().time
    until = now() + CONFLICTS_PATIENCE_S
    while True:
        try:
            async with pool.connection() as connection, connection.pipeline(), connection.transaction():
                await postgres.end_within(connection, HOLD_MAX_S)
                return (await apply(connection, events, [])).counted
        except postgres.CONFLICT:
            if now() > until:
                raise
            await asyncio.sleep(backoff.next_s())
