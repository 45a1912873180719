"""The relay is content when any queue takes an event, and does not see to the consumer's."""

from typing import Any

from tests.faults.planted import replace

FAULTS = ("rabbitmq.tapped", "rabbitmq.tapped")
CAUGHT_AS = {"lost", "falsely_sent"}


def plant() -> None:
    from relay_svc import topology

    async def bind(channel: Any) -> None:
        pass

    def bind_before(channel: Any) -> None:
        pass

    replace(topology, "bind", bind)
    replace(topology, "bind_before", bind_before)
