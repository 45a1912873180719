"""The events that could not be counted: kept in our own database, where they block nothing and get lost nowhere."""

import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from psycopg.types.json import Jsonb

from chassis.postgres import Connection

BODY_KEPT_MAX = 2 << 20  # bytes of a body: twice what can be counted; foreign ones may have a hundred times as many
BODY_SHOWN_MAX = 2 << 20  # bytes of a body in a list; what is larger than 1 MiB is here for that
PAGE_BYTES_MAX = 3 << 20  # bytes of all bodies in a list: gRPC's clients take in 4 MiB, unless they are told otherwise


class QuarantinedEvent(NamedTuple):
    event_id: str | None
    reason: str
    detail: str
    body: bytes
    properties: Mapping[str, Any]  # JSON's types only, and no NUL


class Listed(NamedTuple):
    quarantine_id: str
    event_id: str | None
    reason: str
    detail: str
    body: bytes  # its first BODY_SHOWN_MAX bytes
    body_size: int
    quarantined_at: datetime


class Kept(NamedTuple):
    """What a message was, and whether an event with its id is counted."""

    event_id: str | None
    reason: str
    body: bytes
    body_size: int  # more than the body has when only its beginning was kept: such a message can never be counted
    properties: Mapping[str, Any]
    counted: bool


async def keep(connection: Connection, events: Sequence[QuarantinedEvent]) -> int:
    """Store the events, of large bodies the beginning; one that is there already stays as it is.

    Returns how many are new.
    """
    # Sorted: two consumers that keep the same events wait for each other instead of deadlocking.
    ordered = sorted(events, key=lambda event: (event.body, event.reason, event.event_id or ""))
    cursor = await connection.execute(
        """
        INSERT INTO quarantined_events (event_id, reason, detail, body, body_size, properties)
        SELECT * FROM unnest(%s::uuid[], %s::text[], %s::text[], %s::bytea[], %s::int[], %s::jsonb[])
        ON CONFLICT (body_sha256, reason, event_id) DO NOTHING
        RETURNING quarantine_id
        """,
        [
            [event.event_id for event in ordered],
            [event.reason for event in ordered],
            [event.detail for event in ordered],
            [event.body[:BODY_KEPT_MAX] for event in ordered],
            [len(event.body) for event in ordered],
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


async def count_by_reason(connection: Connection) -> dict[str, int]:
    cursor = await connection.execute("SELECT reason, count(*) FROM quarantined_events GROUP BY reason")
    return dict(await cursor.fetchall())


async def page(
    connection: Connection, reason: str, after: tuple[datetime, str] | None, limit: int
) -> tuple[list[Listed], bool]:
    """The oldest events after a position (of any reason if it is empty), and whether there are more.

    At most `limit`, and PAGE_BYTES_MAX of bodies: a thousand large ones do not fit into memory.
    """
    after_at, after_id = after or (datetime.min.replace(tzinfo=UTC), str(uuid.UUID(int=0)))
    cursor = await connection.execute(
        """
        WITH next AS (
            SELECT quarantine_id, coalesce(body_size, octet_length(body)) AS size,
                sum(least(octet_length(body), %(shown)s)) OVER oldest AS bytes,
                row_number() OVER oldest AS number
            FROM quarantined_events
            WHERE (reason = %(reason)s OR %(reason)s = '') AND (quarantined_at, quarantine_id) > (%(at)s, %(id)s)
            WINDOW oldest AS (ORDER BY quarantined_at, quarantine_id)
            ORDER BY quarantined_at, quarantine_id
            LIMIT %(limit)s + 1
        )
        SELECT quarantine_id::text, event_id::text, reason, detail, substring(body FOR %(shown)s), size, quarantined_at,
            number < (SELECT max(number) FROM next)
        FROM next JOIN quarantined_events USING (quarantine_id)
        WHERE number <= %(limit)s AND (bytes <= %(bytes)s OR number = 1)
        ORDER BY number
        """,
        {
            "reason": reason,
            "at": after_at,
            "id": after_id,
            "limit": limit,
            "shown": BODY_SHOWN_MAX,
            "bytes": PAGE_BYTES_MAX,
        },
    )
    rows = await cursor.fetchall()
    return [Listed(*row[:-1]) for row in rows], bool(rows and rows[-1][-1])


async def find(connection: Connection, quarantine_id: str) -> Kept | None:
    """One event, and for the rest of the transaction nobody else's; None when it is not here."""
    cursor = await connection.execute(
        """
        SELECT event_id::text, reason, body, coalesce(body_size, octet_length(body)), properties,
            EXISTS (SELECT FROM analytics_event_log AS log WHERE log.event_id = kept.event_id)
        FROM quarantined_events AS kept WHERE quarantine_id = %s
        FOR UPDATE
        """,
        [quarantine_id],
    )
    row = await cursor.fetchone()
    return Kept(*row) if row else None


async def remove(connection: Connection, quarantine_ids: Iterable[str]) -> int:
    """Delete events; returns how many there were."""
    cursor = await connection.execute(
        "DELETE FROM quarantined_events WHERE quarantine_id = ANY (%s::uuid[])", [list(quarantine_ids)]
    )
    return cursor.rowcount


async def change_reason(connection: Connection, quarantine_id: str, reason: str, detail: str) -> None:
    """Say why the event is here now. If it is here a second time, for that reason, this entry goes."""
    cursor = await connection.execute(
        """
        UPDATE quarantined_events AS kept SET reason = %(reason)s, detail = %(detail)s
        WHERE quarantine_id = %(id)s AND NOT EXISTS (
            SELECT FROM quarantined_events AS other
            WHERE other.body_sha256 = kept.body_sha256 AND other.reason = %(reason)s
                AND other.event_id IS NOT DISTINCT FROM kept.event_id AND other.quarantine_id <> kept.quarantine_id
        )
        """,
        {"id": quarantine_id, "reason": reason, "detail": detail},
    )
    if not cursor.rowcount:
        await remove(connection, [quarantine_id])
