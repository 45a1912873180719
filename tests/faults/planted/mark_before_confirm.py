"""The relay marks events as sent once they are on the wire, and does not wait for the broker to have them."""

from collections.abc import Sequence
from typing import Any

from tests.faults.planted import replace

FAULTS = ("rabbitmq.swallowed", "rabbitmq.kill", "rabbitmq.swallowed", "rabbitmq.blocked")
CAUGHT_AS = {"lost", "falsely_sent", "rescued"}


def plant() -> None:
    from relay_svc import publisher

    async def sent(self: Any, events: Sequence[Any]) -> Any:
        window = await original(self, events)
        window.events = [event.event_id for event in events]
        return window

    async def settle(self: Any, window: Any) -> None:
        self._windows.discard(window)
        if window.trouble is None:
            window.confirmed = window.events

    original = replace(publisher.Publisher, "_sent", sent)
    replace(publisher.Publisher, "_settle", settle)
