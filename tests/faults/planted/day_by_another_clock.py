"""The consumer cuts business days in UTC instead of the chain's time zone."""

from typing import Any

from tests.faults.planted import replace

FAULTS = ("till.clock",) * 2
CAUGHT_AS = {"altered"}


def plant() -> None:
    from analytics_svc.ingest import settling

    async def apply(connection: Any, events: Any, unfit: Any) -> Any:
        return await original(connection, [e._replace(day=e.purchase_time.date()) for e in events], unfit)

    original = replace(settling, "apply", apply)
