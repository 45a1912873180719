"""What was committed since a snapshot: how a reader gets to know every event, without a gap.

A snapshot of ours is PostgreSQL's `xmin:xmax:xip…` behind the realm in which its transaction ids have a meaning. Each
answer carries the snapshot it was read from; what is visible there but not in the reader's last one is what is new, in
whatever order transactions started and committed.
"""

import datetime
import re
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

import psycopg
from psycopg import sql

from chassis.errors import InvalidToken
from chassis.postgres import Connection
from relay_svc import days
from relay_svc.days import Day
from relay_svc.errors import EventsDropped

CHUNK = 1_000  # ids read and sent at once

# PostgreSQL lets bigger numbers than it has pass, and cuts them.
_SNAPSHOT = re.compile(
    r"([0-9]{1,20}\.[0-9A-F]{8}\.[0-9]{1,10}):([0-9]{1,19}:[0-9]{1,19}:(?:[0-9]{1,19}(?:,[0-9]{1,19})*)?)"
)


class Snapshot(NamedTuple):
    realm: str
    value: str  # a pg_snapshot's text

    def __str__(self) -> str:
        return f"{self.realm}:{self.value}"


class Listing(NamedTuple):
    """A part of the ids; the first part, and no other, tells what the listing stands for."""

    event_ids: list[str]
    snapshot: Snapshot | None
    as_of_time: datetime.datetime | None
    after: Snapshot | None = None  # what it continues; None when it starts from the beginning


async def parse(connection: Connection, text: str) -> Snapshot | None:
    """A snapshot that was given out earlier; None for "everything".

    Raises:
        InvalidToken: it is none of ours.
    """
    if not text:
        return None
    match = _SNAPSHOT.fullmatch(text)
    if match is None:
        raise InvalidToken("after_snapshot was not made by this service")
    try:
        await connection.execute("SELECT %s::pg_snapshot", [match[2]])
    except psycopg.DataError:
        raise InvalidToken("after_snapshot was not made by this service") from None
    return Snapshot(match[1], match[2])


async def remember(connection: Connection, listing: Listing) -> None:
    """Note what the reader is sure to have, so that retention keeps the rest, and what it gets now.

    To be committed, durably, before the reader gets it. Then no snapshot that a reader has is later than the last one
    noted, unless the server was set back; and no crash makes it hand out anew a transaction id that lies within.
    """
    assert listing.snapshot is not None
    await connection.execute(
        """
        UPDATE outbox_listing SET realm = %s, after_snapshot = %s::pg_snapshot, given_snapshot = %s::pg_snapshot
        """,
        [listing.snapshot.realm, listing.after and listing.after.value, listing.snapshot.value],
    )


async def position(connection: Connection) -> Listing:
    """Where a listing of now would end, without the ids. In a transaction of its own: now() is when it began."""
    await connection.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ ONLY")
    cursor = await connection.execute("SELECT now(), transaction_ids_realm(), pg_current_snapshot()::text")
    row = await cursor.fetchone()
    assert row is not None
    as_of_time, realm, snapshot = row
    return Listing([], Snapshot(realm, snapshot), as_of_time)


async def since(connection: Connection, after: Snapshot | None) -> AsyncGenerator[Listing, None]:
    """The ids of all events committed since a snapshot, whatever their status, in parts.

    The first transaction reads now() first, and then the snapshot that the listing stands for: so what was committed
    before now() is visible there. Each hundred days are read in a transaction of their own. Whoever asks for everything
    may get what is written meanwhile now and the next time.

    Raises:
        EventsDropped: events that the snapshot does not have are no longer there.
    """
    async with connection.transaction():
        begun = await _begin(connection, after)
        asked = after
        if not begun.is_past:
            after = None  # the server was set back, or is another one: its transactions have other numbers
        upto, among, _ = await (days.since(connection, after.value) if after else days.every_day(connection))
        first = Listing([], Snapshot(begun.realm, upto), begun.as_of_time, after)
        now, *later = days.parts(among)
        async for event_ids in _ids(connection, after, upto, now):
            yield first._replace(event_ids=event_ids)
            first = Listing([], None, None)
        if first.snapshot:
            yield first
    for part in later:
        async with connection.transaction():
            await _begin(connection, asked)
            async for event_ids in _ids(connection, after, upto, part):
                yield Listing(event_ids, None, None)


class _Begun(NamedTuple):
    as_of_time: datetime.datetime
    realm: str
    is_past: bool  # whether the snapshot is one that this server gave


async def _begin(connection: Connection, after: Snapshot | None) -> _Begun:
    """From here on until the transaction ends, no day is dropped.

    Raises:
        EventsDropped: one was before, which the reader may not know.
    """
    await connection.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ ONLY")
    await connection.execute("LOCK TABLE ONLY outbox_events IN ACCESS SHARE MODE")
    cursor = await connection.execute(
        """
        SELECT now(), here.realm,
               coalesce(%(realm)s::text = here.realm AND outbox_listing.realm = here.realm
                   AND pg_snapshot_xmax(%(after)s::pg_snapshot) <= pg_snapshot_xmax(given_snapshot), false),
               dropped_xid IS NULL
                   OR %(realm)s::text = dropped_realm AND pg_snapshot_xmin(%(after)s::pg_snapshot) > dropped_xid
                   OR %(realm)s::text = here.realm AND here.realm <> dropped_realm -- before this server's time
        FROM outbox_listing, (SELECT transaction_ids_realm() AS realm) AS here
        """,
        {"realm": after and after.realm, "after": after and after.value},
    )
    row = await cursor.fetchone()
    assert row is not None
    *begun, knows_dropped = row
    if not knows_dropped:
        raise EventsDropped(
            "events that after_snapshot does not have were dropped with days past their retention; a reader that may"
            " lack them gets them from the recorded purchases, and continues from a position"
        )
    return _Begun(*begun)


async def _ids(
    connection: Connection, after: Snapshot | None, upto: str, among: Sequence[Day]
) -> AsyncGenerator[list[str], None]:
    """Those of some days, in chunks: what the snapshot `upto` shows and `after` does not, or all."""
    query = sql.SQL("SELECT event_id::text FROM outbox_events e WHERE {}").format(days.within(among))
    parameters = {}
    if after:
        # What another server wrote before a restore may have numbers that this one has not reached: it is in no
        # snapshot of this one, and was listed with everything.
        await connection.execute("SET LOCAL enable_seqscan = off")
        query += sql.SQL("""
            AND (created_xid >= pg_snapshot_xmax(%(after)s::pg_snapshot)
                    AND created_xid < pg_snapshot_xmax(%(upto)s::pg_snapshot)
                OR created_xid = ANY(ARRAY(SELECT pg_snapshot_xip(%(after)s::pg_snapshot))))
            AND pg_visible_in_snapshot(created_xid, %(upto)s::pg_snapshot)
            """)
        parameters = {"after": after.value, "upto": upto}
    async with connection.cursor(name="committed") as ids:
        await ids.execute(query, parameters)
        while rows := await ids.fetchmany(CHUNK):
            yield [event_id for (event_id,) in rows]
