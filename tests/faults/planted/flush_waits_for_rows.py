"""The purchases service stores one batch after the other, and waits for rows that somebody holds."""

import asyncio
from contextlib import nullcontext
from typing import Any

from tests.faults.planted import replace

FAULTS = ("postgres.row_held",)
CAUGHT_AS = {"stopped"}


def plant() -> None:
    from purchases_svc import flush, writing

    one_at_a_time = asyncio.Lock()

    async def wait_and_insert(*arguments: Any, **options: Any) -> Any:
        async with one_at_a_time:
            return await insert(*arguments, **options)

    insert = replace(flush, "insert", wait_and_insert)
    replace(flush, "LOCK_TIMEOUT", {"lock_timeout": "0", "statement_timeout": "0"})
    replace(writing, "patience", lambda *_: nullcontext())
