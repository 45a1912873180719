"""Answers that many want: asked for once, and remembered for a moment."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, NamedTuple, TypeVar

from pages_svc import person

KEPT_MAX = 512

T = TypeVar("T")


class _Kept(NamedTuple):
    until: float
    answer: asyncio.Task[Any]


class Remembered:
    """Whoever asks while the same is being asked waits for that answer; failures are not remembered."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, _Kept] = {}

    async def get(self, key: Hashable, lasts_s: float, ask: Callable[[], Awaitable[T]]) -> T:
        """What `ask` answered within the last `lasts_s` seconds, or answers now; it may raise whatever that does."""
        key = (person.scope(), key)  # what one may see, another may not
        kept, now = self._kept.get(key), time.monotonic()
        if kept is None or kept.until <= now or _failed(kept.answer):
            if len(self._kept) >= KEPT_MAX:
                self._forget(now)
            kept = _Kept(now + lasts_s, asyncio.ensure_future(_run(ask)))
            self._kept[key] = kept
        answer: T = await asyncio.shield(kept.answer)  # one who gives up waiting must not spoil it for others
        return answer

    def clear(self) -> None:
        """Somebody has changed something: what was known of it is old."""
        self._kept.clear()

    def _forget(self, now: float) -> None:
        over = [key for key, kept in self._kept.items() if kept.until <= now and kept.answer.done()]
        for key in over or list(self._kept)[: KEPT_MAX // 2]:
            del self._kept[key]


async def _run(ask: Callable[[], Awaitable[T]]) -> T:
    return await ask()


def _failed(answer: asyncio.Task[Any]) -> bool:
    return answer.done() and (answer.cancelled() or answer.exception() is not None)
