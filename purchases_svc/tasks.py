"""Work that goes on beside the calls, and is waited for when the process stops."""

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any


class Tasks:
    def __init__(self) -> None:
        self._under_way: set[asyncio.Task[None]] = set()
        # That of the process: work is for many calls, and must not log as if it were for the one that set it off.
        self._context = contextvars.copy_context()

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, context=self._context.copy())
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    async def close(self, patience_s: float) -> None:
        """Wait until all is done; what is not by then is cut off."""
        if self._under_way:
            _, late = await asyncio.wait(self._under_way, timeout=patience_s)
            for task in late:
                task.cancel()
