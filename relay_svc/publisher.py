"""Publishing with confirms, windows of messages in flight on one channel. The only file that talks to the broker."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import pika
import structlog
from pika.channel import Channel
from pika.exceptions import AMQPError, ChannelClosedByBroker, ConnectionClosedByBroker

from chassis import amqp
from chassis.cells import DEFAULT
from relay_svc import encoding, topology
from relay_svc.outbox import OutboxEvent

PAYLOAD_BYTES_MAX = 1 << 20  # what the consumer takes; seven times the biggest purchase, of 2,000 items

# With these codes the broker refuses what was sent, not us: one message of the window made it close the channel.
# 311 too large, 406 precondition failed; 501, 502, 505: it cannot read the frame, and closes the connection.
MESSAGE_REFUSED = (311, 406, 501, 502, 505)

LOOK_TIMEOUT_S = 2.0

T = TypeVar("T")

log = structlog.get_logger()


class Outcome(NamedTuple):
    """What became of a window. What is neither confirmed nor faulty stays as it was: the outage's fault."""

    confirmed: list[str]  # event ids that the broker routed and stored
    faulty: dict[str, str]  # event id → why this event could not be published, while others could
    outage: str | None  # why the broker did not take the rest
    refused: Mapping[str, str] = {}  # event id → why the broker closed the channel over it; it took no other, either


class _Window:
    """Messages on their way."""

    def __init__(self) -> None:
        self.waiting = 0  # messages that the broker has not spoken on
        self.confirmed: list[str] = []
        self.returned: dict[str, str] = {}  # event id → why it could not be routed
        self.trouble: str | None = None
        self.refused = False  # one of the messages made the broker close the channel
        self.nacked = False  # the broker could not store one
        self.settled = asyncio.Event()

    def fail(self, trouble: str, *, refused: bool = False) -> None:
        self.trouble, self.refused = trouble, refused
        self.settled.set()


class Publisher:
    """A connection that comes back by itself. Several windows may be in flight at once."""

    def __init__(self, url: str, confirm_timeout_s: float, cell: str = DEFAULT) -> None:
        self._url, self._confirm_timeout_s, self._cell = url, confirm_timeout_s, cell
        self._connection: amqp.Connection | None = None
        self._channel: Channel | None = None
        self._link: object | None = None  # stands for the present connection, in what its callbacks carry
        self._tag = 0  # the last delivery tag; the broker counts messages per channel from 1
        self._oldest = 1  # no message before this tag is in flight
        self._in_flight: dict[int, tuple[_Window, str]] = {}  # delivery tag → window and event id
        self._windows: set[_Window] = set()
        self._sending = asyncio.Lock()  # one connects and sends at a time
        self._blocked: str | None = None  # why the broker lets nobody publish

    async def connect(self) -> str | None:
        """Connect, unless we are, and bind the consumer's queue; returns why the broker takes no messages."""
        try:
            await self._ask(topology.bind)
        except (amqp.BrokerUnavailable, AMQPError) as error:
            return amqp.describe(error)
        return self._blocked

    async def queue(self) -> topology.Queue | None:
        """The consumer's queue as it is now; None while nobody can tell."""
        try:
            return await self._ask(topology.look)
        except (amqp.BrokerUnavailable, AMQPError):
            return None

    async def ready(self) -> int | None:
        """Messages in the consumer's queue that no consumer has in hand; None while nobody can tell. It is asked on a
        channel of its own, so that nothing that becomes of the question meets what is on its way."""
        connection = self._connection
        if connection is None or not connection.is_open or self._blocked:
            return None
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                channel = await amqp.open_channel(connection, lambda _: None)
                try:
                    return (await topology.look(channel)).ready
                finally:
                    if channel.is_open:  # also when the time is over: channels of a connection are limited
                        channel.close()
        except (amqp.BrokerUnavailable, AMQPError, TimeoutError):
            return None

    async def publish(self, events: Sequence[OutboxEvent]) -> Outcome:
        """Publish a window and wait until the broker has spoken on every message, or the deadline passes.

        "Confirmed" means that the consumer's queue has it. The queue is bound in front of each window, on the same
        channel: without the queue the broker closes that, and confirms nothing. RabbitMQ also acks what no queue takes,
        hence `mandatory`: such a message comes back first, without its delivery tag, and is told by its id.

        A message that the broker refuses takes the channel with it, and all that is in flight. Then the messages go
        one by one, which tells the one from its neighbours; and so do those that had a fault before. A refusal is an
        event's own fault only if the broker takes another one in the same call.
        """
        faulty: dict[str, str] = {}
        window: list[OutboxEvent] = []
        suspects: list[OutboxEvent] = []
        for event in events:
            if fault := _fault(event):
                faulty[event.event_id] = fault
            else:
                (suspects if event.attempts else window).append(event)
        outcome = Outcome([], faulty, None)
        if window:
            sent = await self._window(window)
            outcome = Outcome(sent.confirmed, faulty, sent.trouble)
            if sent.refused:
                log.warning("the broker refused a message; looking for it", reason=sent.trouble, events=len(window))
                known = set(sent.confirmed)
                suspects += [e for e in window if e.event_id not in known]
            elif sent.trouble:
                return outcome
        return await self._one_by_one(suspects, outcome) if suspects else outcome

    async def _ask(self, question: Callable[[Channel], Awaitable[T]]) -> T | None:
        """Ask the broker something, on a new connection if need be. None while messages are on their way, whose failure
        would be taken for the answer, and while the broker blocks publishers: then it answers nothing."""
        async with self._sending:
            channel = await self._open_channel()
            if self._windows or self._blocked:
                return None
            try:
                async with asyncio.timeout(self._confirm_timeout_s):
                    return await question(channel)
            except TimeoutError:
                self.disconnect(self._silence())
                raise amqp.BrokerUnavailable(self._silence()) from None
            except BaseException as error:
                # Unanswered, it would hold back what the channel is to send next.
                self.disconnect(amqp.describe(error))
                raise

    def disconnect(self, reason: str = "the relay closed the connection") -> None:
        """Close the connection; the next window opens a new one. What is in flight is given up."""
        self._link = None
        if self._connection is not None:
            amqp.close(self._connection)
        self._connection = self._channel = None
        self._fail_all(reason)

    async def _one_by_one(self, events: Sequence[OutboxEvent], before: Outcome) -> Outcome:
        """Each event alone on the channel. What the time does not suffice for stays for the next window."""
        confirmed: list[str] = []
        refused: dict[str, str] = {}
        outage: str | None = None
        async with self._sending:  # nobody else sends meanwhile ...
            for window in list(self._windows):  # ... and what was sent is through
                await window.settled.wait()
            deadline = asyncio.get_running_loop().time() + self._confirm_timeout_s
            for event in events:
                window = await self._sent([event])
                await self._settle(window)
                confirmed += window.confirmed
                if window.refused:
                    refused[event.event_id] = str(window.trouble)
                elif window.trouble or asyncio.get_running_loop().time() > deadline:
                    outage = window.trouble
                    break
        taken = before.confirmed + confirmed
        if not taken:  # it may as well be the broker's doing, and no event is to suffer for that
            return Outcome([], before.faulty, outage, refused)
        return Outcome(taken, before.faulty | refused, outage)

    async def _window(self, events: Sequence[OutboxEvent]) -> _Window:
        async with self._sending:
            window = await self._sent(events)
        await self._settle(window)
        return window

    async def _settle(self, window: _Window) -> None:
        """Wait for the broker's word on all of a window."""
        link = self._link
        try:
            async with asyncio.timeout(self._confirm_timeout_s):
                await window.settled.wait()
        except TimeoutError:
            window.trouble = self._silence()
        finally:
            self._windows.discard(window)
            window.settled.set()  # whatever came of it: `_one_by_one` may wait for that
            if window.waiting and link is self._link:
                # Late confirms must not be taken for those of the next window.
                self.disconnect(window.trouble or "the relay is stopping")
            elif window.nacked and link is self._link:
                # In a cluster it may be this node alone that has lost the way to the queue's leader.
                self.disconnect(str(window.trouble))
        if window.returned and window.trouble is None:
            window.trouble = f"no queue takes the messages: {next(iter(window.returned.values()))}"

    def _silence(self) -> str:
        why = f"it blocks publishers ({self._blocked})" if self._blocked else "it does not answer"
        return f"the broker did not confirm within {self._confirm_timeout_s:g} s: {why}"

    async def _sent(self, events: Sequence[OutboxEvent]) -> _Window:
        """A window that is on its way; or one that has failed already."""
        window = _Window()
        try:
            channel = await self._open_channel()
        except (amqp.BrokerUnavailable, AMQPError) as error:
            window.fail(amqp.describe(error))
            return window
        if self._blocked:
            window.fail(f"the broker blocks publishers: {self._blocked}")
            return window
        self._windows.add(window)
        for event in events:
            self._tag += 1
            self._in_flight[self._tag] = (window, event.event_id)
        window.waiting = len(events)
        try:
            topology.bind_before(channel)
            _send(channel, events, self._cell)
        except AMQPError as error:
            window.fail(amqp.describe(error))
        return window

    async def _open_channel(self) -> Channel:
        """The channel in confirm mode, on a new connection if need be, with all there that events need."""
        if self._connection is not None and self._channel is not None and self._channel.is_open:
            return self._channel
        self.disconnect()
        connection = await amqp.connect(self._url, "relay", on_close=lambda _: None)
        # What an earlier connection still has to say, after its windows were given up, must not be taken for the
        # present one's: its tags would stand for other events.
        link = self._link = object()
        try:
            await topology.make_sure(connection)
            channel = await amqp.open_channel(connection, on_close=lambda _: None)
            channel.add_on_close_callback(lambda _, error: self._on_loss(link, error))
            on_confirm = partial(self._on_confirm, link)
            await amqp.call(channel, channel.confirm_delivery, ack_nack_callback=on_confirm)
        except BaseException:
            amqp.close(connection)
            raise
        channel.add_on_return_callback(partial(self._on_return, link))
        connection.add_on_connection_blocked_callback(lambda _, frame: self._on_blocked(link, frame.method.reason))
        connection.add_on_connection_unblocked_callback(lambda *_: self._on_blocked(link, None))
        self._connection, self._channel, self._blocked = connection, channel, None
        self._tag, self._oldest = 0, 1
        log.info("connected to the broker")
        return channel

    def _on_confirm(self, link: object, frame: Any) -> None:
        """Confirms come out of order, and one may stand for all up to its tag."""
        if link is not self._link:
            return
        tag = frame.method.delivery_tag
        stored = isinstance(frame.method, pika.spec.Basic.Ack)
        if frame.method.multiple:
            tags = range(self._oldest, tag + 1)
            self._oldest = tag + 1
        else:
            tags = range(tag, tag + 1)
        for settled in tags:
            entry = self._in_flight.pop(settled, None)
            if entry is None:
                continue
            window, event_id = entry
            window.waiting -= 1
            if not stored:
                window.nacked, window.trouble = True, "the broker refused to store messages (nack)"
            elif event_id not in window.returned:
                window.confirmed.append(event_id)
            if not window.waiting:
                window.settled.set()

    def _on_return(self, link: object, _channel: Channel, method: Any, properties: Any, _body: bytes) -> None:
        if link is not self._link:
            return
        for window in self._windows:  # one or two; an event is in one of them
            window.returned[properties.message_id] = f"{method.reply_code} {method.reply_text}"

    def _on_loss(self, link: object, error: BaseException) -> None:
        """The channel or the connection is gone: nothing in flight will be confirmed any more."""
        if link is not self._link:
            return
        self._channel = None
        by_broker = isinstance(error, ChannelClosedByBroker | ConnectionClosedByBroker)
        self._fail_all(amqp.describe(error), refused=by_broker and error.reply_code in MESSAGE_REFUSED)  # type: ignore[attr-defined]

    def _fail_all(self, trouble: str, *, refused: bool = False) -> None:
        self._in_flight.clear()
        for window in self._windows:
            if not window.settled.is_set():
                window.waiting = 0
                window.fail(trouble, refused=refused)

    def _on_blocked(self, link: object, reason: str | None) -> None:
        if link is not self._link:
            return
        self._blocked = reason
        if reason is None:
            log.info("the broker takes messages again")
        else:
            log.warning("the broker blocks publishers", reason=reason)


def _send(channel: Channel, events: Sequence[OutboxEvent], cell: str) -> None:
    """As `channel.basic_publish` would send each, in a tenth of its time.

    It goes around pika's public interface in one place; should another version lack that, it does without.
    """
    connection = channel.connection
    emit = getattr(connection, "_output_marshaled_frames", None)
    if emit is not None:
        emit(encoding.encode(channel.channel_number, connection.params.frame_max, events, cell))
        return
    for event in events:
        key = encoding.ROUTING_KEYS[event.event_type]
        body, properties = event.payload.encode(), encoding.properties(event, cell)
        channel.basic_publish(topology.EXCHANGE, key, body, properties, mandatory=True)


def _fault(event: OutboxEvent) -> str | None:
    """Why an event cannot be published at all; None when it can."""
    if event.event_type not in encoding.ROUTING_KEYS:
        return f"no routing key is known for the event type {event.event_type}"
    # A character takes at least one byte, so this check needs no encoding in the usual case.
    if len(event.payload) * 4 > PAYLOAD_BYTES_MAX and len(event.payload.encode()) > PAYLOAD_BYTES_MAX:
        return f"the payload is longer than {PAYLOAD_BYTES_MAX:,} bytes"
    return None
