"""The continuous audit: looks at what changed since its last cycle, and beside that sweeps through all days for ever.

A cycle compares the sums of the days on which anything was counted since the last one, and lets the read models speak
against each other. The sweep proves one day after the other row by row. Neither may cost more than its share: both
pause for many times as long as they worked, and so take the longer, the larger the read models are.
"""

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Iterable
from datetime import date, datetime, timedelta
from typing import Any, NamedTuple, TypeVar

import psycopg
import structlog
from prometheus_client import Counter, Gauge

from analytics_svc.proof import contradictions
from analytics_svc.proof.audit import compare_since, wait_until_complete
from analytics_svc.proof.contradictions import Finding
from analytics_svc.proof.day import logged_days, prove_day
from analytics_svc.proof.verdicts import Comparison, Row, Verdict, worst
from analytics_svc.upstream.source import CONTROL_TOTALS_DAYS_MAX, Source, Totals
from chassis.errors import ServiceError
from chassis.lifecycle import Backoff
from chassis.postgres import Connection, Pool

AUDIT_LOCK = 7_265_746_177  # any number; advisory locks are per database
LOCK_EVERY_S = 2.0  # how often a standby tries to become the auditor
CPU_SHARE = 0.02  # of one core, for everything that an audit lets work: this process, both databases, the service asked
CYCLE_PAUSE_S = 3.0  # at least, from one cycle to the next
COMPLETE_WAIT_S = 5.0  # for purchases on their way, before a cycle calls them pending
# What was counted shortly before a cycle began may have become visible only later: a transaction's time is its start.
LATE_COMMIT = timedelta(seconds=60)
SECONDS_PER_PURCHASE = 170e-6  # of proving a day, as measured with the service that exports it
GROWTH_MAX = 2  # times, of a day while time is saved for it: more would be a burst of work that nobody saved for
DOUBTFUL_MAX = 10  # days that were found wrong and are proven in each cycle until they are right

CYCLES = Counter("analytics_audit_cycles_total", "Cycles of the continuous audit.", ["verdict"])
BUSY = Counter("analytics_audit_busy_seconds_total", "Time that the audit worked or waited for answers; pauses not.")
WRONG = Gauge("analytics_audit_wrong", "Days and branches whose sums differ, and wrong rows, in the last cycle.")
FOREIGN = Gauge("analytics_audit_foreign_events", "Events counted without having been recorded, in the last cycle.")
PENDING = Gauge("analytics_audit_pending_purchases", "Purchases on their way, in the last cycle.")
CYCLE_AT = Gauge("analytics_audit_cycle_timestamp_seconds", "When the last cycle ended, in the process that audits.")
SWEEP_AT = Gauge("analytics_audit_sweep_timestamp_seconds", "When the last sweep ended, in the process that audits.")

_CUSTOMER = re.compile(r"customer_id \S+")

log = structlog.get_logger()
T = TypeVar("T")


class Report(NamedTuple):
    """What a cycle found."""

    verdict: Verdict
    wrong_rows: list[Row]
    findings: list[Finding]
    foreign_ids: list[str]
    pending: int
    proven_days: int
    seconds: float

    @property
    def doubtful_days(self) -> set[date]:
        """Days to look at again, whatever happens on them."""
        named = {row.day for row in self.wrong_rows} | {finding.day for finding in self.findings if finding.day}
        return set(sorted(named, reverse=True)[:DOUBTFUL_MAX])


class Status(NamedTuple):
    started_at: datetime | None
    ended_at: datetime | None
    report: Report | None
    sweep_day: date | None
    sweep_ended_at: datetime | None


class Auditor:
    """Any number of processes may run one; one of them works."""

    def __init__(
        self,
        pool: Pool,
        source: Source,
        *,
        cpu_share: float = CPU_SHARE,
        cycle_pause_s: float = CYCLE_PAUSE_S,
        complete_wait_s: float = COMPLETE_WAIT_S,
    ) -> None:
        """The pool must have a connection more than those that may be in use otherwise: one holds the lock."""
        self._pool, self._source = pool, source
        self._cycle_share = self._sweep_share = cpu_share / 2
        self._cycle_pause_s, self._complete_wait_s = cycle_pause_s, complete_wait_s
        self._sweep_credit_s = 0.0  # time that the sweep has saved up for its next day
        self._credited_at = time.monotonic()
        self._upcoming: tuple[date | None, int] | None = None  # the sweep's next day and its purchases, once known

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
                        while True:
                            await self.run_once(connection)
                            backoff.reset()
                            await asyncio.sleep(self._cycle_pause_s)
                    finally:
                        await connection.close()  # and with it goes the lock
            except Exception as error:
                known = isinstance(error, (psycopg.Error, ServiceError))
                pause_s = backoff.next_s()
                log.warning("audit interrupted", error=error, pause_s=round(pause_s, 1), exc_info=not known)
                await asyncio.sleep(pause_s)

    async def run_once(self, connection: Connection) -> Report:
        """One cycle. It is stored on `connection`, which holds the lock: who lost it can store nothing."""
        began = time.monotonic()
        status = await read_status(connection)
        cursor = await connection.execute("SELECT now()")
        ((started_at,),) = await cursor.fetchall()
        doubtful = status.report.doubtful_days if status.report else set()
        days = doubtful | await self._touched_days(connection, status.started_at)
        found = [await self._compare(first, last) for first, last in windows(days)]
        sweep_day, swept = await self._sweep(status)
        found += [proof for day in doubtful - {sweep_day} if (proof := await self._prove(day))]
        found += swept
        findings = await self._contradictions(
            sorted(days | ({sweep_day} if sweep_day else set())), whole=sweep_day is None
        )
        report = _report(found, findings, time.monotonic() - began)
        sweep_ended = bool(status.sweep_day) and sweep_day is None
        await _store(connection, started_at, report, sweep_day, sweep_ended)
        _tell(report, sweep_ended)
        return report

    async def _touched_days(self, connection: Connection, since: datetime | None) -> set[date]:
        cursor = await connection.execute(
            "SELECT DISTINCT day FROM analytics_event_log"
            " WHERE processed_at >= coalesce(%s, '-infinity'::timestamptz) AND day IS NOT NULL",
            [since - LATE_COMMIT if since else None],
        )
        return {day for (day,) in await cursor.fetchall()} | {
            self._source.today()
        }  # on which nothing may have been counted, wrongly

    async def _compare(self, first: date, last: date) -> Comparison:
        before = await self._paced(self._source.control_totals(first, last))
        await wait_until_complete(self._pool, before.read_at, self._complete_wait_s)
        return await self._paced(compare_since(self._pool, self._source, before, first, last))

    async def _contradictions(self, days: list[date], *, whole: bool) -> list[Finding]:
        found: list[Finding] = []
        checks = contradictions.find(self._pool, days, await logged_days(self._pool, days), whole_history=whole)
        while (findings := await self._paced(anext(checks, None))) is not None:
            found += findings
        return found

    async def _sweep(self, status: Status) -> tuple[date | None, list[Comparison]]:
        """Prove the next day, once there is time for it; returns the day that was reached, None at the end of all.

        Time is saved for one day only, and what is left of it is not kept: large days must not follow one another
        because small ones came before.
        """
        if self._upcoming is None:
            self._upcoming = await self._paced(self._next_day(status.sweep_day))
        day, purchases = self._upcoming
        if day is None:
            self._upcoming = None
            return None, []
        not_yet = status.sweep_day or day - timedelta(days=1), list[Comparison]()
        if not self._saved_up_for(purchases):
            return not_yet
        # It may have grown many times over since it was counted, as a day does that has just begun.
        recorded = await self._paced(self._source.control_totals(day, day))
        now_there = sum(row.purchases for row in recorded.totals.values())
        if now_there > purchases * GROWTH_MAX:
            self._upcoming = day, now_there
            return not_yet
        self._upcoming = None
        began = time.monotonic()
        try:
            proof = await prove_day(self._pool, self._source, day)
        finally:
            spent_s = time.monotonic() - began
            BUSY.inc(spent_s)
            self._sweep_credit_s = min(self._sweep_credit_s - spent_s, 0.0)
        return day, [proof] if proof else []

    def _saved_up_for(self, purchases: int) -> bool:
        """Whether there is time by now to prove that many."""
        needed_s, now = purchases * SECONDS_PER_PURCHASE, time.monotonic()
        self._sweep_credit_s = min(self._sweep_credit_s + (now - self._credited_at) * self._sweep_share, needed_s)
        self._credited_at = now
        return self._sweep_credit_s >= needed_s

    async def _next_day(self, after: date | None) -> tuple[date | None, int]:
        """The next day that either side knows, and how many purchases were recorded on it."""
        today = self._source.today()
        bounds = await self._source.control_totals(today, today)
        first = max(after + timedelta(days=1) if after else date.min, bounds.complete_from or date.min)
        async with self._pool.connection() as connection:
            cursor = await connection.execute("SELECT min(day) FROM daily_sales_of_chain WHERE day >= %s", [first])
            ((counted,),) = await cursor.fetchall()
        start = max(first, bounds.earliest or date.max)
        while bounds.latest and start <= bounds.latest and (counted is None or start <= counted):
            end = min(start + timedelta(days=CONTROL_TOTALS_DAYS_MAX - 1), bounds.latest)
            window = await self._source.control_totals(start, end)
            if window.totals:
                day = min(day for day, _ in window.totals)
                day = min(day, counted or day)
                return day, sum(row.purchases for key, row in window.totals.items() if key[0] == day)
            start = end + timedelta(days=1)
        return counted, 0

    async def _prove(self, day: date) -> Comparison | None:
        return await self._paced(prove_day(self._pool, self._source, day))

    async def _paced(self, work: Awaitable[T]) -> T:
        """Work, then pause long enough for it to have been a small share of the time."""
        began = time.monotonic()
        result = await work
        spent = time.monotonic() - began
        BUSY.inc(spent)
        await asyncio.sleep(spent * (1 / self._cycle_share - 1))
        return result


def windows(days: Iterable[date]) -> list[tuple[date, date]]:
    """The days in as few ranges as may be asked for at once; days of which there is nothing to know cost nothing."""
    ranges: list[tuple[date, date]] = []
    for day in sorted(days):
        if ranges and (day - ranges[-1][0]).days < CONTROL_TOTALS_DAYS_MAX:
            ranges[-1] = (ranges[-1][0], day)
        else:
            ranges.append((day, day))
    return ranges


async def read_status(connection: Connection) -> Status:
    cursor = await connection.execute(
        "SELECT started_at, ended_at, report, sweep_day, sweep_ended_at FROM audit_status"
    )
    ((started_at, ended_at, report, sweep_day, sweep_ended_at),) = await cursor.fetchall()
    return Status(started_at, ended_at, _parse(report) if report else None, sweep_day, sweep_ended_at)


async def _try_lock(connection: Connection) -> bool:
    cursor = await connection.execute("SELECT pg_try_advisory_lock(%s)", [AUDIT_LOCK])
    return await cursor.fetchone() == (True,)


async def _store(
    connection: Connection, started_at: datetime, report: Report, sweep_day: date | None, sweep_ended: bool
) -> None:
    await connection.execute(
        """
        UPDATE audit_status SET
            started_at = %(started_at)s, ended_at = clock_timestamp(), report = %(report)s, sweep_day = %(sweep_day)s,
            sweep_ended_at = CASE WHEN %(sweep_ended)s THEN clock_timestamp() ELSE sweep_ended_at END
        """,
        {
            "started_at": started_at,
            "report": json.dumps(report, default=str),
            "sweep_day": sweep_day,
            "sweep_ended": sweep_ended,
        },
    )


def _parse(report: list[Any]) -> Report:
    verdict, rows, findings, *rest = report
    return Report(
        Verdict(verdict),
        [
            Row(date.fromisoformat(day), branch, Totals(*recorded), Totals(*counted), Verdict(said), detail)
            for day, branch, recorded, counted, said, detail in rows
        ],
        [Finding(table, key, detail, date.fromisoformat(day) if day else None) for table, key, detail, day in findings],
        *rest,
    )


def _report(found: list[Comparison], findings: list[Finding], seconds: float) -> Report:
    """A day may have been compared more than once: then the last result counts."""
    rows = {(row.day, row.branch_id): row for comparison in found for row in comparison.rows}
    findings = list(dict.fromkeys([*(f for comparison in found for f in comparison.findings), *findings]))
    unproven = {row.day for row in rows.values() if row.verdict is not Verdict.AGREED}
    return Report(
        verdict=worst([*(row.verdict for row in rows.values()), *(Verdict.DIFFERENT for _ in findings)]),
        wrong_rows=[row for row in rows.values() if row.verdict in (Verdict.DIFFERENT, Verdict.FOREIGN)],
        findings=findings,
        foreign_ids=sorted({event_id for comparison in found for event_id in comparison.foreign_ids}),
        pending=Comparison(list(rows.values()), [], []).pending,
        proven_days=len({row.day for row in rows.values()} - unproven),
        seconds=seconds,
    )


def _tell(report: Report, sweep_ended: bool) -> None:
    CYCLES.labels(report.verdict.name.lower()).inc()
    WRONG.set(len(report.wrong_rows) + len(report.findings))
    FOREIGN.set(len(report.foreign_ids))
    PENDING.set(report.pending)
    CYCLE_AT.set_to_current_time()
    if sweep_ended:
        SWEEP_AT.set_to_current_time()
    for row in report.wrong_rows:
        log.error(
            "read model differs from what was recorded" if row.verdict is Verdict.DIFFERENT else "foreign events",
            day=str(row.day),
            branch_id=row.branch_id,
            detail=row.detail,
        )
    for finding in report.findings:
        key = _CUSTOMER.sub("customer_id …", finding.key)  # GetAuditStatus tells whose
        log.error("read model is wrong", table=finding.table, key=key, detail=finding.detail)
    if report.foreign_ids:
        log.error("events that nobody recorded are counted", event_ids=report.foreign_ids)
