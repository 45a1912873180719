"""Customers, registered and read back. Every function takes the connection and commits nothing."""

import datetime
from typing import LiteralString

from chassis.postgres import Connection
from chassis.standby import make_durable
from chassis.wire import parse_uuid


async def registered_at(connection: Connection, customer_id: str) -> datetime.datetime | None:
    """When a customer was registered; None when it was not."""
    cursor = await connection.execute("SELECT created_at FROM customers WHERE customer_id = %s", [customer_id])
    row = await cursor.fetchone()
    return row[0] if row else None


async def register(connection: Connection, customer_id: str) -> datetime.datetime:
    """Register a customer, or find it registered; when. Either is durable once the caller's transaction is."""
    inserted = await connection.execute(
        "INSERT INTO customers (customer_id) VALUES (%s) ON CONFLICT DO NOTHING", [customer_id]
    )  # a concurrent one waits here and is visible to the next statement
    if not inserted.rowcount:
        await make_durable(connection)
    registered = await registered_at(connection, customer_id)
    assert registered is not None  # customers are never deleted
    return registered


async def page(
    connection: Connection, *, limit: int, after: str | None, between: tuple[str, str] | None = None
) -> list[tuple[str, datetime.datetime]]:
    """Customers by id, from `after` on; with `between`, only those from one id to another, both inclusive."""
    condition: LiteralString = "true" if after is None else "c.customer_id > %(after)s"
    if between:
        condition += " AND c.customer_id BETWEEN %(least)s AND %(most)s"
    cursor = await connection.execute(
        # Qualified: a plain `ORDER BY customer_id` means the text that is selected, and would sort all customers.
        f"SELECT c.customer_id::text, c.created_at FROM customers c WHERE {condition}"
        " ORDER BY c.customer_id LIMIT %(limit)s",
        {"after": after, "limit": limit, "least": between and between[0], "most": between and between[1]},
    )
    return await cursor.fetchall()


def beginning_with(prefix: str) -> tuple[str, str] | None:
    """The first and the last id that begins like this; None when no UUID does."""
    ends = tuple(prefix.lower() + shape[len(prefix) :] for shape in (_LEAST, _MOST))
    if len(prefix) > len(_LEAST) or not all(map(parse_uuid, ends)):
        return None
    return ends[0], ends[1]


_LEAST = "00000000-0000-0000-0000-000000000000"
_MOST = _LEAST.replace("0", "f")
