"""The comparison of what is counted with what was recorded, by business day and branch.

Recorded before (P1), counted (R), recorded after (P2). Everything counted was recorded, so R ≤ P2. Once
complete_through_time has passed P1's time, everything of P1 is counted or quarantined, so P1 ≤ R + quarantined. Where
P1 = P2, all are equal. A day whose sums break this is looked at row by row.
"""

import asyncio
from datetime import date, datetime

from analytics_svc.proof import contradictions
from analytics_svc.proof.contradictions import Finding
from analytics_svc.proof.day import complete_through, logged_days, prove_day, read_totals
from analytics_svc.proof.verdicts import Comparison, Row, Verdict, at_most, difference
from analytics_svc.upstream.source import Recorded, Source, Totals
from chassis.postgres import Pool

COMPLETE_POLL_S = 0.1
PROVEN_MAX = 5  # days for which one comparison reads all purchases, to tell what their sums mean


async def compare(pool: Pool, source: Source, first: date, last: date, *, wait_s: float) -> Comparison:
    """Compare the sums of 31 days at most, and wait `wait_s` at most for purchases on their way.

    Raises:
        PurchasesUnavailable, TimeZonesDiffer: there is nothing to compare with.
    """
    before = await source.control_totals(first, last)
    comparison = await compare_since(pool, source, before, first, last)
    if comparison.verdict is Verdict.PENDING and await wait_until_complete(pool, before.read_at, wait_s):
        comparison = await compare_since(pool, source, before, first, last)
    return comparison


async def wait_until_complete(pool: Pool, recorded_by: datetime, wait_s: float) -> bool:
    """Wait until all that was recorded by then is counted or quarantined, `wait_s` at most; whether it is."""
    deadline = asyncio.get_running_loop().time() + wait_s
    while True:
        async with pool.connection() as connection:
            through = await complete_through(connection)
        if through is not None and through >= recorded_by:
            return True
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(COMPLETE_POLL_S)


async def compare_since(pool: Pool, source: Source, before: Recorded, first: date, last: date) -> Comparison:
    """Compare with what was recorded before, and what is recorded now."""
    if before.complete_from:
        first = max(first, before.complete_from)  # of what is dropped, the read models alone know
    async with pool.connection() as connection, connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        counted = await read_totals(connection, first, last)
        through = await complete_through(connection)
    complete = through is not None and through >= before.read_at
    after = (await source.control_totals(first, last)).totals if first <= last else {}
    rows = []
    for key in sorted(before.totals.keys() | counted.keys() | after.keys()):
        if first <= key[0] <= last:
            sides = (totals.get(key, Totals()) for totals in (before.totals, counted, after))
            rows.append(_compare(key, *sides, complete=complete))
    findings: list[Finding] = []
    foreign_ids: list[str] = []
    for day in sorted({row.day for row in rows if row.verdict is Verdict.DIFFERENT})[:PROVEN_MAX]:
        if proven := await prove_day(pool, source, day):
            rows = sorted([row for row in rows if row.day != day] + proven.rows)
            findings += proven.findings
            foreign_ids += proven.foreign_ids
    return Comparison(rows, findings, foreign_ids)


async def find_contradictions(pool: Pool, days: list[date]) -> list[Finding]:
    """What the read models say against each other, about these days and about all time."""
    checks = contradictions.find(pool, days, await logged_days(pool, days))
    return [finding async for findings in checks for finding in findings]


async def known_days(pool: Pool, source: Source, day: date) -> tuple[date, date] | None:
    """The first and the last day on which either side knows a sale. `day` may be any."""
    recorded = await source.control_totals(day, day)
    async with pool.connection() as connection:
        cursor = await connection.execute("SELECT min(day), max(day) FROM daily_sales_of_chain")
        (counted,) = await cursor.fetchall()
    days = [known for known in (recorded.earliest, recorded.latest, *counted) if known]
    return (min(days), max(days)) if days else None


def _compare(key: tuple[date, int], before: Totals, counted: Totals, after: Totals, *, complete: bool) -> Row:
    if before == counted == after:
        return Row(*key, after, counted, Verdict.AGREED)
    if at_most(counted, after) and (at_most(before, counted) or not complete):
        return Row(*key, after, counted, Verdict.PENDING, "purchases are on their way")
    return Row(*key, after, counted, Verdict.DIFFERENT, difference(counted, after))
