"""complete_through_time is read after the list of what was committed, instead of before."""

import asyncio
from typing import Any

from tests.faults.planted import replace

FAULTS = ("rabbitmq.blocked", "rabbitmq.swallowed") * 3
CAUGHT_AS = {"untrue"}
LATE_S = 0.5  # in which the events can begin to be stuck


def plant() -> None:
    import datetime

    from relay_svc import committed

    async def since(connection: Any, after: Any) -> Any:
        async for part in original(connection, after):
            if part.as_of_time is not None:
                await asyncio.sleep(LATE_S)
                part = part._replace(as_of_time=datetime.datetime.now(datetime.UTC))
            yield part

    original = replace(committed, "since", since)
