"""How deliveries become batches."""

from analytics_svc.consumer import BATCH_BYTES_MAX, Delivery, Inbox
from analytics_svc.messages import Message


def delivery(tag: int, size: int, redelivered: bool = False) -> Delivery:
    return Delivery(tag, Message(b"x" * size, {}), redelivered, None)


async def test_batch_is_bounded_by_its_bytes() -> None:
    """Too much at once would outlast the statement's timeout, each time anew; a single message always goes."""
    inbox = Inbox()
    third = BATCH_BYTES_MAX // 3
    for tag, size in enumerate([third, third, third, third, 2 * BATCH_BYTES_MAX, 1, 1]):
        inbox.put(delivery(tag, size))
    batches = [[taken.tag for taken in await inbox.take(500, 50)] for _ in range(4)]
    assert batches[:3] == [[0, 1, 2], [3], [4]]
    assert batches[3] == [5, 6]


async def test_batch_is_bounded_by_its_number_and_kind() -> None:
    inbox = Inbox()
    for tag in range(6):
        inbox.put(delivery(tag, 10, redelivered=tag < 3))
    assert [[taken.tag for taken in await inbox.take(2, 2)] for _ in range(4)] == [[0, 1], [2], [3, 4], [5]]
