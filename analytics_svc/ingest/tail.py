"""What is counted while a rebuild is under way: apply() appends it, the rebuild takes it and counts it, too."""

import json
from collections.abc import Sequence
from datetime import date, datetime

from analytics_svc.purchase import Item, PurchaseCreated
from chassis.postgres import Connection


async def append(connection: Connection, events: Sequence[PurchaseCreated]) -> None:
    await connection.execute(
        "INSERT INTO rebuild_tail (event_id, event)"
        " SELECT event_id, event::jsonb FROM unnest(%s::uuid[], %s::text[]) AS counted (event_id, event)",
        [[event.event_id for event in events], [_dumps(event) for event in events]],
    )


async def take(connection: Connection, most: int) -> list[PurchaseCreated]:
    """Some of the events, `most` at most, which are gone from the tail when the transaction commits."""
    cursor = await connection.execute(
        """
        DELETE FROM rebuild_tail WHERE ctid = ANY (ARRAY(SELECT ctid FROM rebuild_tail LIMIT %s))
        RETURNING event
        """,
        [most],
    )
    return [_event(*event) for (event,) in await cursor.fetchall()]


async def clear(connection: Connection) -> None:
    """Take away what an interrupted rebuild has left."""
    await connection.execute("DELETE FROM rebuild_tail")


def _dumps(event: PurchaseCreated) -> str:
    return json.dumps(event, default=str, separators=(",", ":"))  # days and times in ISO's form


def _event(
    event_id: str,
    day: str,
    purchase_time: str,
    branch_id: int,
    customer_id: str | None,
    cents: int,
    items: list[list[int]],
    purchase_id: str | None,
) -> PurchaseCreated:
    return PurchaseCreated(
        event_id,
        date.fromisoformat(day),
        datetime.fromisoformat(purchase_time),
        branch_id,
        customer_id,
        cents,
        [Item(*item) for item in items],
        purchase_id,
    )
