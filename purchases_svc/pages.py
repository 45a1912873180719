"""Purchases read back: one, lists, a day's export. Every function takes the connection and commits nothing."""

import datetime
from collections.abc import AsyncGenerator, Sequence
from typing import Any, LiteralString

from chassis.postgres import Connection
from purchases_svc import windows
from purchases_svc.purchase_rows import COLUMNS, with_items
from purchases_svc.sale import EARLIEST, Purchase
from purchases_svc.windows import NEWEST_AHEAD

ITEMS_PER_PAGE_MAX = 50_000  # a page of the biggest purchases would not fit into a message
EXPORT_CHUNK = 200  # purchases fetched at a time; their items come with them


async def by_id(connection: Connection, purchase_id: str, branch_id: int | None = None) -> Purchase | None:
    """A purchase, if it is that branch's, should one be given. Its id tells the millisecond of its time, and so the one
    partition to look into."""
    milliseconds = int(purchase_id[:8] + purchase_id[9:13], 16)
    cursor = await connection.execute(
        f"SELECT {COLUMNS} FROM purchases p WHERE p.purchase_id = %(id)s"
        " AND p.purchase_time >= to_timestamp(%(ms)s / 1000.0)"
        " AND p.purchase_time < to_timestamp((%(ms)s + 1) / 1000.0)"
        " AND (%(branch_id)s::int IS NULL OR p.branch_id = %(branch_id)s::int)",
        {"id": purchase_id, "ms": milliseconds, "branch_id": branch_id},
    )
    found = await with_items(connection, await cursor.fetchall())
    return found[0] if found else None


async def page(
    connection: Connection,
    *,
    limit: int,
    before: tuple[datetime.datetime, str] | None,
    branch_id: int | None,
    customer_id: str | None,
    start: datetime.datetime | None,
    end: datetime.datetime | None,
) -> tuple[list[Purchase], bool]:
    """Purchases by time, the latest first, from `before` on; and whether there are more.

    The page is shorter than `limit` where purchases have so many items that they would not fit into a message.
    """
    conditions: list[LiteralString] = [
        "p.purchase_time >= %(from)s AND p.purchase_time < %(to)s",
        "p.branch_id NOT IN (SELECT branch_id FROM unlisted_branches)",
    ]
    if branch_id is not None:
        conditions.append("p.branch_id = %(branch_id)s")
    if customer_id is not None:
        conditions.append("p.customer_id = %(customer_id)s")
    newest = max(datetime.datetime.now(datetime.UTC), EARLIEST) + NEWEST_AHEAD
    if before is not None:
        conditions.append("(p.purchase_time, p.purchase_id) < (%(before_time)s, %(before_id)s)")
        newest = min(newest, before[0] + datetime.timedelta.resolution)
    rows: list[tuple[Any, ...]] = []
    for first, last in windows.back(max(start or EARLIEST, EARLIEST), min(end or newest, newest)):
        cursor = await connection.execute(
            f"SELECT {COLUMNS} FROM purchases p WHERE {' AND '.join(conditions)}"
            " ORDER BY p.purchase_time DESC, p.purchase_id DESC LIMIT %(limit)s",
            {
                "from": first,
                "to": last,
                "branch_id": branch_id,
                "customer_id": customer_id,
                "before_time": before and before[0],
                "before_id": before and before[1],
                "limit": limit + 1 - len(rows),
            },
            prepare=False,  # planned for this very range: then only its partitions are looked at
        )
        rows += await cursor.fetchall()
        if len(rows) > limit:
            break
    fitting, items = 0, 0
    for row in rows[:limit]:
        items += row[-1]
        if fitting and items > ITEMS_PER_PAGE_MAX:
            break
        fitting += 1
    return await with_items(connection, rows[:fitting]), len(rows) > fitting


async def export_day(
    connection: Connection, day: datetime.date, customer_ids: Sequence[str]
) -> AsyncGenerator[Purchase, None]:
    """The purchases of one business day in the order in which they were recorded, all from one snapshot; only those
    customers' if there are any.
    """
    async with connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        async with connection.cursor(name="export") as cursor:
            await cursor.execute(
                f"SELECT {COLUMNS} FROM purchases p"
                " WHERE p.business_day = %(day)s"
                "   AND p.purchase_time >= %(from)s AND p.purchase_time < %(to)s"
                "   AND p.branch_id NOT IN (SELECT branch_id FROM unlisted_branches)"
                "   AND (%(everybody)s OR p.customer_id = ANY(%(customer_ids)s::uuid[]))"
                " ORDER BY p.created_xid",
                {
                    "day": day,
                    **windows.around(day, day),
                    "everybody": not customer_ids,
                    "customer_ids": list(customer_ids),
                },
            )
            while rows := await cursor.fetchmany(EXPORT_CHUNK):
                for purchase in await with_items(connection, rows):
                    yield purchase
