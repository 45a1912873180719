"""Customers in the order in which they came to be known here, for the other cells.

In the order of the transactions that wrote them, below the oldest that is still open: what is there is all that will
ever be there. An answer's position says how far it has come. Who asks for the first time, or with a position of another
server's, is told of all customers first, by id.
"""

import datetime
import re
from typing import NamedTuple

from chassis.errors import InvalidToken
from chassis.postgres import Connection

NIL = "00000000-0000-0000-0000-000000000000"

# PostgreSQL lets bigger numbers than it has pass, and cuts them.
_POSITION = re.compile(
    r"([0-9]{1,20}\.[0-9A-F]{8}\.[0-9]{1,10}):([0-9]{1,19}):(all|new):([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"
)


class Position(NamedTuple):
    """All up to here are told of: of all customers by id, or of those that this transaction or later ones wrote."""

    realm: str  # in which transaction ids have a meaning
    xid: str
    kind: str  # all or new
    customer_id: str

    def __str__(self) -> str:
        return ":".join(self)


class Page(NamedTuple):
    customers: list[tuple[str, datetime.datetime]]
    position: Position
    as_of: datetime.datetime | None  # whom this cell knew before is told of; None: there are more


def parse(text: str) -> Position | None:
    """A position that was given out earlier; None for "from the beginning".

    Raises:
        InvalidToken: it is none of ours.
    """
    if not text:
        return None
    match = _POSITION.fullmatch(text)
    if match is None:
        raise InvalidToken("after_position was not made by this service")
    return Position(*match.groups())


async def page(connection: Connection, after: Position | None, limit: int) -> Page:
    """In a transaction of its own, READ COMMITTED: now() is when it began, and all is read from later snapshots."""
    cursor = await connection.execute(
        "SELECT now(), transaction_ids_realm(), pg_snapshot_xmin(pg_current_snapshot())::text"
    )
    ((as_of, realm, xmin),) = await cursor.fetchall()
    if after is None or after.realm != realm or int(after.xid) > int(xmin):
        after = Position(realm, xmin, "all", NIL)
    if after.kind == "all":
        cursor = await connection.execute(
            "SELECT customer_id::text, created_at FROM customers c WHERE c.customer_id > %s"
            " ORDER BY c.customer_id LIMIT %s",
            [after.customer_id, limit],
        )
        customers = await cursor.fetchall()
        if len(customers) == limit:
            return Page(customers, after._replace(customer_id=customers[-1][0]), None)
        return Page(customers, Position(realm, after.xid, "new", NIL), None)
    cursor = await connection.execute(
        """
        SELECT c.customer_id::text, created_at, created_xid::text FROM customers c
        WHERE (created_xid, c.customer_id) > (%(xid)s::xid8, %(id)s::uuid) AND created_xid < %(xmin)s::xid8
        ORDER BY created_xid, c.customer_id LIMIT %(limit)s
        """,
        {"xid": after.xid, "id": after.customer_id, "xmin": xmin, "limit": limit},
    )
    rows = await cursor.fetchall()
    new = [(customer_id, created_at) for customer_id, created_at, _ in rows]
    if len(rows) == limit:
        return Page(new, Position(realm, rows[-1][2], "new", rows[-1][0]), None)
    return Page(new, Position(realm, xmin, "new", NIL), as_of)
