"""complete_through_time moves on without waiting for the events that it lists to be counted."""

from typing import Any

from tests.faults.planted import replace

FAULTS = ("rabbitmq.blocked", "till.clock", "rabbitmq.restart")
CAUGHT_AS = {"untrue"}


def plant() -> None:
    from analytics_svc.proof import keeper

    async def unsettled(connection: Any, ids: str) -> Any:
        return None

    replace(keeper, "unsettled", unsettled)
