"""How much waits in the consumer's queue."""

import asyncio

from prometheus_client import Gauge

from chassis.lifecycle import wait_set
from relay_svc.publisher import Publisher

LOOK_EVERY_S = 2.0

READY = Gauge("relay_queue_ready", "Messages in the consumer's queue that no consumer has in hand; NaN: not known.")


class Depth:
    """Looks every two seconds, so that whoever asks how it is waits for no broker."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self.ready: int | None = None  # None: not known

    async def watch(self, stop: asyncio.Event) -> None:
        while True:
            self.ready = await self._publisher.ready()
            READY.set(float("nan") if self.ready is None else self.ready)
            if await wait_set(stop, LOOK_EVERY_S):
                return
