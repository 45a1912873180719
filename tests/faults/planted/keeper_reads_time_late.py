"""complete_through_time is read after the list of what was committed, instead of before."""

import asyncio
from typing import Any

from tests.faults.planted import replace

FAULTS = ("line.slow", "rabbitmq.blocked", "till.clock", "rabbitmq.restart")
CAUGHT_AS = {"untrue"}


def plant() -> None:
    import datetime

    from relay_svc import committed

    async def since(connection: Any, after: Any) -> Any:
        async for part in original(connection, after):
            if part.as_of_time is not None:
                await asyncio.sleep(0.05)
                part = part._replace(as_of_time=datetime.datetime.now(datetime.UTC))
            yield part

    original = replace(committed, "since", since)
