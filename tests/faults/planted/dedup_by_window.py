"""The consumer tells repeated events by what it saw in the last two seconds, not by a unique key."""

import time
from typing import Any

from tests.faults.planted import replace

FAULTS = ("message.again", "relay.after_confirm", "consumer.after_commit", "message.again")
CAUGHT_AS = {"doubled"}
WINDOW_S = 2.0


def prepare(purchases: Any, analytics: Any) -> None:
    analytics.execute("ALTER TABLE analytics_event_log DROP CONSTRAINT analytics_event_log_pkey")


def plant() -> None:
    from analytics_svc.ingest import apply as applying

    seen: dict[str, float] = {}

    async def remember(connection: Any, events: Any) -> Any:
        new = []
        for event in events:
            if time.monotonic() - seen.get(event.event_id, -WINDOW_S) >= WINDOW_S:
                new.append(event)
            seen[event.event_id] = time.monotonic()
        for event in new:
            await connection.execute(
                "INSERT INTO analytics_event_log (event_id, day, event_type) VALUES (%s, %s, 'PurchaseCreated')",
                [event.event_id, event.day],
            )
        return new, []

    replace(applying, "_remember", remember)
