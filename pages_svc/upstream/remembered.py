"""Answers that many want: asked for once, and remembered for a moment."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, TypeVar

from pages_svc import person

KEPT_MAX = 512
# So long, nobody asks again what has failed: each would wait for as long as it takes to fail, and nothing has changed.
FAILURE_LASTS_S = 1.0

T = TypeVar("T")


class _Kept:
    """A question, and its answer once there is one."""

    def __init__(self, lasts_s: float, ask: Callable[[], Awaitable[Any]]) -> None:
        self.asked_at = time.monotonic()
        self.until = self.asked_at + lasts_s
        self.answer = asyncio.ensure_future(self._run(ask))

    async def _run(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await ask()
        except Exception:
            self.until = time.monotonic() + FAILURE_LASTS_S
            raise

    @property
    def over(self) -> bool:
        return self.answer.done() and (self.answer.cancelled() or self.until <= time.monotonic())


class Remembered:
    """Whoever asks while the same is being asked waits for that answer."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, _Kept] = {}

    async def get(
        self, key: Hashable, lasts_s: float, ask: Callable[[], Awaitable[T]], *, patience_s: float | None = None
    ) -> T:
        """What `ask` answered within the last `lasts_s` seconds, or answers now; it raises whatever that does, or did a
        moment ago.

        Raises:
            TimeoutError: there is no answer `patience_s` after it was asked for, by whomever: of those who come while
                a service is frozen, the first one waits.
        """
        key = (person.scope(), key)  # what one may see, another may not
        kept = self._kept.get(key)
        if kept is None or kept.over:
            if len(self._kept) >= KEPT_MAX:
                self._forget()
            kept = self._kept[key] = _Kept(lasts_s, ask)
        left_s = None if patience_s is None else max(kept.asked_at + patience_s - time.monotonic(), 0)
        async with asyncio.timeout(left_s):
            answer: T = await asyncio.shield(kept.answer)  # one who gives up waiting must not spoil it for others
        return answer

    def clear(self) -> None:
        """Somebody has changed something: what was known of it is old."""
        self._kept.clear()

    def _forget(self) -> None:
        over = [key for key, kept in self._kept.items() if kept.over]
        for key in over or list(self._kept)[: KEPT_MAX // 2]:
            del self._kept[key]
