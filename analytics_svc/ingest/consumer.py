"""From the queue to the read models: deliveries gather, a batch is applied and committed, then acknowledged.

The publisher owns the exchange; the queue and its binding are made here, and kept by the publisher, too. The only file
that knows the broker.
"""

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pika.spec
import psycopg
import structlog
from pika import BasicProperties
from pika.channel import Channel
from pika.exceptions import AMQPError
from prometheus_client import Counter, Histogram

from analytics_svc.ingest.events import uuid7_time
from analytics_svc.ingest.health import Health
from analytics_svc.ingest.messages import Message
from analytics_svc.ingest.settling import Case, Settler
from chassis import amqp, postgres, traces
from chassis.amqp import BrokerUnavailable
from chassis.lifecycle import Backoff, wait_set
from chassis.traces import Span

EXCHANGE = "purchases"
QUEUE = ROUTING_KEY = "purchases.created"
# The broker drops a message that was delivered more often than the limit, by default 20 times from RabbitMQ 4 on.
# A million stands for never: -1, which says so to version 4, is 0 to version 3.
QUEUE_ARGUMENTS = {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000}

REDELIVERED_MAX = 50  # tried together: few enough to be tried alone when a process dies of one, enough to be quick
# Of bodies in a batch: five of the biggest purchases, or a thousand usual ones. A larger one could outlast what time a
# transaction has, and then would each time that it is tried again.
BATCH_BYTES_MAX = 512 << 10
# Of bodies in hand, and one message more. A prefetch counts messages, whatever their size: 1,500 of the largest that
# RabbitMQ lets through (16 MiB, 128 before version 4) would fill any memory before they are looked at.
HELD_BYTES_MAX = 64 << 20
SILENCE_S = 2.0  # without a delivery, while messages wait in the queue; twice that, and something is wrong
CLOSE_TIMEOUT_S = 5.0  # for the broker to confirm the end of a connection, and with it the last acknowledgements

REDELIVERED = Counter("analytics_redeliveries_total", "Deliveries of messages that were delivered before.")
AGE_SECONDS = Histogram(
    "analytics_event_age_seconds",
    "Time from the recording of a batch's first event to its being counted.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3_600, 86_400),
)
BATCH_SECONDS = Histogram("analytics_batch_seconds", "Time to settle a batch, retries included.")
BATCH_EVENTS = Histogram("analytics_batch_events", "Deliveries in a batch.", buckets=(1, 3, 10, 30, 100, 300, 1_000))

log = structlog.get_logger()


class Properties(BasicProperties):  # type: ignore[misc] # pika has no types
    """Properties that survive headers which pika cannot read, such as a date beyond the year 9999.

    Raising in mid-frame costs pika the connection: it would meet the same message again on every new one, for ever.
    """

    def decode(self, encoded: bytes, offset: int = 0) -> "Properties":
        try:
            super().decode(encoded, offset)
        except Exception:
            self.headers = {"schema_version": "unreadable", "bytes": encoded[offset:].hex()}
        return self


pika.spec.props[BasicProperties.INDEX] = Properties  # where pika looks up what to make of a message's properties


class Delivery(NamedTuple):
    tag: int  # the channel's number for it
    message: Message
    redelivered: bool  # somebody had it before and did not settle it
    case: Case | None  # what it says, if it was read on arrival


class Inbox:
    """What one connection delivered, until it closes or we do.

    It closes itself when the bodies in hand take more than their room, and when there is room for many more of them:
    then `fitting` is the prefetch to go on with. What is in hand will be delivered again.
    """

    def __init__(self, prefetch: int, prefetch_max: int) -> None:
        self.closed = asyncio.Event()
        self.reason = ""
        self.fitting = prefetch
        self.redelivered = 0  # those that are not settled, waiting or taken
        self._prefetch_max = prefetch_max
        self._held_bytes = self._held = 0  # not settled, waiting or taken
        self._largest_bytes = self._seen = 0  # lately
        self._deliveries: deque[Delivery] = deque()
        self._news = asyncio.Event()
        self.silent = True  # since somebody last asked: nothing is in hand, and nothing came

    def put(self, delivery: Delivery) -> None:
        size = len(delivery.message.body)
        self.silent = False
        self.redelivered += delivery.redelivered
        self._held, self._held_bytes = self._held + 1, self._held_bytes + size
        self._seen, self._largest_bytes = self._seen + 1, max(self._largest_bytes, size)
        self._deliveries.append(delivery)
        self._news.set()
        if self._held > 1 and self._held_bytes > HELD_BYTES_MAX:
            self._refit("messages are too large for that many at once")

    def _refit(self, reason: str) -> None:
        self.fitting = max(1, min(self._prefetch_max, HELD_BYTES_MAX // 2 // max(1, self._largest_bytes)))
        self.close(reason)

    def close(self, reason: str) -> None:
        """The first reason is the cause; what follows are its effects."""
        if not self.closed.is_set():
            self.reason = reason
            self.closed.set()
            self._news.set()

    def was_silent(self) -> bool:
        """Whether nothing came since the last time that this was asked, and nothing is in hand."""
        silent, self.silent = self.silent and not self._held, True
        return silent

    async def take(self, most: int, redelivered_most: int) -> list[Delivery]:
        """The oldest deliveries, all redelivered or none of them, as soon as there is one; none when it is closed.

        At least one, and no more than have BATCH_BYTES_MAX in all.
        """
        while not self._deliveries and not self.closed.is_set():
            self._news.clear()
            await self._news.wait()
        if self.closed.is_set():
            return []
        redelivered = self._deliveries[0].redelivered
        if redelivered:
            most = redelivered_most
        batch: list[Delivery] = []
        size = 0
        while self._deliveries and len(batch) < most and self._deliveries[0].redelivered == redelivered:
            size += len(self._deliveries[0].message.body)
            if batch and size > BATCH_BYTES_MAX:
                break
            batch.append(self._deliveries.popleft())
        return batch

    def settled(self, batch: Sequence[Delivery]) -> None:
        self.redelivered -= sum(delivery.redelivered for delivery in batch)
        self._held -= len(batch)
        self._held_bytes -= sum(len(delivery.message.body) for delivery in batch)
        if self.fitting < self._prefetch_max <= self._seen:
            if 2 * self.fitting * self._largest_bytes < HELD_BYTES_MAX // 2:
                self._refit("messages are small enough for more at once")
            self._largest_bytes = self._seen = 0


class Consumer:
    """Consumes over as many connections as it takes; health hears of its "deliveries" and "batches"."""

    def __init__(
        self,
        url: str,
        settler: Settler,
        *,
        batch_max: int,
        prefetch: int,
        health: Health,
    ) -> None:
        self._url, self._settler = url, settler
        self._batch_max, self._prefetch = batch_max, prefetch
        self._health = health

    async def run(self, stop: asyncio.Event) -> None:
        """Consume until `stop`, then finish the batch in flight."""
        backoff, prefetch = Backoff(0.2, 5.0), self._prefetch
        while not stop.is_set():
            try:
                prefetch = await self._run_connection(stop, backoff, prefetch)
            except (BrokerUnavailable, AMQPError) as error:
                await self._health.report("deliveries", False)
                pause_s = backoff.next_s()
                log.warning("no deliveries; trying again", error=amqp.describe(error), pause_s=round(pause_s, 1))
                await wait_set(stop, pause_s)

    async def _run_connection(self, stop: asyncio.Event, backoff: Backoff, prefetch: int) -> int:
        """Consume over one connection until `stop` is set or another prefetch fits better; returns the one that does.

        Its deliveries are acknowledged on its channel or not at all: on another one the same tags mean other messages.

        Raises:
            BrokerUnavailable: the connection is lost.
        """
        inbox = Inbox(prefetch, self._prefetch)
        gone = asyncio.Event()

        def on_connection_close(reason: str) -> None:
            inbox.close(reason)
            gone.set()

        connection = await amqp.connect(self._url, "analytics consumer", on_connection_close)
        stopping = asyncio.create_task(stop.wait())
        stopping.add_done_callback(lambda _: inbox.close("stopping"))
        watching: asyncio.Task[None] | None = None
        try:
            channel = await amqp.open_channel(connection, inbox.close)
            await self._subscribe(channel, inbox)
            watching = asyncio.create_task(self._watch(channel, inbox))
            backoff.reset()
            log.info("consuming", queue=QUEUE, prefetch=prefetch)
            await self._health.report("deliveries", True)
            await self._health.report("batches", True)  # until one proves the contrary
            while batch := await inbox.take(self._batch_max, REDELIVERED_MAX):
                if await self._settle(batch, inbox) and channel.is_open:
                    # All up to this one: batches are settled whole and in the order of delivery.
                    channel.basic_ack(batch[-1].tag, multiple=True)
        finally:
            stopping.cancel()
            if watching:
                watching.cancel()
            amqp.close(connection)
            await wait_set(gone, CLOSE_TIMEOUT_S)
        if inbox.fitting != prefetch:
            log.warning("consuming with another prefetch", reason=inbox.reason, before=prefetch, now=inbox.fitting)
        elif not stop.is_set():
            raise BrokerUnavailable(inbox.reason)
        return inbox.fitting

    async def _subscribe(self, channel: Channel, inbox: Inbox) -> None:
        def on_message(_channel: Channel, method: Any, properties: BasicProperties, body: bytes) -> None:
            if inbox.closed.is_set():
                return  # what was under way already will be delivered again
            if method.redelivered:
                REDELIVERED.inc()
            message = Message(body, vars(properties))
            # Reading on arrival uses the time in which the database applies the batch before. But what may kill is
            # read only after that is noted, and meanwhile nothing else is: else it might be blamed for another's deed.
            case = None if method.redelivered or inbox.redelivered else self._settler.read(message)
            inbox.put(Delivery(method.delivery_tag, message, method.redelivered, case))

        channel.add_on_cancel_callback(lambda _: inbox.close("the broker cancelled the subscription"))
        await amqp.call(channel, channel.queue_declare, queue=QUEUE, durable=True, arguments=QUEUE_ARGUMENTS)
        # Fails as long as the publisher has not made its exchange: a matter of its start.
        await amqp.call(channel, channel.queue_bind, queue=QUEUE, exchange=EXCHANGE, routing_key=ROUTING_KEY)
        await amqp.call(channel, channel.basic_qos, prefetch_count=inbox.fitting)
        await amqp.call(channel, channel.basic_consume, queue=QUEUE, on_message_callback=on_message)

    async def _watch(self, channel: Channel, inbox: Inbox) -> None:
        """Close the inbox when the broker has forgotten us: messages wait, and it delivers none.

        Seen in a cluster, after the node was lost that led the queue; a new connection is served again.
        """
        looks = 0  # one after the other with messages waiting, and none delivered in between
        while not await wait_set(inbox.closed, SILENCE_S):
            if not inbox.was_silent():
                looks = 0
                continue
            try:
                waiting = (
                    await amqp.call(channel, channel.queue_declare, queue=QUEUE, passive=True)
                ).method.message_count
            except (BrokerUnavailable, AMQPError) as error:
                inbox.close(amqp.describe(error))
                return
            looks = looks + 1 if waiting else 0
            if looks == 2:
                inbox.close(f"the broker delivers nothing, though {waiting} messages wait")

    def _cases(self, batch: Sequence[Delivery], spans: Mapping[int, Span]) -> list[Case]:
        cases = [delivery.case or self._settler.read(delivery.message) for delivery in batch]
        for place, span in spans.items():
            cases[place] = cases[place]._replace(span=span)
        return cases

    async def _settle(self, batch: Sequence[Delivery], inbox: Inbox) -> bool:
        """Settle the batch, however often the database has to be asked; False when the inbox closed before it was."""
        backoff, trouble, began = Backoff(0.05, 2.0), False, time.perf_counter()
        with _traced(batch) as spans:
            while True:
                try:
                    if batch[0].redelivered:
                        await self._settler.settle_again([delivery.message for delivery in batch])
                    else:
                        await self._settler.settle(self._cases(batch, spans.spans))
                except postgres.CONFLICT as error:
                    log.info("batch conflicts with another; trying again", error=error)
                except Exception as error:
                    # An outage, or a bug of ours; not the events' fault in any case: they stay unacknowledged.
                    known = isinstance(error, psycopg.Error)
                    log.warning("batch not applied; trying again", error=error, exc_info=not known)
                    trouble = True
                    await self._health.report("batches", False)
                else:
                    break
                if await wait_set(inbox.closed, backoff.next_s()):
                    return False
            for place, span in spans.spans.items():
                log.debug("traced sale settled", event_id=batch[place].message.properties.get("message_id"), **span.ids)
        BATCH_SECONDS.observe(time.perf_counter() - began, spans.exemplar)
        BATCH_EVENTS.observe(len(batch))
        if (recorded_at := uuid7_time(batch[0].message.properties.get("message_id"))) is not None:
            AGE_SECONDS.observe(max(time.time() - recorded_at, 0.0))
        inbox.settled(batch)
        if trouble:
            log.info("batches are applied again")
            await self._health.report("batches", True)
        return True


def _traced(batch: Sequence[Delivery]) -> traces.Together:
    """From the taking of a batch to its being settled, in the trace of each of its sales that has one."""
    destination = f"{EXCHANGE}:{ROUTING_KEY}"  # and the queue, which has the same name
    return traces.together(
        f"process {destination}",
        "CONSUMER",
        (delivery.message.traceparent for delivery in batch),
        {
            "messaging.system": "rabbitmq",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": destination,
            "messaging.batch.message_count": len(batch),
        },
        lambda place: {"messaging.message.id": str(batch[place].message.properties.get("message_id"))},
    )
