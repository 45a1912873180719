"""The consumer passes amounts through binary floating point, and cuts off what is below a cent."""

from typing import Any

from tests.faults.planted import replace

FAULTS = ("till.clock",) * 2
CAUGHT_AS = {"altered"}


def plant() -> None:
    from analytics_svc.ingest import settling

    async def apply(connection: Any, events: Any, unfit: Any) -> Any:
        events = [event._replace(cents=int(event.cents / 100 * 100)) for event in events]  # 1.15 becomes 114
        return await original(connection, events, unfit)

    original = replace(settling, "apply", apply)
