"""What the audit says: what is known of all parts, and how old that is."""

from datetime import date, datetime, timedelta
from typing import Any, NamedTuple

from analytics_svc.proof.verdicts import Comparison, Finding, Row, Verdict, worst
from analytics_svc.upstream.source import Totals
from chassis.postgres import Connection

PARTS_NAMED_MAX = 50  # that are wrong and told of, the longest wrong first
STALE_AFTER = timedelta(minutes=15)  # at least; three times what a look at everything that changes took
GONE_AFTER = timedelta(minutes=1)  # while no process audits: another one takes over within seconds
AUDIT_LOCK = 7_265_746_177  # whose holder audits; any number, advisory locks are per database


class CellMark(NamedTuple):
    """How far a cell's sales go."""

    cell: str
    complete_through: datetime | None  # None: nothing is known of it
    lag: timedelta | None  # how long ago that is
    oldest_awaited_id: str | None


class Status(NamedTuple):
    """What the audit says."""

    verdict: Verdict | None  # None: nothing was looked at so far
    compared_through: datetime | None  # what was recorded before was in a comparison of its day's sums, by their clock
    compared_at: datetime | None  # when that was done
    compare_duration: timedelta
    stale: bool  # that is too long ago: nobody audits
    rows: list[Row]
    findings: list[Finding]
    foreign_ids: list[str]
    wrong: int  # of everything, named or not
    foreign: int
    pending: int
    pending_since: datetime | None
    proven_days: int
    unproven_days: int  # that were never proven row by row
    oldest_day: date | None  # the one whose proof is the oldest
    oldest_at: datetime | None  # everything was proven since; None while something never was
    cell_marks: list[CellMark]  # that of the cell which is the furthest behind first


async def read(connection: Connection) -> Status:
    """In one snapshot: what it says is of one moment."""
    async with connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        cursor = await connection.execute(
            """
            SELECT status.*, parts.*
            FROM (
                SELECT compared_through, compared_at, compare_duration,
                    compared_at IS NULL OR now() > compared_at + greatest(%(stale)s, 3 * compare_duration)
                    OR now() > compared_at + %(gone)s AND NOT EXISTS (
                        SELECT FROM pg_locks
                        WHERE locktype = 'advisory' AND database = (
                            SELECT oid FROM pg_database WHERE datname = current_database()
                        ) AND classid::bigint << 32 | objid::bigint = %(lock)s AND objsubid = 1 AND granted
                    )
                FROM audit_status
            ) AS status, (
                SELECT array_agg(DISTINCT verdict) FILTER (WHERE verdict IS NOT NULL),
                    coalesce(sum(wrong_count), 0)::bigint, coalesce(sum(foreign_count), 0)::bigint,
                    coalesce(sum(pending_count), 0)::bigint, min(since) FILTER (WHERE verdict = 2),
                    count(*) FILTER (WHERE kind = 'day' AND verdict = 1 AND proven_at IS NOT NULL),
                    count(*) FILTER (WHERE kind = 'day' AND proven_at IS NULL),
                    (array_agg(first ORDER BY proven_at) FILTER (WHERE kind = 'day' AND proven_at IS NOT NULL))[1],
                    CASE WHEN count(*) = count(proven_at) THEN min(proven_at) END
                FROM audit_parts
            ) AS parts
            """,
            {"stale": STALE_AFTER, "gone": GONE_AFTER, "lock": AUDIT_LOCK},
        )
        ((through, at, duration, stale, verdicts, *counts, oldest_day, oldest_at),) = await cursor.fetchall()
        wrong, foreign, pending, pending_since, proven, unproven = counts
        cursor = await connection.execute(
            "SELECT found FROM audit_parts WHERE verdict <> 1 ORDER BY since, kind, first LIMIT %s", [PARTS_NAMED_MAX]
        )
        found = [_parse(found) for (found,) in await cursor.fetchall()]
        cursor = await connection.execute(
            """
            SELECT cell, complete_through_at, now() - complete_through_at, oldest_awaited_id::text
            FROM cell_marks ORDER BY complete_through_at NULLS FIRST, cell
            """
        )
        cell_marks = [CellMark(*row) for row in await cursor.fetchall()]
    return Status(
        verdict=worst(map(Verdict, verdicts)) if verdicts else None,
        compared_through=through,
        compared_at=at,
        compare_duration=duration,
        stale=stale,
        rows=[row for part in found for row in part.rows],
        findings=list(dict.fromkeys(finding for part in found for finding in part.findings)),
        foreign_ids=sorted({event_id for part in found for event_id in part.foreign_ids}),
        wrong=wrong,
        foreign=foreign,
        pending=pending,
        pending_since=pending_since,
        proven_days=proven,
        unproven_days=unproven,
        oldest_day=date.fromisoformat(oldest_day) if oldest_day else None,
        oldest_at=oldest_at,
        cell_marks=cell_marks,
    )


def _parse(found: list[Any]) -> Comparison:
    rows, findings, foreign_ids = found
    return Comparison(
        [
            Row(date.fromisoformat(day), branch, Totals(*recorded), Totals(*counted), Verdict(said), detail)
            for day, branch, recorded, counted, said, detail in rows
        ],
        [Finding(table, key, detail, date.fromisoformat(day) if day else None) for table, key, detail, day in findings],
        foreign_ids,
    )
