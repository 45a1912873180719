"""What has been proven, when, and what was found: a row for each business day, and for each range of branches, products
and customers. What is wrong stays wrong until it is proven right, whoever looks.
"""

import json
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from enum import Enum
from typing import LiteralString, NamedTuple
from uuid import UUID

import structlog

from analytics_svc.proof.read_models import BRANCHES, COLUMNS, CUSTOMERS, DAY, PRODUCTS
from analytics_svc.proof.verdicts import SEVERITY, WRONG, Comparison, Finding, Row, Verdict
from analytics_svc.upstream.source import RecordedDays
from chassis import logs
from chassis.postgres import Connection

# Keys of one range: some seconds' work in a big chain. A range that has twice as many is cut.
RANGE_KEYS = {BRANCHES: 50, PRODUCTS: 200, CUSTOMERS: 5_000}
_KEYS_OF: dict[str, LiteralString] = {
    BRANCHES: "SELECT branch_id FROM sales_totals WHERE branch_id BETWEEN %(first)s::bigint AND %(last)s::bigint",
    PRODUCTS: "SELECT product_id FROM product_sales_of_chain_sums"
    " WHERE period = 'all' AND product_id BETWEEN %(first)s::bigint AND %(last)s::bigint",
    CUSTOMERS: "SELECT customer_id FROM customer_loyalty_chain"
    " WHERE customer_id BETWEEN %(first)s::uuid AND %(last)s::uuid",
}
# What was counted just before a look may have become visible only after it: a transaction's time is its start.
LATE_COMMIT = timedelta(seconds=60)
NAMED_MAX = 50  # wrong sums of one part that are kept to be named
LOGGED_MAX = 10  # rows and ids of a part that turns out wrong

log = structlog.get_logger()


class Turn(Enum):
    """Whose turn it is to be proven. Each comes in turn, so that none waits for another to be settled."""

    WRONG = "verdict <> 1"
    TOUCHED = "touched_at >= coalesce(proven_at, '-infinity')"
    OLDEST = "true"


class Part(NamedTuple):
    kind: str
    first: str  # keys as text, both included; of a day both are the day
    last: str

    @property
    def day(self) -> date:
        return date.fromisoformat(self.first)


def of_day(day: date) -> Part:
    return Part(DAY, str(day), str(day))


async def recorded_position(connection: Connection) -> str:
    """Up to where it is noted on which days something was recorded."""
    ((position,),) = await (await connection.execute("SELECT recorded_position FROM audit_status")).fetchall()
    return str(position)


async def note_touched(connection: Connection, recorded: RecordedDays) -> None:
    """Let the days be known on which anything was recorded or counted since that was noted last, and all that count.

    A clock that is set back hides none of them.
    """
    async with connection.transaction():
        await connection.execute(
            "INSERT INTO audit_parts (kind, first, last) SELECT 'day', day, day FROM daily_sales_of_chain ORDER BY day"
            " ON CONFLICT DO NOTHING"
        )
        await connection.execute(
            """
            INSERT INTO audit_parts AS part (kind, first, last, touched_at)
            SELECT 'day', day, day, clock_timestamp() FROM (
                SELECT unnest(%s::date[])
                UNION
                SELECT day FROM analytics_event_log WHERE day IS NOT NULL AND processed_at >= (
                    SELECT CASE WHEN counted_from <= now() THEN counted_from - %s ELSE '-infinity' END
                    FROM audit_status
                )
            ) AS touched (day) ORDER BY day
            ON CONFLICT (kind, first) DO UPDATE
                SET touched_at = greatest(excluded.touched_at, part.seen_at, part.proven_at)
            """,
            [recorded.days, LATE_COMMIT],
        )
        await connection.execute(
            "UPDATE audit_status SET recorded_position = %s, counted_from = now()", [recorded.position]
        )


async def due(connection: Connection) -> list[date]:
    """The days whose sums are to be compared: touched since that was done last, or not right."""
    cursor = await connection.execute(
        "SELECT first FROM audit_parts WHERE kind = 'day' AND (verdict IS DISTINCT FROM 1 OR touched_at >= seen_at)"
    )
    return sorted(date.fromisoformat(first) for (first,) in await cursor.fetchall())


async def store_compared(connection: Connection, through: datetime, duration: timedelta) -> None:
    """The sums of all days that had changed by then were compared."""
    await connection.execute(
        "UPDATE audit_status SET compared_through = %s, compared_at = clock_timestamp(), compare_duration = %s",
        [through, duration],
    )


async def pick(connection: Connection, turn: Turn) -> Part | None:
    """Of those whose turn it is, the one that was tried longest ago."""
    cursor = await connection.execute(
        f"SELECT kind, first, last FROM audit_parts WHERE {turn.value}"
        " ORDER BY tried_at NULLS FIRST, kind, first LIMIT 1"
    )
    row = await cursor.fetchone()
    return Part(*row) if row else None


async def known_wrong(connection: Connection, kind: str) -> list[Part]:
    cursor = await connection.execute(
        "SELECT kind, first, last FROM audit_parts WHERE kind = %s AND verdict <> 1 ORDER BY first", [kind]
    )
    return [Part(*row) for row in await cursor.fetchall()]


async def ranges(connection: Connection, kind: str) -> list[Part]:
    """All parts of a kind that has ranges, none of them too large."""
    parts = []
    cursor = await connection.execute(
        "SELECT kind, first, last FROM audit_parts WHERE kind = %s ORDER BY first", [kind]
    )
    for row in await cursor.fetchall():
        part, rest = Part(*row), True
        while rest:
            cut_part = await cut(connection, part)
            parts.append(cut_part)
            rest = cut_part.last != part.last
            if rest:
                part = Part(kind, _text(kind, _number(kind, cut_part.last) + 1), part.last)
    return parts


async def cut(connection: Connection, part: Part) -> Part:
    """Cut a part that has grown too large; returns its beginning, the rest comes first among those never proven."""
    if part.kind == DAY:
        return part
    keys = RANGE_KEYS[part.kind]
    column = COLUMNS[part.kind]
    cursor = await connection.execute(
        f"""
        SELECT key FROM (
            SELECT {column}::text AS key, row_number() OVER (ORDER BY {column}) AS number
            FROM ({_KEYS_OF[part.kind]} ORDER BY {column} LIMIT %(keys)s * 2 + 1) AS keys
        ) AS numbered WHERE number = %(keys)s + 1 AND EXISTS (
            {_KEYS_OF[part.kind]} ORDER BY {column} OFFSET %(keys)s * 2 LIMIT 1
        )
        """,
        {"first": part.first, "last": part.last, "keys": keys},
    )
    row = await cursor.fetchone()
    if row is None:
        return part
    last = _text(part.kind, _number(part.kind, row[0]) - 1)
    async with connection.transaction():
        await connection.execute(
            "UPDATE audit_parts SET last = %s WHERE kind = %s AND first = %s", [last, part.kind, part.first]
        )
        await connection.execute(
            "INSERT INTO audit_parts (kind, first, last, verdict, since, seen_at, found, tried_at)"
            " SELECT kind, %s, %s, verdict, since, seen_at, found, tried_at FROM audit_parts"
            " WHERE kind = %s AND first = %s",
            [row[0], part.last, part.kind, part.first],
        )
    return Part(part.kind, part.first, last)


def _number(kind: str, key: str) -> int:
    return UUID(key).int if kind == CUSTOMERS else int(key)


def _text(kind: str, number: int) -> str:
    return str(UUID(int=number)) if kind == CUSTOMERS else str(number)


async def begin(connection: Connection) -> datetime:
    """The time from which a proof that begins now is good."""
    ((now,),) = await (await connection.execute("SELECT clock_timestamp()")).fetchall()
    return now  # type: ignore[no-any-return]


async def store(connection: Connection, part: Part, began_at: datetime, found: Comparison) -> None:
    """What a proof has found; from now on that is what is known of this part."""
    before = await _verdict(connection, part)
    await _store(connection, part, began_at, found.verdict, found)
    await _tried(connection, part, began_at)
    if found.verdict in WRONG and before not in WRONG:
        _tell(part, found)


async def store_failure(connection: Connection, part: Part, began_at: datetime, error: Exception) -> None:
    """It could not be looked at: that is a finding, too; what was found wrong stays so."""
    why = f"{type(error).__name__}: {logs.text_of(error)}"
    log.warning("not proven", kind=part.kind, first=part.first, last=part.last, error=why)
    finding = Finding(part.kind, f"{part.first} to {part.last}", f"not proven: {why}", None)
    await _store(connection, part, began_at, Verdict.UNPROVEN, Comparison([], [finding], []), over="1, 2, 5")
    await _tried(connection, part, None)


async def store_sums(connection: Connection, day: date, began_at: datetime, rows: Sequence[Row]) -> None:
    """What a comparison of sums says of a day, which is no proof: at best, that purchases are on their way.

    Where sums differ that no proof has explained, one is due.
    """
    differing = [row for row in rows if row.verdict in WRONG]
    found = Comparison(differing or list(rows), [], [])
    verdict = Verdict.UNPROVEN if differing else found.verdict
    await _store(connection, of_day(day), began_at, verdict, found, over="1, 2")


async def _store(
    connection: Connection,
    part: Part,
    began_at: datetime,
    verdict: Verdict,
    found: Comparison,
    *,
    over: LiteralString = "1, 2, 3, 4, 5",
) -> None:
    """`over`: the verdicts that this one may take the place of.

    Whatever began before a proof is older news than that. And what was found meanwhile is not made good by a look that
    began before: it did not see what the other has seen.
    """
    await connection.execute(
        "INSERT INTO audit_parts (kind, first, last) VALUES (%(kind)s, %(first)s, %(last)s) ON CONFLICT DO NOTHING",
        part._asdict(),
    )
    rows = [row for row in found.rows if row.verdict is not Verdict.AGREED][:NAMED_MAX]
    await connection.execute(
        f"""
        UPDATE audit_parts SET
            verdict = %(verdict)s,
            since = CASE WHEN verdict = %(verdict)s THEN since ELSE statement_timestamp() END,
            seen_at = greatest(seen_at, %(began_at)s),
            found = %(found)s,
            wrong_count = %(wrong)s,
            foreign_count = %(foreign)s,
            pending_count = %(pending)s
        WHERE kind = %(kind)s AND first = %(first)s AND coalesce(verdict, 1) IN ({over})
            AND coalesce(proven_at <= %(began_at)s, true)
            AND (coalesce(seen_at <= %(began_at)s, true)
                OR array_position(%(severity)s, %(verdict)s) >= array_position(%(severity)s, coalesce(verdict, 1)))
        """,
        {
            "kind": part.kind,
            "first": part.first,
            "verdict": int(verdict),
            "began_at": began_at,
            "found": json.dumps([rows, found.findings, found.foreign_ids], default=str),
            "wrong": found.wrong,
            "foreign": found.foreign,
            "pending": found.pending,
            "severity": list(map(int, SEVERITY)),
        },
    )


async def _tried(connection: Connection, part: Part, proven_at: datetime | None) -> None:
    await connection.execute(
        "UPDATE audit_parts SET tried_at = statement_timestamp(), proven_at = greatest(proven_at, %s)"
        " WHERE kind = %s AND first = %s",
        [proven_at, part.kind, part.first],
    )


async def _verdict(connection: Connection, part: Part) -> int | None:
    cursor = await connection.execute(
        "SELECT verdict FROM audit_parts WHERE kind = %s AND first = %s", [part.kind, part.first]
    )
    row = await cursor.fetchone()
    return row[0] if row else None


def _tell(part: Part, found: Comparison) -> None:
    """Once, when it is found: it stays to be seen in GetAuditStatus and the metrics until it is right."""
    for row in [row for row in found.rows if row.verdict in WRONG][:LOGGED_MAX]:
        log.error("sums are wrong", day=part.first, branch_id=row.branch_id, verdict=row.verdict.name, why=row.detail)
    for finding in found.findings[:LOGGED_MAX]:
        log.error("read model is wrong", table=finding.table, key=finding.key, detail=finding.detail)
    if found.foreign:
        some = found.foreign_ids[:LOGGED_MAX]
        log.error("events that nobody recorded are counted", day=part.first, some=some, count=found.foreign)
