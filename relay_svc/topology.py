"""What must be there for an event to be counted: the exchange, the consumer's queue, and the binding between them.

`mandatory` proves that some queue took a message. With others bound to the exchange that need not be the consumer's, so
the relay makes sure of that one itself, again before each window: to declare and to bind changes nothing where all is
well. AMQP has no way to ask whether a binding is there.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import structlog
from pika.channel import Channel

from chassis import amqp

EXCHANGE = "purchases"
QUEUE = ROUTING_KEY = "purchases.created"
# As the consumer declares it, to the letter: a test compares the two. Why a million, it says there.
QUEUE_ARGUMENTS: Mapping[str, Any] = {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000}

log = structlog.get_logger()


class Queue(NamedTuple):
    ready: int  # messages that no consumer has in hand
    consumers: int


async def make_sure(connection: amqp.Connection) -> None:
    """Make what is missing. A queue that is there is taken as it is.

    Raises:
        BrokerUnavailable: something is missing and cannot be made; the text says what, and why.
    """
    channel = await amqp.open_channel(connection, on_close=lambda _: None)
    await _step(
        f"exchange {EXCHANGE}",
        amqp.call(channel, channel.exchange_declare, exchange=EXCHANGE, exchange_type="topic", durable=True),
    )
    try:
        await amqp.call(channel, channel.queue_declare, queue=QUEUE, passive=True)
    except amqp.BrokerUnavailable as error:  # the channel with it
        channel = await amqp.open_channel(connection, on_close=lambda _: None)
        await _step(
            f"queue {QUEUE}",
            amqp.call(channel, channel.queue_declare, queue=QUEUE, durable=True, arguments=dict(QUEUE_ARGUMENTS)),
        )
        log.warning("the consumer's queue was missing; made it", queue=QUEUE, error=error)
    await bind(channel)
    channel.close()


async def bind(channel: Channel) -> None:
    """Bind the queue, and wait until that is done.

    Raises:
        BrokerUnavailable: it is not, for want of the queue, the exchange or the right; the channel is closed.
    """
    await _step(
        f"binding of {QUEUE} to {EXCHANGE}",
        amqp.call(channel, channel.queue_bind, queue=QUEUE, exchange=EXCHANGE, routing_key=ROUTING_KEY),
    )


def bind_before(channel: Channel) -> None:
    """As `bind`, in front of what is published next, without waiting: if it fails, the broker closes the channel and
    takes none of that."""
    channel.queue_bind(QUEUE, EXCHANGE, ROUTING_KEY)


async def look(channel: Channel) -> Queue:
    """The consumer's queue as it is now.

    Raises:
        BrokerUnavailable: it is missing; the channel is closed.
    """
    found = (await amqp.call(channel, channel.queue_declare, queue=QUEUE, passive=True)).method
    return Queue(found.message_count, found.consumer_count)


async def _step(what: str, done: Any) -> None:
    try:
        await done
    except amqp.BrokerUnavailable as error:
        raise amqp.BrokerUnavailable(f"no {what}: {error}") from None
