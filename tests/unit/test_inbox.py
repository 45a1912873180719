"""How deliveries become batches."""

from analytics_svc.ingest.consumer import BATCH_BYTES_MAX, HELD_BYTES_MAX, Delivery, Inbox
from analytics_svc.ingest.messages import Message


def delivery(tag: int, size: int, redelivered: bool = False) -> Delivery:
    return Delivery(tag, Message(b"x" * size, {}), redelivered, None)


async def test_batch_is_bounded_by_its_bytes() -> None:
    """Too much at once would outlast the statement's timeout, each time anew; a single message always goes."""
    inbox = Inbox(1_500, 1_500)
    third = BATCH_BYTES_MAX // 3
    for tag, size in enumerate([third, third, third, third, 2 * BATCH_BYTES_MAX, 1, 1]):
        inbox.put(delivery(tag, size))
    batches = [[taken.tag for taken in await inbox.take(500, 50)] for _ in range(4)]
    assert batches[:3] == [[0, 1, 2], [3], [4]]
    assert batches[3] == [5, 6]


async def test_batch_is_bounded_by_its_number_and_kind() -> None:
    inbox = Inbox(1_500, 1_500)
    for tag in range(6):
        inbox.put(delivery(tag, 10, redelivered=tag < 3))
    assert [[taken.tag for taken in await inbox.take(2, 2)] for _ in range(4)] == [[0, 1], [2], [3, 4], [5]]


async def test_too_many_bytes_in_hand_ask_for_a_smaller_prefetch_and_small_ones_for_a_larger() -> None:
    """However many there are of the largest, half of the room is enough for them; one alone always has room."""
    inbox = Inbox(1_500, 1_500)
    for tag in range(4):
        inbox.put(delivery(tag, HELD_BYTES_MAX // 4))
    assert not inbox.closed.is_set()
    inbox.put(delivery(4, 1))
    assert (inbox.closed.is_set(), inbox.fitting, await inbox.take(500, 50)) == (True, 2, [])

    inbox = Inbox(2, 20)
    for tag in range(40):
        inbox.put(delivery(tag, HELD_BYTES_MAX // 8 if tag == 5 else 100))
        assert not inbox.closed.is_set()
        inbox.settled(await inbox.take(1, 1))
    assert (inbox.closed.is_set(), inbox.fitting) == (True, 20)

    inbox = Inbox(1, 1_500)
    inbox.put(delivery(0, 2 * HELD_BYTES_MAX))
    assert not inbox.closed.is_set()
