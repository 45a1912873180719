"""The continuous audit: two things without end, each resting for many times as long as it worked.

It compares the sums of all days on which something changes, or is not right; and it proves one part after the other,
row by row: of those that are wrong, of the days that were touched since they were proven, and of all, the one whose
proof is the oldest. What it found is in `audit_parts`, and nowhere else.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import date, datetime, timedelta
from itertools import cycle

import psycopg
import structlog

from analytics_svc.errors import HistoryDropped, PurchasesUnavailable, TimeZonesDiffer
from analytics_svc.proof import audit_status, parts
from analytics_svc.proof.audit import compare_since, windows
from analytics_svc.proof.day import prove_day
from analytics_svc.proof.parts import Part, Turn
from analytics_svc.proof.read_models import DAY
from analytics_svc.proof.repair import prove_range
from analytics_svc.proof.settled import wait_until_complete
from analytics_svc.proof.verdicts import Comparison, Verdict
from analytics_svc.upstream.source import Source
from chassis import logs
from chassis.lifecycle import Backoff
from chassis.postgres import UNAVAILABLE, Connection, Pool

LOCK_EVERY_S = 2.0  # how often a standby tries to become the auditor
CPU_SHARE = 0.02  # of one core, for everything that an audit lets work: this process, both databases, the service asked
SILENCE_S = 60.0  # a process that is frozen or cut off for so long has lost the lock: another one takes over
STAY_EVERY_S = 10.0
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
        self._turns = cycle(Turn)

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
                        await connection.execute(f"SET idle_session_timeout = '{SILENCE_S:g}s'")
                        async with asyncio.TaskGroup() as works:
                            works.create_task(_stay(connection))
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
        """Compare the sums of days that have changed on either side, or are not right; returns how long it worked.

        `connection` holds the lock: who has lost it compares nothing. What is noted as touched stays so until it was
        compared, by whomever.
        """
        began = time.monotonic()
        async with self._pool.connection() as other:
            position = await parts.recorded_position(other)
        recorded = await self._source.recorded_days(position)
        async with self._pool.connection() as other:
            await parts.note_touched(other, recorded)
            at = await parts.begin(connection)
            days = await parts.due(other)
        waited_s = 0.0
        for first, last in windows(days):
            waited_s += await self._compare(at, [day for day in days if first <= day <= last])
        worked_s = time.monotonic() - began - waited_s
        async with self._pool.connection() as other:
            await parts.store_compared(other, recorded.as_of, timedelta(seconds=worked_s * (1 + self._rest)))
        return worked_s

    async def prove(self, connection: Connection) -> float:
        """Prove the part whose turn it is; returns how long it took."""
        began, turn = time.monotonic(), next(self._turns)
        at = await parts.begin(connection)
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
            async with self._pool.connection() as other:
                await parts.store_failure(other, part, at, error)
            return time.monotonic() - began
        async with self._pool.connection() as other:
            await parts.store(other, part, at, found)
        return time.monotonic() - began

    async def _prove(self, part: Part) -> Comparison:
        if part.kind == DAY:
            return (await prove_day(self._pool, self._source, part.day)).comparison
        return await prove_range(self._pool, part)

    async def _compare(self, at: datetime, days: Sequence[date]) -> float:
        """Days that may be asked for at once; returns how long it only waited."""
        waited_s = 0.0
        try:
            before = await self._source.control_totals(days[0], days[-1])
            found = await compare_since(self._pool, self._source, before, days[0], days[-1])
            if found.verdict is Verdict.PENDING:
                began = time.monotonic()
                await wait_until_complete(self._pool, self._source, before.read_at, self._complete_wait_s)
                waited_s = time.monotonic() - began
                found = await compare_since(self._pool, self._source, before, days[0], days[-1])
        except Exception as error:
            if _is_outage(error):
                raise
            async with self._pool.connection() as connection:
                for day in days:
                    await parts.store_failure(connection, parts.of_day(day), at, error)
            return waited_s
        async with self._pool.connection() as connection:
            for day in days:  # also those of which there is nothing to compare
                await parts.store_sums(connection, day, at, [row for row in found.rows if row.day == day])
        return waited_s


def _is_outage(error: BaseException) -> bool:
    """Whether something is away that the audit needs: then it tries again, rather than finding fault."""
    if isinstance(error, psycopg.Error) and error.sqlstate:
        return error.sqlstate.startswith(("08", "57P"))
    return isinstance(error, (PurchasesUnavailable, TimeZonesDiffer, *UNAVAILABLE))


async def _stay(connection: Connection) -> None:
    """Be heard of on the connection that holds the lock, and hear when it is lost."""
    while True:
        await connection.execute("SELECT 1")
        await asyncio.sleep(STAY_EVERY_S)


async def _try_lock(connection: Connection) -> bool:
    cursor = await connection.execute("SELECT pg_try_advisory_lock(%s)", [audit_status.AUDIT_LOCK])
    return await cursor.fetchone() == (True,)
