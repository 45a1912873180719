"""The relay marks everything up to the last confirmed id, instead of exactly what was confirmed."""

from collections.abc import Sequence
from typing import Any

from tests.faults.planted import replace

FAULTS = ("rabbitmq.unbound", "relay.after_claim", "rabbitmq.restart")
CAUGHT_AS = {"lost", "falsely_sent"}


def plant() -> None:
    from relay_svc import outbox

    async def mark_sent(connection: Any, event_ids: Sequence[str], among: Any) -> None:
        if event_ids:
            await connection.execute(
                "UPDATE outbox_events SET status = 'SENT', sent_at = now() WHERE status = 'NEW' AND event_id <= %s",
                [max(event_ids)],
            )

    replace(outbox, "mark_sent", mark_sent)
