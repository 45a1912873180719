"""From the queue to the read models: deliveries gather, a batch is applied and committed, then acknowledged.

The publisher owns the exchange; the queue and its binding are made here. The only file that knows the broker.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import pika.spec
import psycopg
import structlog
from pika import BasicProperties
from pika.channel import Channel
from pika.exceptions import AMQPError
from prometheus_client import Counter, Histogram

from analytics_svc import events
from analytics_svc.apply import Applied, apply
from analytics_svc.errors import Rejected, quoted
from analytics_svc.events import PurchaseCreated
from analytics_svc.quarantine import QuarantinedEvent
from chassis import amqp, postgres
from chassis.amqp import BrokerUnavailable
from chassis.lifecycle import Backoff, wait_set
from chassis.postgres import Pool

EXCHANGE = "purchases"
QUEUE = ROUTING_KEY = "purchases.created"
# The broker drops a message that was delivered more often than the limit, by default 20 times from RabbitMQ 4 on.
# A million stands for never: -1, which says so to version 4, is 0 to version 3.
QUEUE_ARGUMENTS = {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000}

CONNECTION_WAIT_S = 1.0  # the pool is all ours: it lacks a connection only while the database is down
HEADER_LEVELS_MAX = 8  # of tables in tables; those of dead-lettering have three
CLOSE_TIMEOUT_S = 5.0  # for the broker to confirm the end of a connection, and with it the last acknowledgements

# What the database says about the events it was given, rather than about itself. A retry would change nothing.
BLAMED_ON_EVENTS = (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.RaiseException)
APPLY_FAILED = "APPLY_FAILED"

EVENTS = Counter("analytics_events_total", "Deliveries that were settled.", ["outcome"])
COUNTED, DUPLICATE, QUARANTINED = (EVENTS.labels(outcome) for outcome in ("counted", "duplicate", "quarantined"))
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
    """A message, and what it says."""

    tag: int  # the channel's number for it
    body: bytes
    properties: BasicProperties
    event: PurchaseCreated | QuarantinedEvent


class Inbox:
    """What one connection delivered, until it closes or we do."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self.reason = ""
        self._deliveries: list[Delivery] = []
        self._news = asyncio.Event()

    def put(self, delivery: Delivery) -> None:
        self._deliveries.append(delivery)
        self._news.set()

    def close(self, reason: str) -> None:
        """The first reason is the cause; what follows are its effects."""
        if not self.closed.is_set():
            self.reason = reason
            self.closed.set()
            self._news.set()

    async def take(self, most: int) -> list[Delivery]:
        """The oldest deliveries, as soon as there is one; none when it is closed."""
        while not self._deliveries and not self.closed.is_set():
            self._news.clear()
            await self._news.wait()
        if self.closed.is_set():
            return []
        batch, self._deliveries = self._deliveries[:most], self._deliveries[most:]
        return batch


class Consumer:
    """Consumes over as many connections as it takes. `set_serving` is told whether it does."""

    def __init__(
        self,
        url: str,
        pool: Pool,
        zone: ZoneInfo,
        *,
        batch_max: int,
        prefetch: int,
        set_serving: Callable[[bool], Awaitable[None]],
    ) -> None:
        self._url, self._pool, self._zone = url, pool, zone
        self._batch_max, self._prefetch = batch_max, prefetch
        self._set_serving = set_serving

    async def run(self, stop: asyncio.Event) -> None:
        """Consume until `stop`, then finish the batch in flight."""
        backoff = Backoff(0.2, 5.0)
        while not stop.is_set():
            try:
                await self._run_connection(stop, backoff)
            except (BrokerUnavailable, AMQPError) as error:
                await self._set_serving(False)
                pause_s = backoff.next_s()
                log.warning("no deliveries; trying again", error=amqp.describe(error), pause_s=round(pause_s, 1))
                await wait_set(stop, pause_s)

    async def _run_connection(self, stop: asyncio.Event, backoff: Backoff) -> None:
        """Consume over one connection until it is lost or `stop` is set.

        Its deliveries are acknowledged on its channel or not at all: on another one the same tags mean other messages.
        """
        inbox = Inbox()
        gone = asyncio.Event()

        def on_connection_close(reason: str) -> None:
            inbox.close(reason)
            gone.set()

        connection = await amqp.connect(self._url, "analytics consumer", on_connection_close)
        stopping = asyncio.create_task(stop.wait())
        stopping.add_done_callback(lambda _: inbox.close("stopping"))
        try:
            channel = await amqp.open_channel(connection, inbox.close)
            await self._subscribe(channel, inbox)
            backoff.reset()
            log.info("consuming", queue=QUEUE)
            await self._set_serving(not stop.is_set())
            while batch := await inbox.take(self._batch_max):
                if await self._settle(batch, inbox) and channel.is_open:
                    # All up to this one: batches are settled whole and in the order of delivery.
                    channel.basic_ack(batch[-1].tag, multiple=True)
        finally:
            stopping.cancel()
            amqp.close(connection)
            await wait_set(gone, CLOSE_TIMEOUT_S)
        if not stop.is_set():
            raise BrokerUnavailable(inbox.reason)

    async def _subscribe(self, channel: Channel, inbox: Inbox) -> None:
        def on_message(_channel: Channel, method: Any, properties: BasicProperties, body: bytes) -> None:
            inbox.put(Delivery(method.delivery_tag, body, properties, self._read(properties, body)))

        channel.add_on_cancel_callback(lambda _: inbox.close("the broker cancelled the subscription"))
        await amqp.call(channel, channel.queue_declare, queue=QUEUE, durable=True, arguments=QUEUE_ARGUMENTS)
        # Fails as long as the publisher has not made its exchange: a matter of its start.
        await amqp.call(channel, channel.queue_bind, queue=QUEUE, exchange=EXCHANGE, routing_key=ROUTING_KEY)
        await amqp.call(channel, channel.basic_qos, prefetch_count=self._prefetch)
        await amqp.call(channel, channel.basic_consume, queue=QUEUE, on_message_callback=on_message)

    def _read(self, properties: BasicProperties, body: bytes) -> PurchaseCreated | QuarantinedEvent:
        """Decoding on arrival uses the time in which the database applies the batch before."""
        try:
            return events.decode(
                body,
                self._zone,
                message_id=properties.message_id,
                message_type=properties.type,
                schema_version=(properties.headers or {}).get("schema_version"),
            )
        except Rejected as rejected:
            return _quarantined(body, properties, rejected.event_id, rejected.reason, rejected.detail)

    async def _settle(self, batch: Sequence[Delivery], inbox: Inbox) -> bool:
        """Apply the batch, however often the database has to be asked; False when the inbox closed before it was."""
        backoff, trouble = Backoff(0.05, 2.0), False
        with BATCH_SECONDS.time():
            while True:
                try:
                    await self._apply(batch)
                except postgres.CONFLICT as error:
                    log.info("batch conflicts with another; trying again", error=str(error).strip())
                except Exception as error:
                    # An outage, or a bug of ours; not the events' fault in any case: they stay unacknowledged.
                    known = isinstance(error, psycopg.Error)
                    log.warning("batch not applied; trying again", error=str(error).strip(), exc_info=not known)
                    trouble = True
                    await self._set_serving(False)
                else:
                    break
                if await wait_set(inbox.closed, backoff.next_s()):
                    return False
        BATCH_EVENTS.observe(len(batch))
        if trouble:
            log.info("batches are applied again")
            await self._set_serving(not inbox.closed.is_set())
        return True

    async def _apply(self, batch: Sequence[Delivery]) -> None:
        """Apply in one transaction. When the database refuses an event, halve, until it is alone in quarantine."""
        try:
            async with (
                self._pool.connection(timeout=CONNECTION_WAIT_S) as connection,
                connection.pipeline(),  # statements do not wait for each other's answers, where nobody reads them
                connection.transaction(),
            ):
                applied = await apply(
                    connection,
                    [delivery.event for delivery in batch if isinstance(delivery.event, PurchaseCreated)],
                    [delivery.event for delivery in batch if isinstance(delivery.event, QuarantinedEvent)],
                )
        except BLAMED_ON_EVENTS as error:
            if len(batch) > 1:
                middle = len(batch) // 2
                await self._apply(batch[:middle])
                await self._apply(batch[middle:])
                return
            ((_, body, properties, event),) = batch
            if isinstance(event, QuarantinedEvent):
                raise  # it is not even fit to be kept: a bug of ours
            detail = f"SQLSTATE {error.sqlstate}: {quoted(error.diag.message_primary)}"
            log.error("event refused by the database", event_id=event.event_id, error=detail)
            unfit = _quarantined(body, properties, event.event_id, APPLY_FAILED, detail)
            await self._apply([batch[0]._replace(event=unfit)])
            return
        _count(applied)


def _quarantined(
    body: bytes, properties: BasicProperties, event_id: str | None, reason: str, detail: str
) -> QuarantinedEvent:
    known = {name: value for name, value in vars(properties).items() if value is not None}
    return QuarantinedEvent(event_id, reason, detail, body, _plain(known, HEADER_LEVELS_MAX))


def _plain(value: Any, levels: int) -> Any:
    """AMQP's types as those of JSON, not nested without end, and without the NUL that the database refuses."""
    match value:
        case bool() | int() | None:
            return value
        case dict() if levels:
            return {str(_plain(name, 0)): _plain(inner, levels - 1) for name, inner in value.items()}
        case list() if levels:
            return [_plain(inner, levels - 1) for inner in value]
        case dict() | list():
            return "..."
        case str():
            return value.replace("\0", "\ufffd")
        case _:  # times, decimals, bytes
            return str(value)


def _count(applied: Applied) -> None:
    COUNTED.inc(applied.counted)
    DUPLICATE.inc(applied.duplicates)
    QUARANTINED.inc(applied.quarantined)
