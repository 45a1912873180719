"""What many ask for is asked once, and what has failed is not asked again by each."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from pages_svc.upstream import remembered
from pages_svc.upstream.remembered import Remembered
from tests.conftest import eventually


class Service:
    """Counts how often it is asked."""

    def __init__(self, answer: Callable[[], Awaitable[str]]) -> None:
        self.asked = 0
        self._answer = answer

    async def ask(self) -> str:
        self.asked += 1
        return await self._answer()


async def right() -> str:
    return "here"


async def away() -> str:
    raise ConnectionError("away")


async def test_who_asks_at_once_asks_once() -> None:
    known, service = Remembered(), Service(right)
    assert await asyncio.gather(*(known.get("sums", 60, service.ask) for _ in range(10))) == ["here"] * 10
    assert await known.get("sums", 60, service.ask) == "here"
    assert service.asked == 1
    assert await known.get("others", 60, service.ask) == "here"
    known.clear()
    assert await known.get("sums", 60, service.ask) == "here"
    assert service.asked == 3


async def test_what_failed_is_not_asked_again_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    known, service = Remembered(), Service(away)
    for _ in range(10):
        with pytest.raises(ConnectionError):
            await known.get("sums", 60, service.ask)
    assert service.asked == 1
    monkeypatch.setattr(remembered, "FAILURE_LASTS_S", 0.0)
    known.clear()
    for _ in range(2):
        with pytest.raises(ConnectionError):
            await known.get("sums", 60, service.ask)
    assert service.asked == 3  # the moment over, it is asked, however long an answer would have lasted


async def test_a_failure_lasts_from_when_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from when it was asked for: a service that is slow to fail would be asked by everybody again."""
    monkeypatch.setattr(remembered, "FAILURE_LASTS_S", 60.0)
    fails = asyncio.Event()

    async def slowly_away() -> str:
        await fails.wait()
        raise ConnectionError("away")

    known, service = Remembered(), Service(slowly_away)
    first = asyncio.create_task(known.get("sums", 0.0, service.ask))

    async def asked() -> bool:
        return service.asked == 1

    await eventually(asked, "it is asked")
    second = asyncio.create_task(known.get("sums", 0.0, service.ask))  # beyond what an answer lasts: still the same
    await asyncio.sleep(0)
    fails.set()
    for waiting in (first, second):
        with pytest.raises(ConnectionError):
            await waiting
    with pytest.raises(ConnectionError):
        await known.get("sums", 0.0, service.ask)
    assert service.asked == 1


async def test_of_those_who_meet_a_frozen_service_one_waits() -> None:
    known, thawed = Remembered(), asyncio.Event()

    async def frozen() -> str:
        await thawed.wait()
        return "here"

    service = Service(frozen)
    with pytest.raises(TimeoutError):
        await known.get("sums", 60, service.ask, patience_s=0.2)
    began = time.monotonic()
    for _ in range(100):
        with pytest.raises(TimeoutError):
            await known.get("sums", 60, service.ask, patience_s=0.2)
    assert time.monotonic() - began < 0.2 * 100 / 2  # each alone would have waited as long
    thawed.set()
    assert await known.get("sums", 60, service.ask) == "here"  # the first question went on
    assert service.asked == 1
