"""The events that could not be counted: kept in our own database, where they block nothing and get lost nowhere."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from psycopg.types.json import Jsonb

from chassis.postgres import Connection


class QuarantinedEvent(NamedTuple):
    event_id: str | None
    reason: str
    detail: str
    body: bytes
    properties: Mapping[str, Any]  # JSON's types only, and no NUL


async def keep(connection: Connection, events: Sequence[QuarantinedEvent]) -> int:
    """Store the events; one that is there already stays as it is. Returns how many are new."""
    # Sorted: two consumers that keep the same events wait for each other instead of deadlocking.
    ordered = sorted(events, key=lambda event: (event.body, event.reason, event.event_id or ""))
    cursor = await connection.execute(
        """
        INSERT INTO quarantined_events (event_id, reason, detail, body, properties)
        SELECT * FROM unnest(%s::uuid[], %s::text[], %s::text[], %s::bytea[], %s::jsonb[])
        ON CONFLICT (body_sha256, reason, event_id) DO NOTHING
        RETURNING quarantine_id
        """,
        [
            [event.event_id for event in ordered],
            [event.reason for event in ordered],
            [event.detail for event in ordered],
            [event.body for event in ordered],
            [Jsonb(event.properties) for event in ordered],
        ],
    )
    return len(await cursor.fetchall())


async def digests(connection: Connection, reason: str, among: Collection[bytes]) -> set[bytes]:
    """Those of the given SHA-256 whose bodies are here for this reason."""
    cursor = await connection.execute(
        "SELECT body_sha256 FROM quarantined_events WHERE body_sha256 = ANY (%s) AND reason = %s",
        [list(among), reason],
    )
    return {digest for (digest,) in await cursor.fetchall()}
