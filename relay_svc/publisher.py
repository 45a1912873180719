"""Publishing with confirms, a window at a time. The only file that knows the broker."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import pika
import structlog
from pika.channel import Channel
from pika.exceptions import AMQPError

from chassis import amqp
from relay_svc.outbox import OutboxEvent

EXCHANGE = "purchases"
ROUTING_KEYS = {"PurchaseCreated": "purchases.created"}
SCHEMA_VERSION = 1
PAYLOAD_BYTES_MAX = 4 << 20  # thirty times the biggest purchase; RabbitMQ would close the channel over a huge one
PERSISTENT = 2

log = structlog.get_logger()


class Outcome(NamedTuple):
    """What became of a window. What is neither confirmed nor faulty stays as it was: the outage's fault."""

    confirmed: list[str]  # event ids that the broker routed and stored
    faulty: dict[str, str]  # event id → why this event can never be published as it is
    outage: str | None  # why the broker did not take the rest


class Publisher:
    """A connection that comes back by itself, and a window of messages in flight on it."""

    def __init__(self, url: str, confirm_timeout_s: float) -> None:
        self._url, self._confirm_timeout_s = url, confirm_timeout_s
        self._connection: amqp.Connection | None = None
        self._channel: Channel | None = None
        self._link: object | None = None  # stands for the present connection, in what its callbacks carry
        self._tag = 0  # the last delivery tag; the broker counts messages per channel from 1
        self._in_flight: dict[int, str] = {}  # delivery tag → event id, in order of tags
        self._confirmed: list[str] = []
        self._returned: dict[str, str] = {}  # event id → why it could not be routed
        self._trouble: str | None = None
        self._settled = asyncio.Event()
        self._blocked = False

    async def connect(self) -> str | None:
        """Connect, unless we are; returns why the broker does not let us. The exchange is there from then on."""
        try:
            await self._open_channel()
        except (amqp.BrokerUnavailable, AMQPError) as error:
            return amqp.describe(error)
        return None

    async def publish(self, events: Sequence[OutboxEvent]) -> Outcome:
        """Publish a window and wait until the broker has spoken on every message, or the deadline passes.

        "Confirmed" means routed and stored: RabbitMQ also acks what no queue takes, hence `mandatory`. Such a message
        comes back first, without its delivery tag, and is told by its id.
        """
        faulty = {e.event_id: fault for e in events if (fault := _fault(e)) is not None}
        self._in_flight.clear()
        self._confirmed, self._returned, self._trouble = [], {}, None
        self._settled.clear()
        try:
            channel = await self._open_channel()
            for event in events:
                if event.event_id not in faulty:
                    self._send(channel, event)
            if self._in_flight:
                await asyncio.wait_for(self._settled.wait(), self._confirm_timeout_s)
        except (amqp.BrokerUnavailable, AMQPError) as error:
            self._trouble = amqp.describe(error)
        except TimeoutError:
            why = "it blocks publishers: out of memory or disk space" if self._blocked else "it does not answer"
            self._trouble = f"the broker did not confirm within {self._confirm_timeout_s:g} s: {why}"
        if self._returned and self._trouble is None:
            self._trouble = f"no queue takes the messages: {next(iter(self._returned.values()))}"
        if self._in_flight:
            self.disconnect()  # late confirms must not be taken for those of the next window
        return Outcome(self._confirmed, faulty, self._trouble)

    def disconnect(self) -> None:
        """Close the connection; the next window opens a new one."""
        self._link = None
        if self._connection is not None:
            amqp.close(self._connection)
        self._connection = self._channel = None

    def _send(self, channel: Channel, event: OutboxEvent) -> None:
        headers: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
        if event.traceparent:
            headers["traceparent"] = event.traceparent
        properties = pika.BasicProperties(
            message_id=event.event_id,
            type=event.event_type,
            content_type="application/json",
            delivery_mode=PERSISTENT,
            headers=headers,
        )
        self._tag += 1
        self._in_flight[self._tag] = event.event_id
        channel.basic_publish(
            EXCHANGE, ROUTING_KEYS[event.event_type], event.payload.encode(), properties, mandatory=True
        )

    async def _open_channel(self) -> Channel:
        """The channel in confirm mode, on a new connection if need be. The publisher owns the exchange."""
        if self._connection is not None and self._channel is not None and self._channel.is_open:
            return self._channel
        self.disconnect()
        connection = await amqp.connect(self._url, "relay", on_close=lambda reason: self._on_loss(link, reason))
        # What an earlier connection still has to say, after its window was given up, must not be taken for the present
        # one's: its tags would stand for other events.
        link = self._link = object()
        try:
            channel = await amqp.open_channel(connection, on_close=lambda reason: self._on_loss(link, reason))
            await amqp.call(channel, channel.exchange_declare, exchange=EXCHANGE, exchange_type="topic", durable=True)
            on_confirm = partial(self._on_confirm, link)
            await amqp.call(channel, channel.confirm_delivery, ack_nack_callback=on_confirm)
        except BaseException:
            amqp.close(connection)
            raise
        channel.add_on_return_callback(partial(self._on_return, link))
        connection.add_on_connection_blocked_callback(lambda *_: self._on_blocked(link, True))
        connection.add_on_connection_unblocked_callback(lambda *_: self._on_blocked(link, False))
        self._connection, self._channel, self._tag, self._blocked = connection, channel, 0, False
        log.info("connected to the broker")
        return channel

    def _on_confirm(self, link: object, frame: Any) -> None:
        """Confirms come out of order, and one may stand for all up to its tag."""
        if link is not self._link:
            return
        tag = frame.method.delivery_tag
        tags = [t for t in self._in_flight if t <= tag] if frame.method.multiple else [tag]
        for settled in tags:
            event_id = self._in_flight.pop(settled, None)
            if event_id is None or event_id in self._returned:
                continue
            if isinstance(frame.method, pika.spec.Basic.Ack):
                self._confirmed.append(event_id)
            else:
                self._trouble = "the broker refused to store messages (nack)"
        if not self._in_flight:
            self._settled.set()

    def _on_return(self, link: object, _channel: Channel, method: Any, properties: Any, _body: bytes) -> None:
        if link is self._link:
            self._returned[properties.message_id] = f"{method.reply_code} {method.reply_text}"

    def _on_loss(self, link: object, reason: str) -> None:
        """The channel or the connection is gone: nothing in flight will be confirmed any more."""
        if link is not self._link:
            return
        self._channel = None
        self._trouble = reason
        self._settled.set()

    def _on_blocked(self, link: object, blocked: bool) -> None:
        if link is not self._link:
            return
        self._blocked = blocked
        log.warning("the broker blocks publishers" if blocked else "the broker takes messages again")


def _fault(event: OutboxEvent) -> str | None:
    """Why an event cannot be published at all; None when it can."""
    if event.event_type not in ROUTING_KEYS:
        return f"no routing key is known for the event type {event.event_type}"
    # A character takes at least one byte, so this check needs no encoding in the usual case.
    if len(event.payload) * 4 > PAYLOAD_BYTES_MAX and len(event.payload.encode()) > PAYLOAD_BYTES_MAX:
        return f"the payload is longer than {PAYLOAD_BYTES_MAX} bytes"
    return None
