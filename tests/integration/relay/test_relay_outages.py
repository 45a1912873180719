"""The relay while its broker, or the way to it, is in trouble: nothing is lost, falsely marked, or given up for it."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pika
import psycopg
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from structlog.testing import capture_logs

from chassis.postgres import Pool
from deploy.local.rabbitmq import RabbitMQ
from relay_svc import outbox as outbox_module
from relay_svc.outbox import OutboxEvent
from relay_svc.publisher import Outcome, Publisher
from relay_svc.relay import Relay
from tests.conftest import WAIT_S, eventually, pool
from tests.faults.proxy import Loop, Proxy
from tests.integration.outbox_events import all_sent, make_days, states, write

QUEUE = "purchases.created"
CONFIRM_TIMEOUT_S = 1.0
LARGEST = 100_000  # bytes of a message, for the broker that has a limit


@pytest.fixture
async def outbox(purchases_db: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pool]:
    """With pauses between attempts so short that an outage would soon have used them all up."""
    monkeypatch.setattr(outbox_module, "BACKOFF_FIRST_S", 0.01)
    make_days(purchases_db)
    async with pool(purchases_db, "purchases_relay", size=4) as opened:
        yield opened


@pytest.fixture
def queue(amqp_url: str) -> Iterator[BlockingChannel]:
    with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
        channel = connection.channel()
        make_queue(channel)
        yield channel


def make_queue(channel: BlockingChannel) -> None:
    channel.exchange_declare("purchases", "topic", durable=True)
    channel.queue_declare(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
    channel.queue_bind(QUEUE, "purchases", "purchases.created")


def drain(channel: BlockingChannel) -> Counter[str]:
    """How often each event is in the queue."""
    ids: Counter[str] = Counter()
    while (message := channel.basic_get(QUEUE, auto_ack=True))[0] is not None:
        ids[message[1].message_id] += 1
    return ids


@asynccontextmanager
async def relaying(outbox: Pool, url: str) -> AsyncIterator[Relay]:
    publisher = Publisher(url, CONFIRM_TIMEOUT_S)
    relay = Relay(outbox, publisher, window=50, attempts_max=2, look_every_s=0.025)
    stop = asyncio.Event()
    task = asyncio.ensure_future(relay.run(stop))
    try:
        yield relay
    finally:
        stop.set()
        await asyncio.wait_for(task, WAIT_S)
        publisher.disconnect()


async def breaker(relay: Relay) -> str | None:
    return relay.breaker_reason


async def closed(relay: Relay) -> bool:
    return relay.breaker_reason is None


def sent(url: str) -> set[str]:
    return {event_id for event_id, (status, _) in states(url).items() if status == "SENT"}


async def test_broker_down_for_long(outbox: Pool, purchases_db: str, tmp_path: Path) -> None:
    """Down for far longer than all attempts of an event would take: none is counted, and all is caught up."""
    broker = RabbitMQ(tmp_path / "rabbitmq")
    broker.start()
    try:
        with pika.BlockingConnection(pika.URLParameters(broker.url)) as connection:
            make_queue(connection.channel())
        async with relaying(outbox, broker.url) as relay:
            ids = write(purchases_db, 200)
            await eventually(lambda: all_sent(purchases_db), "all is sent")
            await asyncio.to_thread(broker.stop)
            ids += write(purchases_db, 300)
            await eventually(lambda: breaker(relay), "the breaker opens")
            assert {state for state in states(purchases_db).values() if state[0] != "SENT"} == {("NEW", 0)}
            await asyncio.to_thread(broker.start)
            await eventually(lambda: all_sent(purchases_db), "it catches up by itself")
            assert await eventually(lambda: closed(relay), "the breaker closes")
        with pika.BlockingConnection(pika.URLParameters(broker.url)) as connection:
            assert set(drain(connection.channel())) == set(ids)
    finally:
        broker.stop()
    assert set(states(purchases_db).values()) == {("SENT", 0)}


@pytest.fixture(scope="module")
def particular_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a node that closes the channel over a message beyond LARGEST; it has our queue.

    A node of its own, as RabbitMQ 4 reads that limit at its start only.
    """
    node = RabbitMQ(tmp_path_factory.mktemp("particular"), settings={"max_message_size": str(LARGEST)})
    try:
        node.start()
        with pika.BlockingConnection(pika.URLParameters(node.url)) as connection:
            make_queue(connection.channel())
        yield node.url
    finally:
        node.stop()


def pad(purchases_db: str, event_ids: list[str], size: int) -> None:
    """Give these events `size` bytes more, or with 0 what they had before."""
    with psycopg.connect(purchases_db) as connection:
        connection.execute(
            "UPDATE outbox_events SET payload_json = payload_json - 'long'"
            " || CASE WHEN %(size)s > 0 THEN jsonb_build_object('long', repeat('x', %(size)s)) ELSE '{}' END"
            " WHERE event_id = ANY (%(ids)s::uuid[])",
            {"size": size, "ids": event_ids},
        )


async def test_one_bad_event_among_good_ones(outbox: Pool, purchases_db: str, particular_broker: str) -> None:
    """The broker closes the channel over one message. It alone is given up, and goes through when mended."""
    ids = write(purchases_db, 120)
    bad = ids[60]
    pad(purchases_db, [bad], 2 * LARGEST)
    async with relaying(outbox, particular_broker) as relay:
        expected = {event_id: ("FAILED", 2) if event_id == bad else ("SENT", 0) for event_id in ids}

        async def settled() -> bool:
            return states(purchases_db) == expected

        await eventually(settled, "the bad event is given up, and the others are sent")
        assert relay.breaker_reason is None
    with pika.BlockingConnection(pika.URLParameters(particular_broker)) as connection:
        queue = connection.channel()
        assert set(drain(queue)) == {*ids} - {bad}
        pad(purchases_db, [bad], 0)
        with psycopg.connect(purchases_db) as database:
            row = database.execute("SELECT last_error FROM outbox_events WHERE status = 'FAILED'").fetchone()
            assert row
            assert "PRECONDITION_FAILED" in row[0]
            database.execute("UPDATE outbox_events SET status = 'NEW', attempts = 0, next_attempt_at = now()"
                             " WHERE status = 'FAILED'")  # fmt: skip
        async with relaying(outbox, particular_broker):
            await eventually(lambda: all_sent(purchases_db), "mended and requeued, it goes through")
        assert drain(queue) == {bad: 1}


@pytest.mark.parametrize("events", [1, 20])
async def test_broker_that_refuses_everything(
    outbox: Pool, purchases_db: str, particular_broker: str, events: int
) -> None:
    """Then it is the broker's fault, and no event's; also when there is just one to try it with."""
    pad(purchases_db, write(purchases_db, events), 2 * LARGEST)
    async with relaying(outbox, particular_broker) as relay:
        reason = await eventually(lambda: breaker(relay), "the breaker opens")
        assert "refuses every message" in reason
    assert set(states(purchases_db).values()) == {("NEW", 0)}


async def test_window_from_before_an_outage_is_confirmed_late(
    outbox: Pool, purchases_db: str, amqp_url: str, queue: BlockingChannel
) -> None:
    """One lane's confirms come after the other lane met the outage: they close no breaker. Only a single event does
    that, sent while it is open."""
    write(purchases_db, 200)
    sizes: list[int] = []

    class Overtaken(Publisher):
        async def publish(self, events: Sequence[OutboxEvent]) -> Outcome:
            sizes.append(len(events))
            if len(sizes) == 2:
                return Outcome([], {}, "the broker is gone")
            late = len(sizes) == 1
            outcome = await super().publish(events)
            if late:
                await eventually(lambda: breaker(relay), "the breaker opens")
            return outcome

    publisher = Overtaken(amqp_url, CONFIRM_TIMEOUT_S)
    relay = Relay(outbox, publisher, window=50, attempts_max=2, look_every_s=0.025)
    stop = asyncio.Event()
    task = asyncio.ensure_future(relay.run(stop))
    await eventually(lambda: all_sent(purchases_db), "everything is sent")
    stop.set()
    await asyncio.wait_for(task, WAIT_S)
    publisher.disconnect()
    assert sizes[:3] == [50, 50, 1]
    assert relay.breaker_reason is None


async def test_broker_that_blocks_publishers(
    outbox: Pool, purchases_db: str, amqp_url: str, queue: BlockingChannel, broker: RabbitMQ
) -> None:
    """Out of memory, the broker takes nothing: the reason is known, nothing is marked, and it goes on by itself."""
    async with relaying(outbox, amqp_url) as relay:

        async def blocked() -> bool:
            return "blocks publishers" in (await breaker(relay) or "")

        ids = write(purchases_db, 10)
        await eventually(lambda: all_sent(purchases_db), "all is sent")
        broker.ctl("set_vm_memory_high_watermark", "0.00001")
        try:
            ids += write(purchases_db, 100)
            await eventually(blocked, "the breaker opens, for that reason")  # on a busy machine, first for its silence
            assert len(sent(purchases_db)) == 10
        finally:
            broker.ctl("set_vm_memory_high_watermark", "absolute", "2GiB")
        await eventually(lambda: all_sent(purchases_db), "it goes on by itself")
    assert set(drain(queue)) == set(ids)
    assert set(states(purchases_db).values()) == {("SENT", 0)}


@pytest.fixture
def proxy(amqp_url: str) -> Iterator[Proxy]:
    loop = Loop()
    url = urlsplit(amqp_url)
    between = Proxy(loop, "broker", (str(url.hostname), int(url.port or 5672)))
    yield between
    between.close()
    loop.close()


def through(proxy: Proxy, url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=f"{parts.username}:{parts.password}@{proxy.address}").geturl()


async def test_network_that_goes_deaf(
    outbox: Pool, purchases_db: str, amqp_url: str, queue: BlockingChannel, proxy: Proxy
) -> None:
    """The deadline of the window ends it, and nothing is marked that was not confirmed."""
    async with relaying(outbox, through(proxy, amqp_url)) as relay:
        ids = write(purchases_db, 60)
        await eventually(lambda: all_sent(purchases_db), "all is sent")
        proxy.deafen()
        ids += write(purchases_db, 500)
        reason = await eventually(lambda: breaker(relay), "the breaker opens")
        assert "did not confirm within 1 s" in reason
        assert sent(purchases_db) <= set(drain(queue))
        assert len(sent(purchases_db)) == 60
        proxy.heal()
        proxy.cut()
        await eventually(lambda: all_sent(purchases_db), "it goes on by itself")
    assert set(states(purchases_db).values()) == {("SENT", 0)}


async def test_connections_cut_in_mid_window(
    outbox: Pool, purchases_db: str, amqp_url: str, queue: BlockingChannel, proxy: Proxy
) -> None:
    """Ten times, some of them in the middle of a frame: what is marked is in the queue, in the end everything."""
    in_queue: Counter[str] = Counter()
    ids: list[str] = []
    async with relaying(outbox, through(proxy, amqp_url)):
        for number in range(10):
            ids += write(purchases_db, 300)
            if number % 2:
                await asyncio.to_thread(proxy.break_frame, 7 + number * 1_000, 5)
            else:
                proxy.cut()
            marked = sent(purchases_db)
            in_queue += drain(queue)
            assert marked <= set(in_queue)
        await eventually(lambda: all_sent(purchases_db), "everything is sent")
    in_queue += drain(queue)
    assert set(in_queue) == set(ids)


async def test_database_that_takes_no_writes(
    outbox: Pool, purchases_db: str, amqp_url: str, queue: BlockingChannel
) -> None:
    """After a failover the relay may meet a server that only reads, for a while: it stays, and goes on by itself."""
    name = urlsplit(purchases_db).path[1:]
    end_connections = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    async with relaying(outbox, amqp_url):
        ids = write(purchases_db, 10)
        await eventually(lambda: all_sent(purchases_db), "all is sent")
        with psycopg.connect(purchases_db, autocommit=True) as admin, capture_logs() as logs:
            ids += write(purchases_db, 10)
            admin.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'.encode())
            admin.execute(end_connections)

            async def noticed() -> bool:
                return sum("read-only transaction" in str(entry.get("error")) for entry in logs) > 1

            await eventually(noticed, "the relay tries, again and again")
            admin.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only'.encode())
            admin.execute(end_connections)
        ids += write(purchases_db, 10)
        await eventually(lambda: all_sent(purchases_db), "it goes on by itself")
    assert set(drain(queue)) == set(ids)
    assert set(states(purchases_db).values()) == {("SENT", 0)}
