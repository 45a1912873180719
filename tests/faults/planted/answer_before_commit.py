"""The purchases service answers a till before the sale is stored."""

from typing import Any

from tests.faults.planted import replace

FAULTS = ("purchases.before_commit", "purchases.during_commit", "postgres.immediate_stop", "syscall.purchases")
CAUGHT_AS = {"lost"}


def plant() -> None:
    from purchases_svc import answers, flush

    async def store(self: Any, batch: Any, *more: Any) -> None:
        for entry in batch:
            entry.settle(answers.Recorded(entry.purchase, replayed=False))
        await original(self, batch, *more)

    original = replace(flush.Flushes, "_store", store)
