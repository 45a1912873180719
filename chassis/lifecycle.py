"""How a process lives: one asyncio loop on uvloop, a stop event set by SIGTERM or SIGINT, a second signal forces."""

import asyncio
import gc
import os
import random
import resource
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import structlog
import uvloop

FORCED_EXIT_CODE = 130  # what a shell reports for a process ended by Ctrl-C
YOUNG_OBJECTS = 2_000  # more than before, after which those are looked through: half a millisecond

log = structlog.get_logger()


def run(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run `main(stop)` until it returns. It must return within a bound after `stop` is set."""

    async def body() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_signal(name: str) -> None:
            if stop.is_set():
                log.warning("forced to exit", signal=name)
                os._exit(FORCED_EXIT_CODE)
            log.info("stopping", signal=name)
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number.name)
        await main(stop)

    _raise_file_limit()
    _spare_what_stays()
    uvloop.run(body())


def _spare_what_stays() -> None:
    """Modules and what they hold are never garbage. To look through them stops the process for 50 ms, each time.

    At Python's own 700 young objects, most of those that are looked at belong to calls in flight. At 2,000 it takes a
    third of the time; more would save little, and stop the process for longer.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


def _raise_file_limit() -> None:
    """Every connection takes a descriptor; the usual soft limit of 1,024 is meant for programs that use select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def wait_set(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait until the event is set, `timeout_s` at most; True when it is."""
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):  # wait_for() loses a cancellation that comes with the event
            await event.wait()
    return event.is_set()


@asynccontextmanager
async def beside(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Do some work beside the block. It is cancelled when the block ends; should it fail, the block is cancelled."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(part) for part in work]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


class Backoff:
    """Growing, jittered pauses between attempts ("full jitter": many clients must not come back in step)."""

    def __init__(self, first_s: float, most_s: float) -> None:
        self._first_s, self._most_s = first_s, most_s
        self._next_s = first_s

    def reset(self) -> None:
        self._next_s = self._first_s

    def next_s(self) -> float:
        """The length of the next pause, in seconds."""
        pause = random.uniform(self._next_s / 2, self._next_s)
        self._next_s = min(self._next_s * 2, self._most_s)
        return pause
