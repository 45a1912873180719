"""What an upload stream has in hand: how much that may be, and in which order it is answered."""

import asyncio
from typing import Any

import pytest

from chassis.errors import Overloaded
from chassis.in_flight import PEER_BYTES_MAX, InFlight
from purchases_svc import in_hand
from purchases_svc.in_hand import BATCHES_MAX, InHand, Single


@pytest.fixture
def in_flight() -> InFlight:
    return InFlight()


@pytest.fixture
def hand(in_flight: InFlight) -> InHand:
    return InHand(in_flight, "till")


async def has_room(hand: InHand) -> bool:
    """Whether another message may be read now."""
    room = asyncio.ensure_future(hand.room())
    await asyncio.sleep(0)
    room.cancel()
    return room.done() and not room.cancelled()


async def first(answerable: Any) -> Any:
    return await asyncio.wait_for(anext(answerable), 10)


def empty(in_flight: InFlight) -> bool:
    try:
        in_flight.take("till", PEER_BYTES_MAX)
    except Overloaded:
        return False
    in_flight.give_back("till", PEER_BYTES_MAX)
    return True


async def test_single_sales_have_room_until_there_are_many(hand: InHand, monkeypatch: pytest.MonkeyPatch) -> None:
    """While they are too many, no more is read; there is room again when answers are out, not when they are there."""
    monkeypatch.setattr(in_hand, "SINGLES_MAX", 2)
    one, _ = hand.take_single("one", 10), hand.take_single("two", 10)
    assert not await has_room(hand)
    hand.settled(one)
    answerable = hand.answerable()
    assert await first(answerable) == [one]
    assert not await has_room(hand)
    following = asyncio.ensure_future(anext(answerable))
    await asyncio.sleep(0)
    assert await has_room(hand)
    following.cancel()


async def test_single_sales_have_room_until_they_are_large(hand: InHand, in_flight: InFlight) -> None:
    """Their bytes are counted, here and for the whole server, until they are answered or the stream ends."""
    hand.take_single("large", in_hand.SINGLES_BYTES_MAX)
    assert not await has_room(hand)
    assert not empty(in_flight)
    hand.close()
    assert empty(in_flight)
    with pytest.raises(Overloaded):
        hand.take_single("too large for this connection", PEER_BYTES_MAX + 1)
    assert empty(in_flight)


async def test_answers_leave_as_they_come(hand: InHand, in_flight: InFlight) -> None:
    """Sales one by one, those that are ready together; batches whole; nothing waits for what came before it."""
    singles = [hand.take_single(str(number), 10) for number in range(4)]
    batch: asyncio.Task[str] = asyncio.create_task(asyncio.sleep(0, "batch"))
    never: asyncio.Task[None] = asyncio.create_task(asyncio.sleep(3600))
    hand.take_batch(batch)
    hand.take_batch(never)
    assert BATCHES_MAX == 2 and not await has_room(hand)
    answerable = hand.answerable()
    assert await first(answerable) is batch
    for single in (singles[3], singles[1]):
        hand.settled(single)
    assert await first(answerable) == [singles[3], singles[1]]
    hand.all_read()
    hand.settled(singles[0])
    assert await first(answerable) == [singles[0]]
    never.cancel()
    assert await first(answerable) is never
    hand.settled(singles[2])
    assert await first(answerable) == [singles[2]]
    with pytest.raises(StopAsyncIteration):
        await first(answerable)
    assert empty(in_flight)


async def test_a_sale_that_was_not_taken_in_is_its_own_outcome(hand: InHand) -> None:
    single: Single = hand.take_single("refused", 10)
    single.refusal = Overloaded("busy")
    assert single.outcome is single.refusal
