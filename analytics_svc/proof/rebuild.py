"""Making the read models equal to what was recorded, while live events go on and queries never see a gap.

A rebuild counts the recorded purchases into temporary tables of its own session, with the same code that counts events.
Meanwhile every apply() also appends what it counts to the tail. In the end, while no apply() runs, the rebuild counts
what is in its tail only, and writes the differences between its tables and the real ones, in one transaction.

Why nothing is missing: what was counted before the tail began was recorded before, and so is in the export; what was
counted later is in the tail. What is in both counts once, since the temporary tables have a log of ids, too.

A full rebuild has counted everything committed before it began: where that was, it asks the relay first of all, and
stores it for the keeper in the end. So complete_through_time goes on after events were dropped that it would wait for.

A rebuild that dies leaves nothing but rows in the tail: its tables and its locks end with its session.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import date, timedelta
from typing import NamedTuple

import structlog

from analytics_svc.errors import HistoryDropped, PurchaseExists, PurchasesUnavailable, RebuildRunning, RelayUnavailable
from analytics_svc.ingest import event_log, tail
from analytics_svc.ingest.announce import EVERYTHING, announce
from analytics_svc.ingest.apply import apply, count
from analytics_svc.proof import keeper, read_models, repair
from analytics_svc.purchase import PurchaseCreated
from analytics_svc.upstream.outbox import Listed
from analytics_svc.upstream.source import CUSTOMERS_MAX, Source
from chassis import postgres
from chassis.lifecycle import Backoff
from chassis.postgres import Connection, Pool

ONE_REPAIR_LOCK = 7_265_746_176  # any number; advisory locks are per database
LOCK_ATTEMPTS, LOCK_PAUSE_S = 20, 0.1  # the session of one that died ends within moments
STATEMENT_TIMEOUT_S = 3_600.0  # the final comparison of a long history takes minutes
SESSION_SETTINGS = {"temp_buffers": "64MB", "work_mem": "64MB"}
TAIL_CHUNK = 2_000  # events; as many are counted in less than a second, which an apply() may well wait
CONFLICTS_PATIENCE_S = 30.0  # with other applies, until some purchases are counted; one takes milliseconds
NAMED_MAX = 10  # events in an error
EXPORT_ATTEMPTS = 8  # for one day, while the purchases service is away: about half a minute

log = structlog.get_logger()


class DayRebuilt(NamedTuple):
    purchases: int  # recorded on that day
    repaired: int  # rows of the read models that were wrong
    added: int  # purchases that had not been counted
    foreign: repair.Foreign
    unrepaired_customers: int  # their rows contradict each other, and it takes a full rebuild to repair them


class Rebuilt(NamedTuple):
    purchases: int
    repaired: dict[str, int]  # wrong rows by read model
    foreign: repair.Foreign


class Progress(NamedTuple):
    days: int
    days_done: int
    purchases: int
    stage: str


async def rebuild_day(url: str, source: Source, day: date) -> DayRebuilt:
    """Rebuild a business day, the roll-ups that it is part of, and those of its customers' rows that are wrong.

    Purchases of that day that were never counted are counted now. Safe to repeat.

    Raises:
        HistoryDropped: purchases of that day are past their retention.
        PurchaseExists: an event that would be taken out is of a recorded purchase: a bug of ours.
        RebuildRunning, PurchasesUnavailable, TimeZonesDiffer: nothing was changed.
    """
    async with _repairing(url) as (pool, connection):
        complete_from = (await source.control_totals(day, day)).complete_from
        if complete_from and day < complete_from:
            raise HistoryDropped(
                f"the recorded purchases are complete from {complete_from} on; {day} cannot be rebuilt"
            )
        added = purchases = 0
        async for chunk in _export(source, day, day):
            added += await _count_missing(pool, chunk)
            purchases += len(await _count_apart(connection, chunk))
        async with connection.transaction():
            # What is counted by now is in the tail by now: in one snapshot, the customers' rows are comparable.
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            while events := await tail.take(connection, TAIL_CHUNK):
                await count(connection, [event for event in events if event.day == day])
            wrong = await repair.wrong_customers(connection, day, source.day_of)
        # Asked only now: what left the tail above was recorded before, on whatever day, and so is in this export.
        recorded = await source.control_totals(day, day)
        customers = wrong if len(wrong) <= CUSTOMERS_MAX and not complete_from else []
        if customers and recorded.earliest and recorded.latest:
            async for chunk in _export(source, recorded.earliest, recorded.latest, customers):
                added += await _count_missing(pool, chunk)
                await _count_apart(connection, chunk)
        suspects = await repair.suspects(connection, "day = %(day)s", day)
        await _require_foreign(source, suspects)
        await _require_history_since(source, day, complete_from)

        def concerned(event: PurchaseCreated) -> bool:
            return event.day == day or event.customer_id in customers

        async with connection.transaction():
            await event_log.exclude_applies(connection)
            while events := await tail.take(connection, TAIL_CHUNK):
                await count(connection, [event for event in events if concerned(event)])
            repaired = await repair.replace_day(connection, day, customers)
            foreign = await repair.take_out_foreign(connection, suspects)
            await announce(connection, EVERYTHING, counted=False)
    log.info(
        "day rebuilt", day=str(day), purchases=purchases, repaired=repaired, added=added, foreign=foreign.event_ids
    )
    return DayRebuilt(purchases, repaired, added, foreign, len(wrong) - len(customers))


async def rebuild_all(
    url: str,
    source: Source,
    today: date,
    *,
    days_only: bool = False,
    show: Callable[[Progress], None] = lambda _: None,
    position: Callable[[], Awaitable[Listed]] | None = None,
) -> Rebuilt:
    """Rebuild every read model, or with `days_only` those whose purchases the retention has not dropped.

    With `position`, which asks the relay, the keeper goes on from where this began, unless it has come further itself.

    Raises:
        HistoryDropped: it has dropped some, so what customers bought in all time is not to be had.
        PurchaseExists: as `rebuild_day`.
        RebuildRunning, PurchasesUnavailable, TimeZonesDiffer: nothing was changed.
    """
    async with _repairing(url) as (pool, connection):
        mark = await keeper.read_mark(connection)
        began = await _ask(position) if position else None
        # Asked only now: what was counted before the tail began was recorded before, on whatever day. So was what was
        # committed before the position.
        recorded = await source.control_totals(today, today)
        complete_from = recorded.complete_from
        if complete_from and not days_only:
            raise HistoryDropped(
                f"purchases before {complete_from} were dropped by the retention: customers' rows and sums of all time"
                " cannot be rebuilt from what is left; --days-only rebuilds complete days, and what sums up days"
            )
        first, last = recorded.earliest or today, recorded.latest or today
        first = max(first, complete_from) if complete_from else first
        days = (last - first).days + 1
        purchases = 0
        for number in range(days):
            day = first + timedelta(days=number)
            async for chunk in _export(source, day, day):
                if complete_from:
                    await _count_missing(pool, chunk)
                purchases += len(await _count_apart(connection, chunk))
                show(Progress(days, number, purchases, str(day)))
            await _count_tail(connection)
        suspects = await repair.suspects(connection, "day >= %(day)s", complete_from or date.min)
        await _require_foreign(source, suspects)
        await _require_history_since(source, today, complete_from)
        for name in (*(model.name for model in read_models.ALL), read_models.LOG):
            await connection.execute(f"ANALYZE pg_temp.{name}")
        show(Progress(days, days, purchases, "comparing and writing"))
        async with connection.transaction():
            await event_log.exclude_applies(connection)
            while events := await tail.take(connection, TAIL_CHUNK):
                await count(connection, events)
            repaired = await repair.replace_all(connection, complete_from)
            foreign = await repair.take_out_foreign(connection, suspects)
            if began and began.as_of and not complete_from:  # what the retention has dropped, this has not counted
                await keeper.store(connection, mark, began.snapshot, began.as_of)
            await announce(connection, EVERYTHING, counted=True)
    log.info("rebuilt", purchases=purchases, repaired=repaired, foreign=foreign.total, event_ids=foreign.event_ids)
    return Rebuilt(purchases, repaired, foreign)


async def _ask(position: Callable[[], Awaitable[Listed]]) -> Listed | None:
    try:
        return await position()
    except RelayUnavailable as error:
        log.warning("the relay cannot be asked, so this rebuild does not move complete_through_time", error=error)
        return None


@asynccontextmanager
async def _repairing(url: str) -> AsyncIterator[tuple[Pool, Connection]]:
    """A session with empty copies of all read models, which from now on is told what is counted; and a pool beside it.

    Raises:
        RebuildRunning: another one is at it.
    """
    async with (
        postgres.open_pool(
            url,
            role="analytics_consumer",
            application_name="analytics rebuild",
            size=2,
            statement_timeout_s=STATEMENT_TIMEOUT_S,
            settings=SESSION_SETTINGS,
        ) as pool,
        pool.connection() as connection,
    ):
        if not await _lock_repairs(connection):
            raise RebuildRunning("another rebuild is running; try again when it is done")
        await tail.clear(connection)
        for name in (*(model.name for model in read_models.ALL), read_models.LOG):
            await connection.execute(f"CREATE TEMP TABLE {name} (LIKE public.{name} INCLUDING ALL)")
        await connection.execute("SELECT pg_advisory_lock(%s)", [event_log.REBUILD_LOCK])
        yield pool, connection
        await connection.execute("SELECT pg_advisory_unlock_all()")  # the session's end takes a moment to be seen


async def _lock_repairs(connection: Connection) -> bool:
    for _ in range(LOCK_ATTEMPTS):
        cursor = await connection.execute("SELECT pg_try_advisory_lock(%s)", [ONE_REPAIR_LOCK])
        if await cursor.fetchone() == (True,):
            return True
        await asyncio.sleep(LOCK_PAUSE_S)
    return False


async def _export(
    source: Source, first: date, last: date, customer_ids: Sequence[str] = ()
) -> AsyncIterator[list[PurchaseCreated]]:
    """The purchases of these days; from the start again when the service was away, as who counts them allows."""
    backoff = Backoff(0.2, 10.0)
    for attempt in range(1, EXPORT_ATTEMPTS + 1):
        try:
            async with aclosing(source.export(first, last, customer_ids)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    yield chunk
            return
        except PurchasesUnavailable as error:
            if attempt == EXPORT_ATTEMPTS:
                raise
            log.warning("export interrupted; trying again", day=str(first), error=error.message)
            await asyncio.sleep(backoff.next_s())


async def _require_history_since(source: Source, day: date, complete_from: date | None) -> None:
    """Require that the retention has dropped nothing meanwhile: what it dropped, an export may have missed.

    Raises:
        HistoryDropped: it has.
    """
    now_from = (await source.control_totals(day, day)).complete_from
    if now_from != complete_from:
        raise HistoryDropped(f"the retention has just dropped purchases before {now_from}; try again")


async def _require_foreign(source: Source, suspects: Mapping[str, str | None]) -> None:
    """Require that no event is taken out whose purchase is recorded, unless another event announced that one.

    The export did not have it. This asks another question of the same service, so that no fault which a check and a
    repair share can take a recorded sale out of the numbers.

    Raises:
        PurchaseExists: some are: either of us has a bug.
    """
    recorded: dict[str, str] = {}
    days = set()
    for event_id, purchase_id in suspects.items():
        if purchase_id and (day := await source.recorded_day(purchase_id)):
            recorded[event_id] = purchase_id
            days.add(day)
    for day in sorted(days):
        async for chunk in _export(source, day, day):
            announced = {event.purchase_id: event.event_id for event in chunk}
            recorded = {event: sold for event, sold in recorded.items() if announced.get(sold, event) == event}
    if recorded:
        log.error("a repair would take recorded purchases out of the numbers: a bug of ours", events=sorted(recorded))
        some = ", ".join(sorted(recorded)[:NAMED_MAX])
        raise PurchaseExists(
            f"{len(recorded)} events are counted whose purchases are recorded, but not exported for the days that they"
            f" count on; nothing was changed. This is a bug of ours; report it with these events: {some}"
        )


async def _count_apart(connection: Connection, events: Sequence[PurchaseCreated]) -> list[PurchaseCreated]:
    async with connection.pipeline(), connection.transaction():
        return await count(connection, events)


async def _count_missing(pool: Pool, events: Sequence[PurchaseCreated]) -> int:
    """Count those that never were, as the consumer would have.

    Raises:
        postgres.CONFLICT: again and again.
    """
    async with pool.connection() as connection:
        cursor = await connection.execute(
            "SELECT event_id::text FROM analytics_event_log WHERE event_id = ANY (%s::uuid[])",
            [[event.event_id for event in events]],
        )
        known = {event_id for (event_id,) in await cursor.fetchall()}
    missing = [event for event in events if event.event_id not in known]
    backoff, now = Backoff(0.01, 1.0), asyncio.get_running_loop().time
    until = now() + CONFLICTS_PATIENCE_S
    while missing:
        try:
            async with pool.connection() as connection, connection.pipeline(), connection.transaction():
                return (await apply(connection, missing, [])).counted
        except postgres.CONFLICT:
            if now() > until:
                raise
            await asyncio.sleep(backoff.next_s())
    return 0


async def _count_tail(connection: Connection) -> None:
    """Keep the tail short: what is left of it in the end is counted while nothing else is."""
    while True:
        async with connection.transaction():
            events = await tail.take(connection, TAIL_CHUNK)
            await count(connection, events)
        if len(events) < TAIL_CHUNK:
            return
