"""On which business days something was recorded since an audit looked last, by the purchases themselves.

Events may be lost; what tells of a purchase here is the transaction that recorded it. All with an id below an answer's
position were over by then, so what has one is in that answer or in an earlier one, in whatever order they committed.
"""

import datetime
import re
from typing import LiteralString, NamedTuple

from chassis.errors import InvalidToken
from chassis.postgres import Connection
from purchases_svc.control_totals import stored_range

# PostgreSQL lets bigger numbers than it has pass, and cuts them.
_POSITION = re.compile(r"([0-9]{1,20}\.[0-9A-F]{8}\.[0-9]{1,10}):([0-9]{1,19})")


class Position(NamedTuple):
    """Where an answer ends: all transactions with a lower id were over."""

    realm: str  # in which transaction ids have a meaning
    xid: str

    def __str__(self) -> str:
        return f"{self.realm}:{self.xid}"


class RecordedDays(NamedTuple):
    days: list[datetime.date]
    position: Position
    as_of: datetime.datetime  # what was committed before is told of, here or in the answers before


def parse(text: str) -> Position | None:
    """A position that was given out earlier; None for "everything".

    Raises:
        InvalidToken: it is none of ours.
    """
    if not text:
        return None
    match = _POSITION.fullmatch(text)
    if match is None:
        raise InvalidToken("after_position was not made by this service")
    return Position(match[1], match[2])


async def since(connection: Connection, after: Position | None) -> RecordedDays:
    """The days on which something was recorded since a position, and the position of now; all if there is none.

    In a transaction of its own, READ COMMITTED, to be committed before anybody gets the answer. now() is when it began,
    and the days are read from a later snapshot than the position.
    """
    cursor = await connection.execute(
        """
        SELECT now(), here.realm, pg_snapshot_xmin(pg_current_snapshot())::text,
            %(realm)s::text = here.realm AND given.realm = here.realm AND %(xid)s::xid8 <= given_xid
        FROM recorded_days_listing AS given, (SELECT transaction_ids_realm() AS realm) AS here
        """,
        {"realm": after and after.realm, "xid": after and after.xid},
    )
    ((as_of, realm, xid, is_past),) = await cursor.fetchall()
    days = await _days(connection, after.xid if after and is_past else None)
    await connection.execute(
        "UPDATE recorded_days_listing SET realm = %(realm)s,"
        " given_xid = CASE realm WHEN %(realm)s THEN greatest(given_xid, %(xid)s::xid8) ELSE %(xid)s::xid8 END",
        {"realm": realm, "xid": xid},
    )
    return RecordedDays(days, Position(realm, xid), as_of)


async def _days(connection: Connection, xid: str | None) -> list[datetime.date]:
    bounds = await stored_range(connection)
    if bounds is None:
        return []
    # What came with a dump may have ids that this server has not reached: it was listed with everything.
    new: LiteralString = "AND created_xid >= %(xid)s::xid8 AND created_xid < pg_snapshot_xmax(pg_current_snapshot())"
    await connection.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off")
    cursor = await connection.execute(
        f"""
        SELECT day::date FROM generate_series(%(first)s::timestamp, %(last)s::timestamp, '1 day') AS day
        CROSS JOIN LATERAL (
            SELECT FROM purchases WHERE business_day = day::date {new if xid else ""}
                AND purchase_time >= (day - interval '1 day') AT TIME ZONE 'UTC'
                AND purchase_time < (day + interval '2 days') AT TIME ZONE 'UTC'
            ORDER BY created_xid DESC LIMIT 1 -- the last of that day in the index of days, and no other
        ) AS one ORDER BY day
        """,
        {"first": bounds[0], "last": bounds[1], "xid": xid},
        prepare=False,
    )
    return [day for (day,) in await cursor.fetchall()]
