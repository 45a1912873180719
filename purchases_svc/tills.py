"""What is here of what tills' own journals have given out.

A journal numbers its sales without gaps and tells the last number from time to time. So what is missing can be told,
also at the end, where a gap cannot be seen; and a number that two sales have tells that the till's disk was restored
from an image, or cloned. Numbers come with the sales themselves, in the statement that records them (`insert.py`).
"""

import datetime
from collections.abc import Sequence
from typing import LiteralString, NamedTuple

from chassis.postgres import Connection

RANGES_MAX = 100  # of missing numbers that are told
JOURNALS_MAX = 100  # of a till that are told
SEQUENCE_MAX = 1 << 62
VOIDS_MAX = 1_000  # in one report
GAP_AGE = datetime.timedelta(days=1)  # a till that is off over night has nothing to be told of
CONFLICTS_TOLD = datetime.timedelta(days=7)


class Till(NamedTuple):
    branch_id: int
    pos_id: str


class Report(NamedTuple):
    """What a till says of one of its journals."""

    till: Till
    epoch: str
    first_sequence: int
    last_sequence: int
    void_sequences: Sequence[int]
    clock_offset_ms: int | None


class State(NamedTuple):
    """What is here of a journal; see `TillState` in the contract."""

    till: Till
    epoch: str
    first_sequence: int
    complete_through: int
    highest_sequence: int
    reported_through: int
    missing: list[tuple[int, int]]
    missing_count: int
    missing_since: datetime.datetime | None
    conflict_count: int
    reported_at: datetime.datetime | None
    clock_offset_ms: int | None


_OF_JOURNAL: LiteralString = "branch_id = %(branch_id)s AND pos_id = %(pos_id)s AND epoch = %(epoch)s"

# The numbers after one up to which all are here: as long as they are as many as they should be.
_COMPLETE: LiteralString = """
    SELECT coalesce(max(sequence), j.complete_through) AS through FROM (
        SELECT sequence, row_number() OVER (ORDER BY sequence) AS n FROM till_sales s
        WHERE (s.branch_id, s.pos_id, s.epoch) = (j.branch_id, j.pos_id, j.epoch) AND s.sequence > j.complete_through
    ) AS numbered WHERE sequence = j.complete_through + n
"""


async def report(connection: Connection, told: Report) -> State:
    """Note what a till says, and tell what is here. It is durable once the caller's transaction is."""
    values = {
        "branch_id": told.till.branch_id,
        "pos_id": told.till.pos_id,
        "epoch": told.epoch,
        "first": told.first_sequence,
        "last": told.last_sequence,
        "voids": list(told.void_sequences),
        "clock_offset_ms": told.clock_offset_ms,
    }
    await connection.execute(
        """
        INSERT INTO till_journals AS j (branch_id, pos_id, epoch, first_sequence, last_sequence, complete_through,
                                        clock_offset_ms)
        VALUES (%(branch_id)s, %(pos_id)s, %(epoch)s, %(first)s, %(last)s, %(first)s - 1, %(clock_offset_ms)s)
        ON CONFLICT (branch_id, pos_id, epoch) DO UPDATE
        SET last_sequence = greatest(j.last_sequence, EXCLUDED.last_sequence), reported_at = now(),
            clock_offset_ms = coalesce(EXCLUDED.clock_offset_ms, j.clock_offset_ms)
        """,
        values,
    )
    if told.void_sequences:
        await connection.execute(
            "INSERT INTO till_sales (branch_id, pos_id, epoch, sequence)"
            " SELECT %(branch_id)s, %(pos_id)s, %(epoch)s, void FROM unnest(%(voids)s::bigint[]) AS void ORDER BY void"
            " ON CONFLICT DO NOTHING",
            values,
        )
    await connection.execute(
        f"""
        UPDATE till_journals AS j SET complete_through = c.through,
            complete_since = CASE WHEN c.through > j.complete_through OR c.through >= j.last_sequence THEN now()
                                  ELSE j.complete_since END
        FROM till_journals AS o CROSS JOIN LATERAL ({_COMPLETE.replace("j.", "o.")}) AS c
        WHERE (o.branch_id, o.pos_id, o.epoch) = (j.branch_id, j.pos_id, j.epoch)
            AND j.branch_id = %(branch_id)s AND j.pos_id = %(pos_id)s AND j.epoch = %(epoch)s
        """,
        values,
    )
    return await state(connection, told.till, told.epoch)


async def states(connection: Connection, till: Till) -> list[State]:
    """Of the till's journals, that which reported last first."""
    cursor = await connection.execute(
        "SELECT epoch::text FROM till_journals WHERE branch_id = %s AND pos_id = %s ORDER BY reported_at DESC LIMIT %s",
        [till.branch_id, till.pos_id, JOURNALS_MAX],
    )
    return [await state(connection, till, epoch) for (epoch,) in await cursor.fetchall()]


async def state(connection: Connection, till: Till, epoch: str) -> State:
    """Of one journal. One that never reported is taken to begin with 1, and lacks what is between its numbers."""
    values: dict[str, object] = {"branch_id": till.branch_id, "pos_id": till.pos_id, "epoch": epoch}
    cursor = await connection.execute(
        f"""
        SELECT j.first_sequence, c.through, j.last_sequence, j.complete_since, j.reported_at, j.clock_offset_ms
        FROM till_journals AS j CROSS JOIN LATERAL ({_COMPLETE}) AS c WHERE {_OF_JOURNAL}
        """,
        values,
    )
    row = await cursor.fetchone()
    first, through, last, since, reported_at, clock_offset_ms = row or (0, 0, 0, None, None, None)
    cursor = await connection.execute(f"SELECT coalesce(max(sequence), 0) FROM till_sales WHERE {_OF_JOURNAL}", values)
    ((highest,),) = await cursor.fetchall()
    cursor = await connection.execute(
        f"""
        SELECT previous + 1, sequence - 1, sum(sequence - previous - 1) OVER () FROM (
            SELECT sequence, lag(sequence, 1, %(through)s::bigint) OVER (ORDER BY sequence) AS previous FROM (
                SELECT sequence FROM till_sales WHERE {_OF_JOURNAL} AND sequence > %(through)s
                UNION ALL SELECT greatest(%(last)s::bigint, %(highest)s) + 1
            ) AS here
        ) AS gaps WHERE sequence > previous + 1 ORDER BY sequence LIMIT %(ranges)s
        """,
        {**values, "through": through, "last": last, "highest": highest, "ranges": RANGES_MAX},
    )
    gaps = await cursor.fetchall()
    cursor = await connection.execute(f"SELECT count(*) FROM till_conflicts WHERE {_OF_JOURNAL}", values)
    ((conflicts,),) = await cursor.fetchall()
    return State(
        till=till,
        epoch=epoch,
        first_sequence=first,
        complete_through=through,
        highest_sequence=highest,
        reported_through=last,
        missing=[(start, end) for start, end, _ in gaps],
        missing_count=int(gaps[0][2]) if gaps else 0,
        missing_since=since if gaps else None,
        conflict_count=conflicts,
        reported_at=reported_at,
        clock_offset_ms=clock_offset_ms,
    )


class Trouble(NamedTuple):
    """A journal of which numbers are missing for long, or came twice."""

    till: Till
    epoch: str
    complete_through: int
    reported_through: int
    missing_since: datetime.datetime | None  # None: nothing is
    reported_at: datetime.datetime
    conflicts: int  # within the time in which they are told
    clock_offset_ms: int | None


async def troubles(
    connection: Connection, *, older_than: datetime.timedelta, conflicts_for: datetime.timedelta
) -> list[Trouble]:
    """Gaps that are older than that, and conflicts of the last time, by branch and till; not of branches elsewhere."""
    cursor = await connection.execute(
        f"""
        WITH conflicts AS (
            SELECT branch_id, pos_id, epoch, count(*) AS conflicts FROM till_conflicts
            WHERE noted_at > now() - %(conflicts_for)s GROUP BY branch_id, pos_id, epoch
        ), gaps AS (
            SELECT j.branch_id, j.pos_id, j.epoch, c.through FROM till_journals j CROSS JOIN LATERAL ({_COMPLETE}) AS c
            WHERE j.complete_through < j.last_sequence AND j.complete_since < now() - %(older_than)s
                AND c.through < j.last_sequence
        )
        SELECT j.branch_id, j.pos_id, j.epoch::text, coalesce(gaps.through, j.complete_through), j.last_sequence,
            CASE WHEN gaps.through IS NOT NULL THEN j.complete_since END, j.reported_at,
            coalesce(conflicts.conflicts, 0), j.clock_offset_ms
        FROM till_journals j LEFT JOIN gaps USING (branch_id, pos_id, epoch)
            LEFT JOIN conflicts USING (branch_id, pos_id, epoch)
        WHERE (gaps.through IS NOT NULL OR conflicts.conflicts IS NOT NULL)
            AND branch_id NOT IN (SELECT branch_id FROM branch_moves WHERE state <> 'HERE')
        ORDER BY 1, 2, j.reported_at
        """,
        {"older_than": older_than, "conflicts_for": conflicts_for},
    )
    return [Trouble(Till(branch_id, pos_id), *rest) for branch_id, pos_id, *rest in await cursor.fetchall()]
