"""The consumer counts events in one transaction and remembers in the next that it did."""

import asyncio
from typing import Any

from tests.faults.planted import replace

FAULTS = ("consumer.after_decode", "syscall.consumer", "postgres.immediate_stop", "consumer.after_decode")
CAUGHT_AS = {"doubled", "unbalanced"}


def plant() -> None:
    from analytics_svc.ingest import apply as applying
    from analytics_svc.ingest import settling
    from analytics_svc.purchase import PurchaseCreated

    async def apply(self: Any, cases: Any, tried: bool) -> Any:
        events = {c.event.event_id: c.event for c in cases if isinstance(c.event, PurchaseCreated)}
        async with self._pool.connection() as connection, connection.transaction():
            cursor = await connection.execute(
                "SELECT event_id::text FROM analytics_event_log WHERE event_id = ANY(%s::uuid[])", [list(events)]
            )
            known = {event_id for (event_id,) in await cursor.fetchall()}
            new = [event for event_id, event in events.items() if event_id not in known]
            if new:
                await fold(connection, new)
        await asyncio.sleep(0.03)
        return await original(self, cases, tried)

    async def only_remembered(connection: Any, new: Any) -> None:
        pass

    original = replace(settling.Settler, "_apply", apply)
    fold = replace(applying, "fold", only_remembered)
