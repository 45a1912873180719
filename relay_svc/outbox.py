"""The outbox as the relay sees it. Every function takes the connection and never commits."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from psycopg import sql

from chassis.postgres import Connection
from relay_svc import days
from relay_svc.days import Day, Found

ROLE = "purchases_relay"
NIL = "00000000-0000-0000-0000-000000000000"
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
    twice: with an old snapshot open somewhere, index entries of events that were sent stay, and passing them again and
    again would take all the time.
    """

    xid: int
    event_id: str
    in_progress: tuple[int, ...]


START = Position(0, NIL, ())


class Claim(NamedTuple):
    events: list[OutboxEvent]
    position: Position  # to continue from, if these are sent


async def claim(connection: Connection, limit: int, position: Position, found: Found) -> Claim:
    """Lock events that wait, in the days that are open, from a position on; until the transaction ends.

    Exact rows, never "up to": transactions commit out of order. Rows that another relay has are skipped; should it
    give them up, a sweep finds them.
    """
    statement = sql.SQL(
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
                AND (e.created_xid, e.event_id) > (%(xid)s::xid8, %(event_id)s::uuid) AND {days}
            ORDER BY e.created_xid, e.event_id LIMIT %(limit)s - (SELECT count(*) FROM late) FOR UPDATE SKIP LOCKED
        )
        SELECT event_id::text, event_type, payload_json::text, traceparent, created_xid::text FROM late
        UNION ALL SELECT event_id::text, event_type, payload_json::text, traceparent, created_xid::text FROM fresh
        """
    )
    cursor = await connection.execute(
        statement.format(days=days.within(found.days)),
        {
            "xid": str(position.xid),
            "event_id": position.event_id,
            "in_progress": list(map(str, position.in_progress)),
            "limit": limit,
        },
        prepare=True,
    )
    rows = await cursor.fetchall()
    events = [OutboxEvent(event_id, kind, payload, trace) for event_id, kind, payload, trace, _ in rows]
    if len(rows) < limit:
        return Claim(events, _everything_in(found.snapshot))
    last_id, last_xid = rows[-1][0], int(rows[-1][4])
    if last_xid in position.in_progress:  # only late ones, and maybe not all of them
        return Claim(events, position)
    return Claim(events, _up_to(last_xid, last_id, found.snapshot))


async def claim_retries(connection: Connection, limit: int, among: Sequence[Day]) -> list[OutboxEvent]:
    """Lock events whose next attempt is due, and those that were requeued."""
    statement = sql.SQL(
        """
        SELECT event_id::text, event_type, payload_json::text, traceparent, attempts
        FROM outbox_events e
        WHERE status = 'NEW' AND next_attempt_at <= now() AND {days}
        ORDER BY next_attempt_at LIMIT %s FOR UPDATE SKIP LOCKED
        """
    )
    cursor = await connection.execute(statement.format(days=days.within(among)), [limit], prepare=True)
    return [OutboxEvent(*row) for row in await cursor.fetchall()]


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


async def sweep(connection: Connection, low_water: Position) -> Position:
    """The position of the oldest event that waits, whoever has it: below, there is nothing left but retries.

    It starts from the last sweep's, so it costs what was written since. Noted in the database, for counting. It speaks
    for the snapshot in which the days were found: whatever that shows as waiting is in one of them.
    """
    snapshot, among = await days.open_days(connection)
    statement = sql.SQL(
        """
        SELECT (SELECT e.created_xid::text FROM outbox_events e
                WHERE e.status = 'NEW' AND e.next_attempt_at IS NULL AND e.created_xid = ANY(%(in_progress)s::xid8[])
                    AND {days}
                ORDER BY e.created_xid LIMIT 1),
               (SELECT e.created_xid::text FROM outbox_events e
                WHERE e.status = 'NEW' AND e.next_attempt_at IS NULL AND e.created_xid >= %(xid)s::xid8 AND {days}
                ORDER BY e.created_xid LIMIT 1)
        """
    )
    cursor = await connection.execute(
        statement.format(days=days.within(among)),
        {"xid": str(low_water.xid), "in_progress": list(map(str, low_water.in_progress))},
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
    """What a snapshot shows, up to an event."""
    everything = _everything_in(snapshot)
    if xid >= everything.xid:
        # Events that came with a dump may have ids that this server's transactions have not reached. The position stays
        # within the snapshot, or what is written here and now would lie below it.
        return everything
    return Position(xid, event_id, tuple(x for x in everything.in_progress if x < xid))


async def mark_sent(connection: Connection, event_ids: Sequence[str], among: Sequence[Day]) -> None:
    """Mark exactly the events that the broker confirmed, of the days among which they were claimed."""
    if not event_ids:
        return
    statement = sql.SQL(
        """
        UPDATE outbox_events e SET status = 'SENT', sent_at = now(), last_error = NULL, next_attempt_at = NULL
        WHERE event_id = ANY(%s::uuid[]) AND event_id BETWEEN %s AND %s AND {days}
        """  # the range spares the other days a look
    )
    await connection.execute(
        statement.format(days=days.within(among)),
        [list(event_ids), min(event_ids), max(event_ids)],
        prepare=True,
    )


async def mark_faulty(connection: Connection, faults: Mapping[str, str], attempts_max: int) -> None:
    """Count an attempt that failed by the event's own fault: try again later, or give it up as FAILED."""
    for event_id, reason in faults.items():
        await connection.execute(
            """
            UPDATE outbox_events
            SET attempts = attempts + 1, last_error = %(reason)s,
                status = CASE WHEN attempts + 1 >= %(attempts_max)s THEN 'FAILED' ELSE 'NEW' END,
                next_attempt_at = now() + %(backoff_s)s * 2 ^ attempts * interval '1 second'
            WHERE event_id = %(event_id)s
            """,
            {
                "event_id": event_id,
                "reason": reason,
                "attempts_max": attempts_max,
                "backoff_s": BACKOFF_FIRST_S,
            },
            prepare=False,  # so that it is planned for the one day that the id is of
        )
