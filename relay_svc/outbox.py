"""The outbox as the relay sees it. Every function takes the connection and never commits."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from chassis.postgres import Connection

NIL = "00000000-0000-0000-0000-000000000000"
BACKOFF_FIRST_S = 5  # doubled with each attempt that was an event's own fault


class OutboxEvent(NamedTuple):
    """An event to publish; the payload is passed on as it is."""

    event_id: str
    event_type: str
    payload: str
    traceparent: str | None


async def claim(connection: Connection, limit: int, floor: str) -> list[OutboxEvent]:
    """Lock the oldest events that wait, from the id `floor` on; the locks last until the transaction ends.

    Exact rows, never "up to an id": transactions commit out of order. Rows that another relay has are skipped.
    """
    cursor = await connection.execute(
        """
        SELECT event_id::text, event_type, payload_json::text, traceparent
        FROM outbox_events
        WHERE status = 'NEW' AND event_id >= %s AND (next_attempt_at IS NULL OR next_attempt_at <= now())
        ORDER BY event_id LIMIT %s
        FOR UPDATE SKIP LOCKED
        """,
        [floor, limit],
        prepare=True,
    )
    return [OutboxEvent(*row) for row in await cursor.fetchall()]


async def mark_sent(connection: Connection, event_ids: Sequence[str]) -> None:
    """Mark exactly the events that the broker confirmed."""
    if not event_ids:
        return
    await connection.execute(
        """
        UPDATE outbox_events SET status = 'SENT', sent_at = now(), last_error = NULL
        WHERE event_id = ANY(%s::uuid[]) AND event_id BETWEEN %s AND %s
        """,  # the range is for the planner: it prunes partitions
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
        )
