"""The relay counts an outage of the broker as the events' own fault, and gives them up."""

from collections.abc import Sequence
from typing import Any

from tests.faults.planted import replace

FAULTS = ("rabbitmq.blocked", "rabbitmq.restart")
CAUGHT_AS = {"parked_good"}


def plant() -> None:
    from relay_svc import publisher

    async def publish(self: Any, events: Sequence[Any]) -> Any:
        outcome = await original(self, events)
        if outcome.outage:
            rest = {event.event_id: outcome.outage for event in events if event.event_id not in outcome.confirmed}
            return outcome._replace(faulty=rest)
        return outcome

    original = replace(publisher.Publisher, "publish", publish)
