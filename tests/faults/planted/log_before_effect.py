"""The consumer remembers in one transaction that it counted events, and counts them in the next."""

import asyncio
from typing import Any

from tests.faults.planted import replace

FAULTS = ("consumer.after_decode", "syscall.consumer", "postgres.immediate_stop", "consumer.after_decode")
CAUGHT_AS = {"lost", "unbalanced", "altered"}


def plant() -> None:
    from analytics_svc.ingest import apply as applying
    from analytics_svc.ingest import settling

    folds: list[Any] = []

    async def put_off(connection: Any, new: Any) -> None:
        folds.append(new)

    async def apply(self: Any, cases: Any, tried: bool) -> Any:
        folds.clear()
        applied = await original(self, cases, tried)
        await asyncio.sleep(0.03)
        for new in folds:
            async with self._pool.connection() as connection, connection.transaction():
                await fold(connection, new)
        return applied

    original = replace(settling.Settler, "_apply", apply)
    fold = replace(applying, "fold", put_off)
