"""The continuous audit: two things without end, each resting for many times as long as it worked.

It compares the sums of all days on which something changes, or is not right; and it proves one part after the other,
row by row: of those that are wrong, of the days that were touched since they were proven, and of all, the one whose
proof is the oldest. What it found is in `audit_parts`, and nowhere else.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import date, timedelta
from itertools import cycle

import psycopg
import structlog

from analytics_svc.errors import HistoryDropped, PurchasesUnavailable, TimeZonesDiffer
from analytics_svc.proof import parts
from analytics_svc.proof.audit import compare_since, windows
from analytics_svc.proof.day import prove_day
from analytics_svc.proof.parts import Part, Turn
from analytics_svc.proof.read_models import DAY
from analytics_svc.proof.repair import prove_range
from analytics_svc.proof.settled import wait_until_complete
from analytics_svc.proof.verdicts import Comparison, Row, Verdict
from analytics_svc.upstream.source import CONTROL_TOTALS_DAYS_MAX, Source
from chassis import logs
from chassis.lifecycle import Backoff
from chassis.postgres import UNAVAILABLE, Connection, Pool

AUDIT_LOCK = 7_265_746_177  # any number; advisory locks are per database
LOCK_EVERY_S = 2.0  # how often a standby tries to become the auditor
CPU_SHARE = 0.02  # of one core, for everything that an audit lets work: this process, both databases, the service asked
PAUSE_S = 3.0  # at least, from one look to the next
COMPLETE_WAIT_S = 5.0  # for purchases on their way, before they are called pending

log = structlog.get_logger()


class Auditor:
    """Any number of processes may run one; one of them works."""

    def __init__(
        self,
        pool: Pool,
        source: Source,
        *,
        cpu_share: float = CPU_SHARE,
        pause_s: float = PAUSE_S,
        complete_wait_s: float = COMPLETE_WAIT_S,
    ) -> None:
        """The pool needs three connections: one holds the lock, the two works have one each."""
        self._pool, self._source = pool, source
        self._rest = max(0.0, 2 / cpu_share - 1)  # times the work, as there are two of them
        self._pause_s, self._complete_wait_s = pause_s, complete_wait_s
        self._turns = cycle([*Turn, None])

    async def run(self) -> None:
        """Audit, or stand by for the one that does, until cancelled."""
        backoff = Backoff(1.0, 30.0)
        while True:
            try:
                async with self._pool.connection() as connection:
                    try:
                        while not await _try_lock(connection):  # noqa: ASYNC110 (no event tells of it)
                            await asyncio.sleep(LOCK_EVERY_S)
                        log.info("this process audits")
                        async with asyncio.TaskGroup() as works:
                            works.create_task(self._without_end(self.compare, connection, backoff))
                            works.create_task(self._without_end(self.prove, connection, backoff))
                    finally:
                        await connection.close()  # and with it goes the lock
            except* Exception as errors:
                error = errors.exceptions[0]
                pause_s = backoff.next_s()
                log.warning(
                    "audit interrupted",
                    error=logs.text_of(error),
                    pause_s=round(pause_s, 1),
                    exc_info=None if _is_outage(error) else error,
                )
                await asyncio.sleep(pause_s)

    async def _without_end(
        self, work: Callable[[Connection], Awaitable[float]], connection: Connection, backoff: Backoff
    ) -> None:
        while True:
            worked_s = await work(connection)
            backoff.reset()
            await asyncio.sleep(max(self._pause_s, worked_s * self._rest))

    async def compare(self, connection: Connection) -> float:
        """Compare the sums of days on which something was counted, or that are not right; returns how long it worked.

        `connection` holds the lock: who has lost it gets no further than the beginning.
        """
        began, today = time.monotonic(), self._source.today()
        at = await parts.begin(connection)
        async with self._pool.connection() as other:
            await parts.note_days(other, [today])  # on which nothing may have been counted, wrongly
            days = {today} | await parts.note_counted(other) | await parts.days_not_agreed(other)
        waited_s = await self._compare(days)
        worked_s = time.monotonic() - began - waited_s
        async with self._pool.connection() as other:
            await parts.store_compared(other, at, timedelta(seconds=worked_s * (1 + self._rest)))
        return worked_s

    async def prove(self, connection: Connection) -> float:
        """Prove the part whose turn it is; returns how long it took."""
        began, turn = time.monotonic(), next(self._turns)
        at = await parts.begin(connection)
        if turn is None:
            waited_s = await self._look_through_a_month()
            return time.monotonic() - began - waited_s
        async with self._pool.connection() as other:
            part = await parts.pick(other, turn)
            if part is None:
                return 0.0
            part = await parts.cut(other, part)
        try:
            found = await self._prove(part)
        except HistoryDropped:
            return time.monotonic() - began
        except Exception as error:
            if _is_outage(error):
                raise
            log.warning("not proven", kind=part.kind, first=part.first, last=part.last, error=logs.text_of(error))
            async with self._pool.connection() as other:
                await parts.store_failure(other, part, f"{type(error).__name__}: {logs.text_of(error)}")
            return time.monotonic() - began
        async with self._pool.connection() as other:
            await parts.store(other, part, at, found)
        return time.monotonic() - began

    async def _prove(self, part: Part) -> Comparison:
        if part.kind == DAY:
            return (await prove_day(self._pool, self._source, part.day)).comparison
        return await prove_range(self._pool, part)

    async def _compare(self, days: Iterable[date]) -> float:
        """Returns how long it only waited."""
        waited_s = 0.0
        for first, last in windows(days):
            before = await self._source.control_totals(first, last)
            found = await compare_since(self._pool, self._source, before, first, last)
            if found.verdict is Verdict.PENDING:
                began = time.monotonic()
                await wait_until_complete(self._pool, self._source, before.read_at, self._complete_wait_s)
                waited_s += time.monotonic() - began
                found = await compare_since(self._pool, self._source, before, first, last)
            rows: dict[date, list[Row]] = {}
            for row in found.rows:
                rows.setdefault(row.day, []).append(row)
            async with self._pool.connection() as connection:
                for day in rows:
                    await parts.store_sums(connection, day, rows[day])
        return waited_s

    async def _look_through_a_month(self) -> float:
        """Compare the sums of the next recorded days: those that were never counted are nowhere else to be seen."""
        today = self._source.today()
        bounds = await self._source.control_totals(today, today)
        if not (bounds.earliest and bounds.latest):
            return 0.0
        first = max(bounds.earliest, bounds.complete_from or bounds.earliest)
        async with self._pool.connection() as connection:
            start = await parts.next_window(connection)
            if start is None or not first <= start <= bounds.latest:
                start = first
            end = min(start + timedelta(days=CONTROL_TOTALS_DAYS_MAX - 1), bounds.latest)
            recorded = await self._source.control_totals(start, max(start, end))
            days = {day for day, _ in recorded.totals}
            await parts.note_days(connection, days)
        waited_s = await self._compare(days)
        async with self._pool.connection() as connection:
            await parts.set_next_window(connection, end + timedelta(days=1))
        return waited_s


def _is_outage(error: BaseException) -> bool:
    """Whether something is away that the audit needs: then it tries again, rather than finding fault."""
    if isinstance(error, psycopg.Error) and error.sqlstate:
        return error.sqlstate.startswith(("08", "57P"))
    return isinstance(error, (PurchasesUnavailable, TimeZonesDiffer, *UNAVAILABLE))


async def _try_lock(connection: Connection) -> bool:
    cursor = await connection.execute("SELECT pg_try_advisory_lock(%s)", [AUDIT_LOCK])
    return await cursor.fetchone() == (True,)
