"""What is SENT is in the consumer's queue, whoever else listens and whatever became of queue and binding."""

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from urllib.parse import unquote, urlsplit

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from structlog.testing import capture_logs

from chassis.postgres import Pool
from deploy.local.rabbitmq import RabbitMQ
from relay_svc import lost
from relay_svc.publisher import Publisher
from relay_svc.relay import Relay
from relay_svc.topology import EXCHANGE, QUEUE, QUEUE_ARGUMENTS, ROUTING_KEY
from tests.conftest import WAIT_S, eventually, pool
from tests.integration.outbox_events import all_sent, make_days, states, write

TAP = "somebody.else"


@pytest.fixture
async def outbox(purchases_db: str) -> AsyncIterator[Pool]:
    make_days(purchases_db)
    async with pool(purchases_db, "purchases_relay", size=5) as opened:
        yield opened


@pytest.fixture
def tapped(amqp_url: str) -> Iterator[BlockingChannel]:
    """A broker on which another team hears of everything, and nobody has made our queue yet."""
    with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
        channel = connection.channel()
        channel.exchange_declare(EXCHANGE, "topic", durable=True)
        channel.queue_declare(TAP, auto_delete=True)
        channel.queue_bind(TAP, EXCHANGE, "#")
        yield channel
        channel.queue_delete(TAP)


@asynccontextmanager
async def relaying(outbox: Pool, url: str) -> AsyncIterator[tuple[Relay, Publisher]]:
    publisher = Publisher(url, 5.0)
    relay = Relay(outbox, publisher, window=50, attempts_max=2, look_every_s=0.025)
    stop = asyncio.Event()
    task = asyncio.ensure_future(relay.run(stop))
    try:
        yield relay, publisher
    finally:
        stop.set()
        await asyncio.wait_for(task, WAIT_S)
        publisher.disconnect()


def drain(channel: BlockingChannel, queue: str = QUEUE) -> Counter[str]:
    """How often each event is in a queue."""
    ids: Counter[str] = Counter()
    while (message := channel.basic_get(queue, auto_ack=True))[0] is not None:
        ids[message[1].message_id] += 1
    return ids


async def breaker(relay: Relay) -> str | None:
    return relay.breaker_reason


async def test_queue_that_nobody_made(outbox: Pool, purchases_db: str, amqp_url: str, tapped: BlockingChannel) -> None:
    """The relay was there before any consumer: the events wait in the consumer's queue, made as the consumer would."""
    ids = write(purchases_db, 120)
    async with relaying(outbox, amqp_url):
        await eventually(lambda: all_sent(purchases_db), "everything is sent")
    tapped.queue_declare(QUEUE, durable=True, arguments=QUEUE_ARGUMENTS)  # refused if it were another one
    assert drain(tapped) == Counter(ids)
    assert drain(tapped, TAP) == Counter(ids)
    assert set(states(purchases_db).values()) == {("SENT", 0)}


@pytest.mark.parametrize("lost_thing", ["binding", "queue", "exchange"])
async def test_lost_while_others_listen(
    outbox: Pool, purchases_db: str, amqp_url: str, tapped: BlockingChannel, lost_thing: str
) -> None:
    """Again and again between two windows: the next one finds it there, or is not called sent."""
    async with relaying(outbox, amqp_url):
        for _ in range(5):
            ids = write(purchases_db, 60)
            await eventually(lambda: all_sent(purchases_db), "everything is sent")
            assert set(drain(tapped)) == set(ids)
            match lost_thing:
                case "binding":
                    tapped.queue_unbind(QUEUE, EXCHANGE, ROUTING_KEY)
                case "queue":
                    tapped.queue_delete(QUEUE)
                case "exchange":
                    tapped.exchange_delete(EXCHANGE)
    assert set(states(purchases_db).values()) == {("SENT", 0)}


async def test_how_much_waits_is_told(amqp_url: str, tapped: BlockingChannel) -> None:
    """Whatever becomes of the question, the channel that publishes stays."""
    publisher = Publisher(amqp_url, 5.0)
    assert await publisher.ready() is None  # it is not connected, and does not connect for this
    try:
        assert await publisher.connect() is None
        assert await publisher.ready() == 0
        for _ in range(3):
            tapped.basic_publish("", QUEUE, b"")

        async def three() -> bool:
            return await publisher.ready() == 3

        await eventually(three, "what waits is told")
        publishing = publisher._channel
        tapped.queue_delete(QUEUE)
        assert await publisher.ready() is None
        assert publisher._channel is publishing and publishing is not None and publishing.is_open
    finally:
        publisher.disconnect()
    assert await publisher.ready() is None


async def test_lost_while_the_relay_is_idle(
    outbox: Pool, purchases_db: str, amqp_url: str, tapped: BlockingChannel
) -> None:
    """It is made again before the next event comes: who else publishes there reaches the consumer, too."""

    async def arrives() -> bool:
        tapped.basic_publish(EXCHANGE, ROUTING_KEY, b"", pika.BasicProperties(message_id="a stranger's"))
        with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:  # without the queue, it is closed
            try:
                return "a stranger's" in drain(connection.channel())
            except pika.exceptions.ChannelClosedByBroker:
                return False

    async with relaying(outbox, amqp_url):
        await eventually(arrives, "the queue is there")
        tapped.queue_unbind(QUEUE, EXCHANGE, ROUTING_KEY)
        await eventually(arrives, "the queue is bound again")
        tapped.queue_delete(QUEUE)
        await eventually(arrives, "the queue is there again")


async def test_alternate_exchange_takes_nothing_for_ours(
    outbox: Pool, purchases_db: str, amqp_url: str, tapped: BlockingChannel, broker: RabbitMQ
) -> None:
    """A policy sends what no queue takes elsewhere, which the broker calls routed."""
    host = unquote(urlsplit(amqp_url).path[1:])
    broker.ctl(
        "set_policy", "-p", host, "--apply-to", "exchanges", "others", f"^{EXCHANGE}$",
        '{"alternate-exchange": "amq.fanout"}',
    )  # fmt: skip
    try:
        tapped.queue_unbind(TAP, EXCHANGE, "#")
        tapped.queue_bind(TAP, "amq.fanout")
        async with relaying(outbox, amqp_url):
            for _ in range(3):
                ids = write(purchases_db, 60)
                await eventually(lambda: all_sent(purchases_db), "everything is sent")
                assert set(drain(tapped)) == set(ids)
                tapped.queue_unbind(QUEUE, EXCHANGE, ROUTING_KEY)
    finally:
        broker.ctl("clear_policy", "-p", host, "others")


async def test_what_is_missing_is_said(
    outbox: Pool, purchases_db: str, amqp_url: str, tapped: BlockingChannel, broker: RabbitMQ
) -> None:
    """Without the right to make the queue nothing is sent; the reason names it, and with the queue all goes on."""
    host = unquote(urlsplit(amqp_url).path[1:])
    broker.ctl("add_user", "relay-test", "secret")
    try:
        broker.ctl("set_permissions", "-p", host, "relay-test", f"^{EXCHANGE}$", ".*", ".*")
        url = urlsplit(amqp_url)
        limited = url._replace(netloc=f"relay-test:secret@{url.hostname}:{url.port}").geturl()
        ids = write(purchases_db, 10)
        async with relaying(outbox, limited) as (relay, _):
            reason = await eventually(lambda: breaker(relay), "the breaker opens")
            assert reason.startswith(f"no queue {QUEUE}: ")
            assert "ACCESS_REFUSED" in reason
            assert set(states(purchases_db).values()) == {("NEW", 0)}
            tapped.queue_declare(QUEUE, durable=True, arguments=QUEUE_ARGUMENTS)
            await eventually(lambda: all_sent(purchases_db), "everything is sent")
        assert drain(tapped) == Counter(ids)
    finally:
        broker.ctl("delete_user", "relay-test")


async def test_broker_that_stores_no_more(
    outbox: Pool, purchases_db: str, amqp_url: str, tapped: BlockingChannel, broker: RabbitMQ
) -> None:
    """It says so for each message (nack). Nothing of that is sent, and the next try goes over another connection: in a
    cluster it may be one node that has lost the way to the queue's leader."""
    host = unquote(urlsplit(amqp_url).path[1:])
    full = '{"max-length": 3, "overflow": "reject-publish"}'
    broker.ctl("set_policy", "-p", host, "--apply-to", "queues", "full", f"^{QUEUE}$", full)
    async with relaying(outbox, amqp_url) as (relay, _):
        with capture_logs() as logs:

            async def connected_again() -> bool:
                return [entry["event"] for entry in logs].count("connected to the broker") > 1

            try:
                ids = write(purchases_db, 200)
                assert "nack" in await eventually(lambda: breaker(relay), "the breaker opens")
                await eventually(connected_again, "the relay tries another connection")
                assert sum(status == "SENT" for status, _ in states(purchases_db).values()) < len(ids)
            finally:
                broker.ctl("clear_policy", "-p", host, "full")
        await eventually(lambda: all_sent(purchases_db), "everything is sent")
    assert set(drain(tapped)) == set(ids)
    assert set(states(purchases_db).values()) == {("SENT", 0)}


async def test_what_the_queue_lost_is_published_again(
    outbox: Pool, purchases_db: str, amqp_url: str, tapped: BlockingChannel
) -> None:
    """The queue is purged with sent events in it. The reader waits for them, and the consumer's queue is empty: they
    come once more. What may still be in the queue does not, nor what nobody waits for."""
    async with relaying(outbox, amqp_url) as (_, publisher):

        async def look(awaited: list[str], after_s: float = 0.0) -> int:
            async with outbox.connection() as connection, connection.transaction():
                return await lost.requeue(connection, publisher, awaited, after_s)

        ids = await send(purchases_db, 30)
        awaited = [*ids[:20], str(uuid.uuid4())]  # one that is not there: it was in a future that was lost
        assert await look(awaited) == 0  # they are in the queue
        tapped.queue_purge(QUEUE)
        assert await look(awaited) == 0  # the reader may just be slow: nobody consumes
        later = await send(purchases_db, 5)
        counted: Counter[str] = Counter()
        tapped.basic_consume(QUEUE, lambda *message: counted.update([message[2].message_id]), auto_ack=True)

        async def all_arrived() -> bool:
            tapped.connection.process_data_events()
            return set(counted) >= {*ids[:20], *later}

        await eventually(lambda: consumed(tapped, counted, later), "the later ones are counted")
        assert await look(awaited, 3_600) == 0  # it was but now
        assert await look(awaited) == 20
        await eventually(all_arrived, "they come out of the queue")
        assert counted == Counter(ids[:20]) + Counter(later)
    assert set(states(purchases_db).values()) == {("SENT", 0)}


async def consumed(channel: BlockingChannel, counted: Counter[str], ids: list[str]) -> bool:
    channel.connection.process_data_events()
    return set(counted) == set(ids)


async def send(url: str, count: int) -> list[str]:
    ids = write(url, count)
    await eventually(lambda: all_sent(url), "everything is sent")
    return ids
