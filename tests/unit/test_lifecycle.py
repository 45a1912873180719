"""How a process lives: what waits ends when it is told to."""

import asyncio
import subprocess
import sys

import pytest

from chassis.lifecycle import wait_set


@pytest.mark.parametrize("steps", range(5))
async def test_a_cancellation_that_comes_with_the_event_is_not_lost(steps: int) -> None:
    """Otherwise a loop that waits for work would go on for ever, and its process would never stop."""
    event = asyncio.Event()

    async def run() -> None:
        while True:
            await wait_set(event, 60.0)
            event.clear()

    task = asyncio.create_task(run())
    for _ in range(5):
        await asyncio.sleep(0)
    event.set()
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=20.0)
    task.cancel()
    assert done


def test_collections_spare_what_was_imported() -> None:
    """They stop the process for as long as they look: only what came later is looked at."""
    program = """
import gc
from chassis import grpc_server, lifecycle
async def main(stop):
    gc.collect()
    print(len(gc.get_objects()), gc.get_freeze_count())
lifecycle.run(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    looked_at, spared = map(int, ended.stdout.split())
    assert looked_at < 5_000 < spared
