"""The consumer acknowledges what it cannot read, and forgets it."""

from typing import Any

from tests.faults.planted import replace

FAULTS = ("message.bad", "message.bad")
CAUGHT_AS = {"poison"}


def plant() -> None:
    from analytics_svc.ingest import settling

    async def apply(connection: Any, events: Any, unfit: Any) -> Any:
        return await original(connection, events, [])

    original = replace(settling, "apply", apply)
