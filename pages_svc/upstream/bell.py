"""Tells any number of waiting tasks that something has changed, however often it has."""

import asyncio


class Bell:
    def __init__(self) -> None:
        self.count = 0
        self._rung = asyncio.Event()

    def ring(self) -> None:
        self.count += 1
        self._rung.set()
        self._rung = asyncio.Event()

    async def wait_beyond(self, count: int) -> int:
        """Wait until it was rung more often than `count`; how often it was."""
        while self.count <= count:
            await self._rung.wait()
        return self.count
