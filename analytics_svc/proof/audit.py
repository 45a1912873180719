"""The comparison of what is counted with what was recorded, by business day and branch.

Recorded before (P1), counted (R), recorded after (P2). Everything counted was recorded, so R ≤ P2. Once
complete_through_time has passed P1's time, everything of P1 is counted or quarantined, so P1 ≤ R + quarantined. Where
P1 = P2, all are equal. A day whose sums break this is looked at row by row.
"""

from collections.abc import Iterable
from datetime import date, timedelta

from analytics_svc.proof import parts
from analytics_svc.proof.day import DayTooLarge, prove_day, read_totals
from analytics_svc.proof.settled import complete_through, wait_until_complete
from analytics_svc.proof.verdicts import Comparison, Finding, Row, Verdict, at_most, difference
from analytics_svc.upstream.source import CONTROL_TOTALS_DAYS_MAX, Recorded, Source, Totals
from chassis.postgres import Pool

PROVEN_MAX = 5  # days for which one comparison reads all purchases, to tell what their sums mean


async def compare(pool: Pool, source: Source, first: date, last: date, *, wait_s: float) -> Comparison:
    """Compare the sums of 31 days at most, and wait `wait_s` at most for purchases on their way.

    Days that had to be looked at row by row are known to the audit afterwards.

    Raises:
        PurchasesUnavailable, TimeZonesDiffer: there is nothing to compare with.
    """
    before = await source.control_totals(first, last)
    comparison = await compare_since(pool, source, before, first, last)
    if comparison.verdict is Verdict.PENDING and await wait_until_complete(pool, source, before.read_at, wait_s):
        comparison = await compare_since(pool, source, before, first, last)
    return comparison


async def compare_since(pool: Pool, source: Source, before: Recorded, first: date, last: date) -> Comparison:
    """Compare with what was recorded before, and what is recorded now."""
    if before.complete_from:
        first = max(first, before.complete_from)  # of what is dropped, the read models alone know
    if first > last:
        return Comparison([], [], [])
    async with pool.connection() as connection, connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        counted = await read_totals(connection, first, last)
        through = await complete_through(connection)
    after = await source.control_totals(first, last)
    complete = through is not None and before.read_at <= through <= after.read_at  # later: their clock was wrong
    rows = []
    for key in sorted(before.totals.keys() | counted.keys() | after.totals.keys()):
        if first <= key[0] <= last:
            sides = (totals.get(key, Totals()) for totals in (before.totals, counted, after.totals))
            rows.append(_compare(key, *sides, complete=complete))
    findings: list[Finding] = []
    foreign_ids: list[str] = []
    more = [0, 0]
    for day in sorted({row.day for row in rows if row.verdict is Verdict.DIFFERENT})[:PROVEN_MAX]:
        async with pool.connection() as connection:
            began_at = await parts.begin(connection)
        try:
            proven = (await prove_day(pool, source, day)).comparison
        except DayTooLarge:
            continue
        async with pool.connection() as connection:
            await parts.store(connection, parts.of_day(day), began_at, proven)
        rows = sorted([row for row in rows if row.day != day] + proven.rows)
        findings += proven.findings
        foreign_ids += proven.foreign_ids
        more = [more[0] + proven.more_findings, more[1] + proven.more_foreign]
    return Comparison(rows, findings, foreign_ids, *more)


async def known_days(
    pool: Pool, source: Source, first: date, last: date
) -> tuple[date | None, date | None, date | None]:
    """Business days of the earliest and latest sale that either side knows, and of the first one after `last`."""
    recorded = await source.control_totals(first, first)
    async with pool.connection() as connection:
        cursor = await connection.execute(
            "SELECT min(day), max(day), min(day) FILTER (WHERE day > %s) FROM daily_sales_of_chain", [last]
        )
        ((earliest, latest, counted_next),) = await cursor.fetchall()
    days = [known for known in (recorded.earliest, recorded.latest, earliest, latest) if known]
    following = [counted_next] if counted_next else []
    if recorded.earliest and recorded.latest and recorded.latest > last:  # so `last` has a day after it
        following.append(max(recorded.earliest, last + timedelta(days=1)))
    return min(days, default=None), max(days, default=None), min(following, default=None)


def windows(days: Iterable[date]) -> list[tuple[date, date]]:
    """The days in as few ranges as may be asked for at once; days of which there is nothing to know cost nothing."""
    ranges: list[tuple[date, date]] = []
    for day in sorted(days):
        if ranges and (day - ranges[-1][0]).days < CONTROL_TOTALS_DAYS_MAX:
            ranges[-1] = (ranges[-1][0], day)
        else:
            ranges.append((day, day))
    return ranges


def _compare(key: tuple[date, int], before: Totals, counted: Totals, after: Totals, *, complete: bool) -> Row:
    if before == counted == after:
        return Row(*key, after, counted, Verdict.AGREED)
    if at_most(counted, after) and (at_most(before, counted) or not complete):
        return Row(*key, after, counted, Verdict.PENDING, "purchases are on their way")
    return Row(*key, after, counted, Verdict.DIFFERENT, difference(counted, after))
