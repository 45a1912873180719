"""The relay between a real outbox and a real broker."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pika
import psycopg
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from chassis.postgres import Pool
from relay_svc.__main__ import CONNECTIONS
from relay_svc.publisher import Publisher
from relay_svc.relay import Relay
from tests.conftest import eventually, pool
from tests.integration.outbox_events import all_sent, insert, make_days, new_ids, states, write
from tests.integration.purchase_events import query

QUEUE = "purchases.created"


@pytest.fixture
def channel(amqp_url: str) -> Iterator[BlockingChannel]:
    with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
        yield connection.channel()


@pytest.fixture
async def outbox(purchases_db: str) -> AsyncIterator[Pool]:
    make_days(purchases_db)
    async with pool(purchases_db, "purchases_relay", size=3 * CONNECTIONS) as opened:  # for three relays
        yield opened


def bind(channel: BlockingChannel) -> None:
    channel.exchange_declare("purchases", "topic", durable=True)
    channel.queue_declare(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
    channel.queue_bind(QUEUE, "purchases", "purchases.created")


def make_relay(outbox: Pool, url: str, window: int = 100) -> tuple[Relay, Publisher]:
    publisher = Publisher(url, confirm_timeout_s=10)
    return Relay(outbox, publisher, window=window, attempts_max=3, look_every_s=0.025), publisher


def drain(channel: BlockingChannel) -> list[Any]:
    """What is in the queue: (method, properties, body) of each message."""
    messages = []
    while (message := channel.basic_get(QUEUE, auto_ack=True))[0] is not None:
        messages.append(message)
    return messages


async def test_events_are_published_as_they_are(
    outbox: Pool, purchases_db: str, amqp_url: str, channel: BlockingChannel
) -> None:
    """Each event arrives once, unchanged and persistent, with what the contract says, and is marked."""
    bind(channel)
    ids = write(purchases_db, 250)
    relay, publisher = make_relay(outbox, amqp_url)
    assert [(await relay.run_once(100)).claimed for _ in range(4)] == [100, 100, 50, 0]
    publisher.disconnect()
    messages = drain(channel)
    assert [properties.message_id for _, properties, _ in messages] == sorted(ids)  # the oldest first
    _, properties, body = messages[0]
    assert body == b'{"amount": 8.90, "event_id": "%s"}' % min(ids).encode()
    assert (properties.type, properties.content_type, properties.delivery_mode) == (
        "PurchaseCreated",
        "application/json",
        2,
    )
    assert (properties.headers["schema_version"], properties.headers["traceparent"]) == (1, "00-trace-01")
    assert set(states(purchases_db).values()) == {("SENT", 0)}


async def test_broker_that_is_not_there(outbox: Pool, purchases_db: str) -> None:
    """Without a broker nothing is marked and no attempt is counted; the reason is known."""
    write(purchases_db, 5)
    relay, _ = make_relay(outbox, "amqp://guest:guest@127.0.0.1:1/%2F")
    step = await relay.run_once(100)
    assert step.outage
    assert set(states(purchases_db).values()) == {("NEW", 0)}


async def test_relays_side_by_side(outbox: Pool, purchases_db: str, amqp_url: str, channel: BlockingChannel) -> None:
    """Three relays share the work: everything is published, nothing twice."""
    bind(channel)
    ids = write(purchases_db, 3_000)
    relays = [make_relay(outbox, amqp_url, window=200) for _ in range(3)]
    stop = asyncio.Event()
    tasks = [asyncio.ensure_future(relay.run(stop)) for relay, _ in relays]
    await eventually(lambda: all_sent(purchases_db), "everything is sent")
    stop.set()
    await asyncio.gather(*tasks)
    for _, publisher in relays:
        publisher.disconnect()
    assert Counter(properties.message_id for _, properties, _ in drain(channel)) == Counter(ids)


async def test_looks_in_vain_leave_no_transaction_open(
    outbox: Pool, purchases_db: str, amqp_url: str, channel: BlockingChannel
) -> None:
    """While events come, a look that finds nothing leaves its transaction to the next one; the last of them ends it."""
    bind(channel)
    relay, publisher = make_relay(outbox, amqp_url)
    stop = asyncio.Event()
    running = asyncio.ensure_future(relay.run(stop))
    for _ in range(20):
        write(purchases_db, 1)
    await eventually(lambda: all_sent(purchases_db), "everything is sent")
    ((since,),) = query(purchases_db, "SELECT clock_timestamp()")
    old = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND xact_start < clock_timestamp() - interval '0.5 s'"
    )

    async def long_after() -> bool:
        return bool(query(purchases_db, f"SELECT clock_timestamp() > '{since}'::timestamptz + interval '1 s'")[0][0])

    async def none_is_open() -> bool:
        return query(purchases_db, old) == [(0,)]

    await eventually(long_after, "no event has come for a while")
    await eventually(none_is_open, "no transaction is left")
    stop.set()
    await running
    publisher.disconnect()


async def test_event_that_commits_late_is_found(
    outbox: Pool, purchases_db: str, amqp_url: str, channel: BlockingChannel
) -> None:
    """Transactions commit out of order: an older event behind a newer one is published all the same."""
    bind(channel)
    relay, publisher = make_relay(outbox, amqp_url)
    with psycopg.connect(purchases_db) as slow:
        insert(slow, [*new_ids(2, age_s=3_600), *new_ids(1)])
        insert(slow, new_ids(2, age_s=25 * 3_600))  # from a machine whose clock is a day behind
        write(purchases_db, 10)
        assert (await relay.run_once(100)).claimed == 10
        slow.commit()
    assert (await relay.run_once(100)).claimed == 5  # at once, however old their ids are
    publisher.disconnect()
    assert len(drain(channel)) == 15


async def test_faulty_event_spares_its_neighbours(
    outbox: Pool, purchases_db: str, amqp_url: str, channel: BlockingChannel
) -> None:
    """An event that can never be published counts its attempts and is given up; the others go through."""
    bind(channel)
    (bad,) = write(purchases_db, 1, event_type="Unheard")
    good = write(purchases_db, 20)
    relay, publisher = make_relay(outbox, amqp_url)
    for attempt in (1, 2, 3):
        assert (await relay.run_once(100)).outage is None
        assert states(purchases_db)[bad] == ("FAILED" if attempt == 3 else "NEW", attempt)
        relay._retries_at = 0.0
        with psycopg.connect(purchases_db) as connection:  # its pause is over
            connection.execute("UPDATE outbox_events SET next_attempt_at = now() WHERE status = 'NEW'")
    assert (await relay.run_once(100)).claimed == 0
    publisher.disconnect()
    assert all(states(purchases_db)[event_id] == ("SENT", 0) for event_id in good)
    with psycopg.connect(purchases_db) as connection:
        row = connection.execute("SELECT last_error FROM outbox_events WHERE status = 'FAILED'").fetchone()
    assert row
    assert "Unheard" in row[0]


async def test_crash_after_publishing_repeats_and_loses_nothing(
    outbox: Pool, purchases_db: str, amqp_url: str, channel: BlockingChannel
) -> None:
    """When the mark is lost with its connection, the events are published once more: never lost, hence twice."""
    bind(channel)
    ids = write(purchases_db, 30)

    class Unlucky(Publisher):
        async def publish(self, events: Any) -> Any:
            outcome = await super().publish(events)
            with psycopg.connect(purchases_db, autocommit=True) as admin:
                admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE state = 'idle in transaction' AND datname = current_database()"
                )
            return outcome

    publisher = Unlucky(amqp_url, confirm_timeout_s=10)
    with pytest.raises(psycopg.OperationalError):
        await Relay(outbox, publisher, window=100, attempts_max=3, look_every_s=0.025).run_once(100)
    publisher.disconnect()
    assert set(states(purchases_db).values()) == {("NEW", 0)}
    relay, healthy = make_relay(outbox, amqp_url)
    assert (await relay.run_once(100)).claimed == 30
    healthy.disconnect()
    assert Counter(properties.message_id for _, properties, _ in drain(channel)) == Counter(ids * 2)
    assert set(states(purchases_db).values()) == {("SENT", 0)}


def test_payloads_keep_their_decimals(purchases_db: str) -> None:
    """jsonb keeps 142.50 as 142.50: what the consumer reads is what was written."""
    with psycopg.connect(purchases_db) as connection:
        row = connection.execute("""SELECT ('{"a": 142.50, "b": 8.9}'::jsonb)::text""").fetchone()
    assert row == ('{"a": 142.50, "b": 8.9}',)
    assert json.loads(row[0], parse_float=str) == {"a": "142.50", "b": "8.9"}
