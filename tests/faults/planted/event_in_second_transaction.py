"""The event is written in a transaction of its own, after the sale's."""

import asyncio
from typing import Any

from tests.faults.planted import replace

FAULTS = ("postgres.backend_terminated", "postgres.immediate_stop", "purchases.during_commit", "syscall.purchases")
CAUGHT_AS = {"lost", "not_quiet"}


def plant() -> None:
    from purchases_svc import flush, insert

    begin, end = insert._INSERT.index(", new_event AS ("), insert._INSERT.index("SELECT n FROM input")
    replace(insert, "_INSERT", insert._INSERT[:begin] + "\n" + insert._INSERT[end:])

    async def insert_twice(connection: Any, purchases: Any, *more: Any) -> Any:
        refused = await original(connection, purchases, *more)
        await asyncio.sleep(0.02)
        for n, purchase in enumerate(purchases):
            if n not in refused:
                await connection.execute(
                    "INSERT INTO outbox_events (event_id, event_type, aggregate_id, occurred_at, payload_json)"
                    " VALUES (%s, 'PurchaseCreated', %s, %s, %s)",
                    [purchase.event_id, purchase.purchase_id, purchase.created_at, insert.event_json(purchase)],
                )
        return refused

    original = replace(flush, "insert", insert_twice)
