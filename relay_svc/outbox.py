"""The outbox as the relay sees it. Every function takes the connection and never commits."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import LiteralString, NamedTuple

from psycopg import sql
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow

from chassis.postgres import Connection
from relay_svc import days
from relay_svc.days import Day, Found

ROLE = "purchases_relay"
NIL = "00000000-0000-0000-0000-000000000000"
# Of the relay's connections. Its statements follow indexes, in their order, to a LIMIT. With what the planner knows of
# a day that has just begun, or was filled in a minute, it would read and sort all that waits, for each window.
SETTINGS = {
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_sort": "off",
    "plan_cache_mode": "force_generic_plan",  # made once for the days that a statement names
    "synchronous_commit": "off",  # a lost mark is one more publication, and nothing else
}
BACKOFF_FIRST_S = 5  # doubled with each attempt that was an event's own fault


class OutboxEvent(NamedTuple):
    """An event to publish; the payload is passed on as it is."""

    event_id: str
    event_type: str
    payload: str
    traceparent: str | None
    attempts: int = 0  # that failed by its own fault


class Position(NamedTuple):
    """How far the outbox was looked through, in the order of transaction ids.

    What is still to be found was written by a transaction later than `xid`, or by that one with an id after `event_id`,
    or by one of `in_progress`. So nothing is skipped, in whatever order transactions commit; and nothing is looked at
    twice. No index tells what waits from what was sent: it would have to change with each mark.
    """

    xid: int
    event_id: str
    in_progress: tuple[int, ...]


START = Position(0, NIL, ())


class Claim(NamedTuple):
    events: list[OutboxEvent]
    position: Position  # to continue from, if these are sent
    days_changed: bool  # other days are open now: in those of them that were not looked at, there may be more
    waits_for_standby: bool  # the server acknowledges no commit before a standby has it


async def waits(connection: Connection, position: Position, found: Found) -> bool:
    """Whether there may be something to claim: a look that costs a fraction of a claim, and sees no other days."""
    if position.in_progress:
        return True
    cursor = await connection.execute(
        _for_days(
            """
            SELECT FROM outbox_events e
            WHERE e.status = 'NEW' AND e.next_attempt_at IS NULL
                AND (e.created_xid, e.event_id) > (%(xid)s::xid8, %(event_id)s::uuid)
                AND e.created_xid < pg_snapshot_xmax(pg_current_snapshot()) AND {days}
            ORDER BY e.created_xid, e.event_id LIMIT 1
            """,
            found.days,
        ),
        _place(position),
        prepare=True,
    )
    return cursor.rowcount > 0


async def claim(connection: Connection, limit: int, position: Position, found: Found) -> Claim:
    """Lock events that wait, in the days that were found open, from a position on; until the transaction ends.

    Exact rows, never "up to": transactions commit out of order. Rows that another relay has are skipped; should it
    give them up, a sweep finds them. One round trip, and one snapshot: what it shows is claimed, passed, or too much.
    Events of transactions that this server has not come to arrived with a dump; `begin` has made retries of them.
    """
    statement = _for_days(
        """
        WITH late AS MATERIALIZED (
            SELECT e.event_id, e.event_type, e.payload_json, e.traceparent, e.created_xid
            FROM outbox_events e
            WHERE e.status = 'NEW' AND e.next_attempt_at IS NULL AND e.created_xid = ANY(%(in_progress)s::xid8[])
                AND {days}
            ORDER BY e.created_xid LIMIT %(limit)s FOR UPDATE SKIP LOCKED
        ), fresh AS MATERIALIZED (
            SELECT e.event_id, e.event_type, e.payload_json, e.traceparent, e.created_xid
            FROM outbox_events e
            WHERE e.status = 'NEW' AND e.next_attempt_at IS NULL
                AND (e.created_xid, e.event_id) > (%(xid)s::xid8, %(event_id)s::uuid)
                AND e.created_xid < pg_snapshot_xmax(pg_current_snapshot()) AND {days}
            ORDER BY e.created_xid, e.event_id LIMIT %(limit)s - (SELECT count(*) FROM late) FOR UPDATE SKIP LOCKED
        )
        SELECT event_id::text, event_type, payload_json::text, traceparent, created_xid::text FROM late
        UNION ALL SELECT event_id::text, event_type, payload_json::text, traceparent, created_xid::text FROM fresh
        UNION ALL
        SELECT NULL, pg_current_snapshot()::text, {open_days}, current_setting('synchronous_standby_names'), NULL
        """,
        found.days,
    )
    rows = await _in_transaction(connection, statement, _place(position) | {"limit": limit})
    *rows, (_, snapshot, names, standbys, _) = rows
    events = [OutboxEvent(event_id, kind, payload, trace) for event_id, kind, payload, trace, _ in rows]
    if names != found.names:
        return Claim(events, position, True, standbys != "")
    if len(rows) < limit:
        position = _everything_in(snapshot)
    elif (last_xid := int(rows[-1][4])) not in position.in_progress:  # if so: only late ones, and maybe not all of them
        position = _up_to(last_xid, rows[-1][0], snapshot)
    return Claim(events, position, False, standbys != "")


async def claim_retries(connection: Connection, limit: int, among: Sequence[Day]) -> list[OutboxEvent]:
    """Lock events whose next attempt is due, and those that were requeued."""
    statement = _for_days(
        """
        SELECT event_id::text, event_type, payload_json::text, traceparent, attempts
        FROM outbox_events e
        WHERE status = 'NEW' AND next_attempt_at <= now() AND {days}
        ORDER BY next_attempt_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
        """,
        tuple(among),
    )
    rows = await _in_transaction(connection, statement, {"limit": limit})
    return [OutboxEvent(*row) for row in rows]


async def _in_transaction(connection: Connection, statement: bytes, parameters: Mapping[str, object]) -> list[TupleRow]:
    """The statement's rows; a transaction is begun before, unless there is one.

    Not in one pipeline: after that, PostgreSQL (18.4) does not end a session that idles in its transaction, as that of
    a frozen relay does.
    """
    if connection.info.transaction_status == TransactionStatus.IDLE:
        await connection.execute("BEGIN")
    cursor = await connection.execute(statement, parameters, prepare=True)
    return await cursor.fetchall()


@lru_cache(16)
def _for_days(statement: LiteralString, among: tuple[Day, ...]) -> bytes:
    """The statement as it is sent, time after time while the same days are open."""
    return sql.SQL(statement).format(days=days.within(among), open_days=days.NAMES_OF_OPEN).as_bytes(None)


def _place(position: Position) -> dict[str, object]:
    return {
        "xid": str(position.xid),
        "event_id": position.event_id,
        "in_progress": list(map(str, position.in_progress)),
    }


async def newest(connection: Connection, limit: int, among: Sequence[Day], besides: Sequence[str]) -> list[OutboxEvent]:
    """The newest events of some days, without those of `besides`, whatever their status; not locked."""
    statement = sql.SQL(
        """
        SELECT event_id::text, event_type, payload_json::text, traceparent, attempts
        FROM outbox_events e
        WHERE {days} AND e.event_id <> ALL(%(besides)s::uuid[])
        ORDER BY e.event_id DESC LIMIT %(limit)s
        """
    )
    cursor = await connection.execute(
        statement.format(days=days.within(among)), {"besides": list(besides), "limit": limit}
    )
    return [OutboxEvent(*row) for row in await cursor.fetchall()]


async def begin(connection: Connection) -> Position:
    """Where a relay starts that remembers nothing, or cannot tell whether it is at the same server.

    From where the last sweep came to, as the database has it: whatever state a crash, a failover or a restore of its
    files has left the database in, that is of the same moment. Only a dump brings other servers' transaction ids to
    this one: then it is the very beginning, and events of transactions that this server has not come to are made
    retries. A statement tells them by its snapshot; its own server's lie within.
    """
    among = (await days.open_days(connection)).days
    statement = sql.SQL(
        """
        UPDATE outbox_events e SET next_attempt_at = now()
        WHERE e.status = 'NEW' AND e.next_attempt_at IS NULL
            AND e.created_xid >= pg_snapshot_xmax(pg_current_snapshot()) AND {days}
        """
    )
    await connection.execute(statement.format(days=days.within(among)))
    cursor = await connection.execute("SELECT outbox_low_water_xid()::text")
    ((xid,),) = await cursor.fetchall()
    return Position(int(xid), NIL, ())


async def sweep(connection: Connection, low_water: Position) -> Position:
    """The position of the oldest event that waits, whoever has it: below, there is nothing left but retries.

    It starts from the last sweep's, so it costs what was written since. Noted in the database, for the next relay and
    for counting. It speaks for the snapshot in which the days were found: what that shows as waiting is in one of them.
    """
    snapshot, among, _ = await days.open_days(connection)
    statement = sql.SQL(
        """
        SELECT (SELECT e.created_xid::text FROM outbox_events e
                WHERE e.status = 'NEW' AND e.next_attempt_at IS NULL AND e.created_xid = ANY(%(in_progress)s::xid8[])
                    AND {days}
                ORDER BY e.created_xid LIMIT 1),
               (SELECT e.created_xid::text FROM outbox_events e
                WHERE e.status = 'NEW' AND e.next_attempt_at IS NULL AND e.created_xid >= %(xid)s::xid8
                    AND e.created_xid < pg_snapshot_xmax(pg_current_snapshot()) AND {days}
                ORDER BY e.created_xid LIMIT 1)
        """
    )
    cursor = await connection.execute(
        statement.format(days=days.within(among)),
        _place(low_water),
    )
    row = await cursor.fetchone()
    assert row is not None
    late, fresh = row
    found = _up_to(int(late or fresh), NIL, snapshot) if late or fresh else _everything_in(snapshot)
    await connection.execute(
        "UPDATE outbox_low_water SET realm = transaction_ids_realm(), xid = %s::xid8",
        [str(min([found.xid, *found.in_progress]))],
    )
    return found


def _everything_in(snapshot: str) -> Position:
    _, xmax, in_progress = snapshot.split(":")
    # No event has the id NIL, so events of the transaction xmax are still to come.
    return Position(int(xmax), NIL, tuple(map(int, filter(None, in_progress.split(",")))))


def _up_to(xid: int, event_id: str, snapshot: str) -> Position:
    """What a snapshot shows, up to an event; one that it does not show yet takes nothing with it."""
    everything = _everything_in(snapshot)
    if xid >= everything.xid:
        return everything
    return Position(xid, event_id, tuple(x for x in everything.in_progress if x < xid))


async def mark_sent(connection: Connection, event_ids: Sequence[str], among: Sequence[Day]) -> None:
    """Mark exactly the events that the broker confirmed, of the days among which they were claimed."""
    if not event_ids:
        return
    # No column of an index changes, and no index has a condition on the status: such an update makes no index entries.
    statement = _for_days(
        """
        UPDATE outbox_events e SET status = 'SENT', sent_at = now(), last_error = NULL, next_attempt_at = NULL
        WHERE event_id = ANY(%s::uuid[]) AND event_id BETWEEN %s AND %s AND {days}
        """,  # the range spares the other days a look
        tuple(among),
    )
    await connection.execute(
        statement,
        [list(event_ids), min(event_ids), max(event_ids)],
        prepare=True,
    )


async def mark_faulty(connection: Connection, faults: Mapping[str, str], attempts_max: int) -> None:
    """Count an attempt that failed by the event's own fault: try again later, or give it up as FAILED."""
    for event_id, reason in faults.items():
        statement = sql.SQL(  # the planner sees the day in the id
            """
            UPDATE outbox_events
            SET attempts = attempts + 1, last_error = %(reason)s,
                status = CASE WHEN attempts + 1 >= %(attempts_max)s THEN 'FAILED' ELSE 'NEW' END,
                next_attempt_at = CASE WHEN attempts + 1 >= %(attempts_max)s THEN 'infinity'
                    ELSE now() + %(backoff_s)s * 2 ^ attempts * interval '1 second' END
            WHERE event_id = {event_id}
            """
        ).format(event_id=event_id)
        await connection.execute(
            statement, {"reason": reason, "attempts_max": attempts_max, "backoff_s": BACKOFF_FIRST_S}, prepare=False
        )
