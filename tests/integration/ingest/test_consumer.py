"""The consumer as it is wired, between a real broker and a real database."""

import asyncio
import random
import signal
import socket
import struct
import subprocess
from collections import Counter
from collections.abc import Awaitable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from urllib.parse import unquote, urlsplit
from zoneinfo import ZoneInfo

import grpc
import pika
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pika.adapters.blocking_connection import BlockingChannel
from pika.channel import Channel

from analytics_svc import database as analytics_database
from analytics_svc.commands.consume import consume
from analytics_svc.ingest import consumer as consumer_module
from analytics_svc.ingest import upkeep
from analytics_svc.ingest.apply import apply
from analytics_svc.ingest.consumer import QUEUE, QUEUE_ARGUMENTS, Consumer, Inbox
from analytics_svc.ingest.events import decode
from analytics_svc.settings import MigrateSettings
from chassis.migrate import MigrationError
from deploy.local.rabbitmq import RabbitMQ
from tests.conftest import WAIT_S, eventually, pool
from tests.integration.conftest import free_address, is_serving
from tests.integration.consumers import (
    COUNTED,
    QUARANTINED,
    config,
    consuming,
    counts,
    depth,
    is_true,
    publish,
    serving,
    start,
)
from tests.integration.purchase_events import GOLDEN, expected, query, read_models, sold, some_sales
from tests.sizes import how_many

END_CONNECTIONS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)
BATCH_WAITS = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ~ 'UPDATE freshness'"


async def test_golden_example_ten_times_over(analytics_db: str, amqp_url: str, channel: BlockingChannel) -> None:
    """Published ten times, the contract's example counts once: +142.50, +3 units. All ten are acknowledged."""
    async with consuming(analytics_db, amqp_url):
        publish(channel, *[GOLDEN] * 10)
        await counts(analytics_db, COUNTED, 1)
        publish(channel, *[sold("1.00").body()])
        await counts(analytics_db, COUNTED, 2)
    assert depth(channel) == 0
    assert query(analytics_db, "SELECT revenue_sum, items_sum FROM daily_sales_by_branch WHERE day = '2026-01-06'") == [
        (Decimal("142.50"), 3)
    ]


async def test_many_events_by_two_consumers(analytics_db: str, amqp_url: str, channel: BlockingChannel) -> None:
    """Two consumers share a queue full of shuffled and repeated events; the sums are those computed by other means."""
    sales = some_sales(1_500, seed=11)
    async with (
        consuming(analytics_db, amqp_url, batch_max=40, prefetch=100),
        consuming(analytics_db, amqp_url, batch_max=30, prefetch=100),
    ):
        publish(channel, *[sale.body() for sale in sales[::2] + sales[::-1]])
        await counts(analytics_db, COUNTED, 1_500)
    assert read_models(analytics_db) == expected(sales)
    assert depth(channel) == 0


async def test_shuffled_duplicated_and_delayed_over_three_processes(
    analytics_db: str, amqp_url: str, channel: BlockingChannel, processes: list[Any]
) -> None:
    """Every table is equal, to the cent, to sums computed by other means, whatever order and however often; hot rows.

    A quarter of the events comes again, some were held by somebody who let them go only at the end, three processes
    write the same few rows, in small batches.
    """
    sales = some_sales(how_many("EVENTS"), seed=15)
    chance = random.Random(16)
    bodies = [sale.body() for sale in sales]
    deliveries = bodies + chance.choices(bodies, k=len(bodies) // 4)
    chance.shuffle(deliveries)
    async with consuming(analytics_db, amqp_url):
        pass  # the queue is there
    with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
        publisher, dawdler = connection.channel(), connection.channel()
        first, later = deliveries[: len(deliveries) // 2], deliveries[len(deliveries) // 2 :]
        publish(publisher, *first)
        held = [dawdler.basic_get(QUEUE)[2] for _ in range(100)]
        settings = {"ANALYTICS_DATABASE_URL": analytics_db, "AMQP_URL": amqp_url, "CONSUMER_BATCH_MAX": "50"}
        settings["CONSUMER_PREFETCH"] = "150"
        processes.extend(start("consume", CONSUMER_LISTEN=free_address(), **settings) for _ in range(3))
        publish(publisher, *later)
        await counts(analytics_db, COUNTED, len(Counter(deliveries) - Counter(held)))
        dawdler.close()
        await counts(analytics_db, COUNTED, len(sales))
    assert read_models(analytics_db) == expected(sales)
    assert query(analytics_db, QUARANTINED) == [(0,)]


async def test_consumer_waits_for_the_publishers_exchange(analytics_db: str, amqp_url: str) -> None:
    """Started first, it waits, not serving; once the exchange is there, it makes its queue, durable and replicated."""
    settings = config(analytics_db, amqp_url)
    stop = asyncio.Event()
    task = asyncio.ensure_future(consume(settings, stop))
    async with grpc.aio.insecure_channel(settings.listen) as health:
        with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
            declared = connection.channel()

            async def queue_is_there() -> bool:
                nonlocal declared
                try:
                    declared.queue_declare(QUEUE, passive=True)
                except pika.exceptions.ChannelClosedByBroker:
                    declared = connection.channel()
                    return False
                return True

            await eventually(queue_is_there, "the queue is there")
            assert not await is_serving(health)
            declared.exchange_declare("purchases", "topic", durable=True)
            await eventually(lambda: is_serving(health), "the consumer serves")
            declared.queue_declare(QUEUE, durable=True, arguments=QUEUE_ARGUMENTS)  # fails if it were another one
            declared.confirm_delivery()
            publish(declared, GOLDEN)
            await counts(analytics_db, COUNTED, 1)
            stop.set()
            await asyncio.wait_for(task, WAIT_S)


POISON: list[tuple[str, bytes, dict[str, Any]]] = [
    ("UNDECODABLE", b"no json", {}),
    ("UNDECODABLE", b"\xff\x00\xfe", {}),
    ("UNDECODABLE", b"[" * 50_000, {}),
    ("UNDECODABLE", GOLDEN.replace(b"142.50", b"NaN"), {}),
    ("UNDECODABLE", GOLDEN.replace(b'"branch_id": 1,', b'"branch_id": 1, "branch_id": 2,'), {}),
    ("TOO_LARGE", b" " * ((1 << 20) + 1), {}),
    ("UNKNOWN_EVENT_TYPE", sold().body(event_type="PurchaseCancelled"), {}),
    ("UNKNOWN_EVENT_TYPE", sold().body(), {"type": "PurchaseCancelled"}),
    ("UNSUPPORTED_SCHEMA_VERSION", sold().body(), {"headers": {"schema_version": 2}}),
    ("TOTAL_MISMATCH", sold().body(total_amount=Decimal("133.61")), {}),
    ("BROKEN_CONTRACT", sold().body(event_id="7"), {}),
    ("BROKEN_CONTRACT", sold().body(purchase={}), {}),
    ("BROKEN_CONTRACT", sold().body(branch_id=2**31), {}),
    ("BROKEN_CONTRACT", sold().body(pos_id="POS\0"), {}),
    ("BROKEN_CONTRACT", sold().body(purchase_time="0000-01-01T00:00:00Z"), {}),
    ("BROKEN_CONTRACT", sold().body(total_amount=Decimal("133.6001")), {}),
    ("BROKEN_CONTRACT", sold().body(total_amount=10**16), {}),
]


async def test_poison_is_quarantined_and_its_neighbours_count(
    analytics_db: str, amqp_url: str, channel: BlockingChannel
) -> None:
    """Each kind of bad message is kept with its reason, bytes and properties; it blocks nothing and is not lost."""
    good = some_sales(len(POISON) + 1, seed=2)
    async with consuming(analytics_db, amqp_url):
        for sale, (_, body, properties) in zip(good, POISON, strict=False):
            publish(channel, sale.body())
            publish(channel, body, **({"message_id": sold().event_id} | properties))
        publish(channel, good[-1].body())
        await counts(analytics_db, COUNTED, len(good))
        await counts(analytics_db, QUARANTINED, len(POISON))
    assert depth(channel) == 0
    assert read_models(analytics_db) == expected(good)
    kept = query(analytics_db, "SELECT reason, body FROM quarantined_events")
    assert sorted(kept) == sorted((reason, body) for reason, body, _ in POISON)
    assert query(analytics_db, "SELECT count(*) FROM quarantined_events WHERE event_id IS NULL") == [(0,)]
    assert query(analytics_db, "SELECT quarantined_count FROM freshness") == [(len(POISON),)]


async def test_poison_keeps_its_properties(analytics_db: str, amqp_url: str, channel: BlockingChannel) -> None:
    """Properties of every AMQP type are kept, also such as the database itself would refuse."""
    headers = {
        "schema_version": 2,
        "text": "a\0b",
        "bytes": b"\xff",
        "list": [1, None, True, Decimal("1.5")],
        "table": {"n": 1},
    }
    async with consuming(analytics_db, amqp_url):
        publish(channel, GOLDEN, headers=headers, correlation_id="c")
        await counts(analytics_db, QUARANTINED, 1)
    ((kept,),) = query(analytics_db, "SELECT properties FROM quarantined_events")
    assert kept == {
        "content_type": "application/json",
        "delivery_mode": 2,
        "correlation_id": "c",
        "headers": {
            "schema_version": 2,
            "text": "a\ufffdb",
            "bytes": "b'\\xff'",
            "list": [1, None, True, "1.5"],
            "table": {"n": 1},
        },
    }


class FarFuture(pika.BasicProperties):  # type: ignore[misc] # pika has no types
    """A header with a date beyond the calendar, as a producer sends it that mistakes milliseconds for seconds."""

    def encode(self) -> list[bytes]:
        self.headers = {"sent_at": datetime(2026, 1, 6, tzinfo=UTC)}
        seconds = int(self.headers["sent_at"].timestamp())
        wrong = struct.pack(">Q", seconds * 1_000)
        return [b"".join(super().encode()).replace(struct.pack(">Q", seconds), wrong)]


async def test_headers_that_cannot_be_read(analytics_db: str, amqp_url: str, channel: BlockingChannel) -> None:
    """A message whose very headers break the library blocks nothing: it is quarantined, too."""
    async with consuming(analytics_db, amqp_url):
        channel.basic_publish("purchases", "purchases.created", GOLDEN, FarFuture(), mandatory=True)
        publish(channel, sold("1.00").body())
        await counts(analytics_db, COUNTED, 1)
        await counts(analytics_db, QUARANTINED, 1)
    assert query(analytics_db, "SELECT reason, body FROM quarantined_events") == [
        ("UNSUPPORTED_SCHEMA_VERSION", GOLDEN)
    ]
    assert depth(channel) == 0


async def test_same_poison_again_and_again(analytics_db: str, amqp_url: str, channel: BlockingChannel) -> None:
    """A producer that repeats its mistake fills no disk: the same message is kept once."""
    async with consuming(analytics_db, amqp_url):
        publish(channel, *[b"poison"] * 200, sold("1.00").body())
        await counts(analytics_db, COUNTED, 1)
    assert query(analytics_db, QUARANTINED) == [(1,)]
    assert depth(channel) == 0


async def test_event_that_the_database_refuses(analytics_db: str, amqp_url: str, channel: BlockingChannel) -> None:
    """In a batch that fails, the culprits alone are quarantined, with the SQLSTATE; all their neighbours count."""
    query(analytics_db, "ALTER TABLE product_sales_daily ADD CHECK (product_id <> 666)")
    culprits = [sold(lines=((666, 1, Decimal(n)),)) for n in range(1, 4)]
    sales = some_sales(120, seed=4)
    mixed = sales[:50] + culprits[:2] + sales[50:70] + culprits[2:] + sales[70:]
    async with consuming(analytics_db, amqp_url):
        publish(channel, *[sale.body() for sale in mixed], b"poison")
        await counts(analytics_db, COUNTED, len(sales))
        await counts(analytics_db, QUARANTINED, 4)
    assert read_models(analytics_db) == expected(sales)
    assert depth(channel) == 0
    kept = query(analytics_db, "SELECT event_id::text, detail FROM quarantined_events WHERE reason = 'APPLY_FAILED'")
    assert {event_id for event_id, _ in kept} == {sale.event_id for sale in culprits}
    assert all("23514" in detail for _, detail in kept)


@pytest.mark.parametrize("table", ["product_sales_daily", "freshness"])  # a batch's first and last
async def test_database_that_refuses_everything_blames_no_event(
    analytics_db: str, amqp_url: str, channel: BlockingChannel, table: str
) -> None:
    """A missing right is not the events' fault: they wait, the consumer does not serve, and then they count."""
    sales = some_sales(30, seed=5)
    async with consuming(analytics_db, amqp_url) as health:
        query(analytics_db, f"REVOKE UPDATE ON {table} FROM analytics_consumer")
        publish(channel, *[sale.body() for sale in sales])
        await eventually(lambda: _not(is_serving(health)), "it does not serve")
        assert query(analytics_db, f"SELECT ({COUNTED}), ({QUARANTINED})") == [(0, 0)]
        query(analytics_db, f"GRANT UPDATE ON {table} TO analytics_consumer")
        await counts(analytics_db, COUNTED, 30)
        await eventually(lambda: is_serving(health), "it serves again")
    assert read_models(analytics_db) == expected(sales)


async def _not(condition: Awaitable[bool]) -> bool:
    return not await condition


async def test_database_outage(analytics_db: str, postgres_url: str, amqp_url: str, channel: BlockingChannel) -> None:
    """While the database is down nothing is acknowledged or lost, and the process stays; then everything counts."""
    name = urlsplit(analytics_db).path[1:]
    first, second = some_sales(60, seed=6)[:30], some_sales(60, seed=6)[30:]
    async with consuming(analytics_db, amqp_url) as health:
        publish(channel, *[sale.body() for sale in first])
        await counts(analytics_db, COUNTED, 30)
        with psycopg.connect(postgres_url, autocommit=True) as admin:
            admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false'.encode())
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
            publish(channel, *[sale.body() for sale in second])
            await eventually(lambda: _not(is_serving(health)), "it does not serve")
            admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true'.encode())
        await counts(analytics_db, COUNTED, 60)
        await eventually(lambda: is_serving(health), "it serves again")
    assert read_models(analytics_db) == expected([*first, *second])
    assert query(analytics_db, QUARANTINED) == [(0,)]
    assert depth(channel) == 0


@pytest.mark.usefixtures("channel")
async def test_database_lost_while_nothing_arrives(
    analytics_db: str, postgres_url: str, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Health turns though there is nothing to apply, and turns back by itself."""
    monkeypatch.setattr(upkeep, "EVERY_S", 0.2)
    name = urlsplit(analytics_db).path[1:]
    async with consuming(analytics_db, amqp_url) as health:
        with psycopg.connect(postgres_url, autocommit=True) as admin:
            admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false'.encode())
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
            await eventually(lambda: is_not_serving(health), "it does not serve")
            admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true'.encode())
        await eventually(lambda: is_serving(health), "it serves again")


async def is_not_serving(channel: grpc.aio.Channel) -> bool:
    """Whether it says so, as opposed to saying nothing."""
    try:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)  # type: ignore[attr-defined]
    except grpc.aio.AioRpcError:
        return False
    return bool(reply.status == health_pb2.HealthCheckResponse.NOT_SERVING)


async def test_servers_that_are_not_up_yet(analytics_db: str, postgres_url: str, amqp_url: str) -> None:
    """Started before its database and its broker, it answers that it does not serve, waits, and then serves."""
    name = urlsplit(analytics_db).path[1:]
    settings = config(analytics_db, amqp_url)
    nowhere = config(analytics_db, f"amqp://guest:guest@{free_address()}/%2F")
    stop = asyncio.Event()
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false'.encode())
        tasks = [asyncio.ensure_future(consume(each, stop)) for each in (settings, nowhere)]
        async with (
            grpc.aio.insecure_channel(settings.listen) as health,
            grpc.aio.insecure_channel(nowhere.listen) as health_nowhere,
        ):
            await eventually(lambda: is_not_serving(health), "it answers that it does not serve")
            await eventually(lambda: is_not_serving(health_nowhere), "it answers that it does not serve")
            admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true'.encode())
            with pika.BlockingConnection(pika.URLParameters(amqp_url)) as publisher:
                publisher.channel().exchange_declare("purchases", "topic", durable=True)
            await eventually(lambda: is_serving(health), "it serves")
            assert not await is_serving(health_nowhere)
        stop.set()
        await asyncio.wait_for(asyncio.gather(*tasks), WAIT_S)


async def test_stop_during_a_database_outage(
    analytics_db: str, postgres_url: str, amqp_url: str, channel: BlockingChannel
) -> None:
    """A consumer that cannot finish its batch stops all the same, and leaves the events in the queue."""
    name = urlsplit(analytics_db).path[1:]
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        async with consuming(analytics_db, amqp_url) as health:
            admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false'.encode())
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
            publish(channel, *[sold("1.00").body() for _ in range(5)])
            await eventually(lambda: _not(is_serving(health)), "it does not serve")
        assert depth(channel) == 5
        admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true'.encode())


async def test_lost_database_connections(analytics_db: str, amqp_url: str, channel: BlockingChannel) -> None:
    """Connections that break under way cost a retry; the sums stay exact."""
    sales = some_sales(600, seed=9)
    async with consuming(analytics_db, amqp_url, batch_max=20):
        for start in range(0, 600, 50):
            publish(channel, *[sale.body() for sale in sales[start : start + 50]])
            query(analytics_db, END_CONNECTIONS)
        await counts(analytics_db, COUNTED, 600)
    assert read_models(analytics_db) == expected(sales)
    assert query(analytics_db, QUARANTINED) == [(0,)]


async def test_lost_broker_connections(
    analytics_db: str, amqp_url: str, channel: BlockingChannel, broker: RabbitMQ
) -> None:
    """After a loss it connects again; what was under way comes again and counts once."""
    sales = some_sales(400, seed=10)
    async with consuming(analytics_db, amqp_url, batch_max=10) as health:
        for start in (0, 200):
            publish(channel, *[sale.body() for sale in sales[start : start + 200]])
            await asyncio.to_thread(close_consumers, broker, unquote(urlsplit(amqp_url).path[1:]))
        await counts(analytics_db, COUNTED, 400)
        await eventually(lambda: is_serving(health), "it serves again")
    assert read_models(analytics_db) == expected(sales)
    assert depth(channel) == 0


def close_consumers(broker: RabbitMQ, virtual_host: str) -> None:
    """End the consumers' connections, and no one else's, as the broker's operator would."""
    for line in broker.ctl("list_connections", "pid", "vhost", "client_properties").splitlines():
        if f"\t{virtual_host}\t" in line and "analytics consumer" in line:
            broker.ctl("close_connection", line.split("\t")[0], "a test")


async def test_queue_that_was_deleted(analytics_db: str, amqp_url: str, channel: BlockingChannel) -> None:
    """A queue that somebody deletes is made again, with its binding."""
    async with consuming(analytics_db, amqp_url):
        publish(channel, sold("1.00").body())
        await counts(analytics_db, COUNTED, 1)
        channel.queue_delete(QUEUE)

        async def routed() -> bool:
            try:
                publish(channel, GOLDEN)
            except pika.exceptions.UnroutableError:
                return False
            return True

        await eventually(routed, "the queue takes messages again")
        await counts(analytics_db, COUNTED, 2)


async def test_crash_between_commit_and_acknowledgement(
    analytics_db: str, amqp_url: str, channel: BlockingChannel
) -> None:
    """What was committed but not acknowledged comes again, marked as redelivered, and is not counted again."""
    async with consuming(analytics_db, amqp_url):
        pass  # the queue is there
    sales = some_sales(50, seed=12)
    publish(channel, *[sale.body() for sale in sales])
    with pika.BlockingConnection(pika.URLParameters(amqp_url)) as dying:
        taken = dying.channel()
        bodies = [taken.basic_get(QUEUE)[2] for _ in range(30)]
        async with (
            pool(analytics_db, "analytics_consumer") as opened,
            opened.connection() as connection,
            connection.transaction(),
        ):
            await apply(connection, [decode(body, ZoneInfo("UTC")) for body in bodies if body], [])
    assert query(analytics_db, COUNTED) == [(30,)]
    assert depth(channel) == 50
    async with consuming(analytics_db, amqp_url):
        await counts(analytics_db, COUNTED, 50)
    assert read_models(analytics_db) == expected(sales)
    assert depth(channel) == 0


async def test_kill_in_the_middle_of_a_transaction(
    analytics_db: str, amqp_url: str, channel: BlockingChannel, processes: list[Any]
) -> None:
    """Killed with a batch half applied, the process leaves nothing behind; its successor counts the batch once."""
    address = free_address()
    settings = {"ANALYTICS_DATABASE_URL": analytics_db, "AMQP_URL": amqp_url, "CONSUMER_LISTEN": address}
    processes.append(start("consume", **settings))
    await serving(address)
    sales = some_sales(40, seed=13)
    with psycopg.connect(analytics_db) as holder:
        holder.execute("SELECT FROM freshness FOR UPDATE")  # the last row that a batch writes
        publish(channel, *[sale.body() for sale in sales])
        await eventually(lambda: is_true(analytics_db, BATCH_WAITS), "the batch waits for its last row")
        processes[0].kill()
        processes[0].wait()
    assert query(analytics_db, COUNTED) == [(0,)]
    async with consuming(analytics_db, amqp_url):
        await counts(analytics_db, COUNTED, 40)
    assert read_models(analytics_db) == expected(sales)


async def test_sigterm_finishes_the_batch(
    analytics_db: str, amqp_url: str, channel: BlockingChannel, processes: list[Any]
) -> None:
    """On SIGTERM health turns at once, the batch in flight is committed and acknowledged, and the exit code is 0."""
    address = free_address()
    settings = {"ANALYTICS_DATABASE_URL": analytics_db, "AMQP_URL": amqp_url, "CONSUMER_LISTEN": address}
    processes.append(start("consume", **settings, CONSUMER_BATCH_MAX="10", CONSUMER_PREFETCH="10"))
    await serving(address)
    async with grpc.aio.insecure_channel(address) as health:
        with psycopg.connect(analytics_db) as holder:
            holder.execute("SELECT FROM freshness FOR UPDATE")
            publish(channel, *[sold("1.00").body() for _ in range(30)])
            await eventually(lambda: is_true(analytics_db, BATCH_WAITS), "the batch waits for its last row")
            processes[0].send_signal(signal.SIGTERM)
            await eventually(lambda: _not(is_serving(health)), "it does not serve")
    assert await asyncio.to_thread(processes[0].wait, WAIT_S) == 0
    ((counted,),) = query(analytics_db, COUNTED)
    assert 1 <= counted <= 10
    assert depth(channel) == 30 - counted


def ends(process: "subprocess.Popen[bytes]") -> tuple[int, str]:
    _, text = process.communicate(timeout=WAIT_S)
    return process.returncode, text.decode()


def test_wrong_settings_are_named_at_once(processes: list[Any]) -> None:
    """Every wrong or missing setting is named, and the exit code is 2."""
    wrong = {"AMQP_URL": "http://x", "BUSINESS_TIME_ZONE": "Mars/North", "CONSUMER_BATCH_MAX": "0", "LOG_LEVEL": "loud"}
    processes.append(start("consume", **wrong))
    code, text = ends(processes[0])
    assert code == 2
    assert all(name in text for name in ("ANALYTICS_DATABASE_URL", *wrong))


@pytest.mark.parametrize("command", ["consume", "serve"])
def test_taken_ports_are_clear_errors(analytics_db: str, amqp_url: str, command: str, processes: list[Any]) -> None:
    """Whoever is started twice is told which address is taken."""
    name = {"consume": "CONSUMER", "serve": "ANALYTICS"}[command]
    settings = {"ANALYTICS_DATABASE_URL": analytics_db, "AMQP_URL": amqp_url, f"{name}_LISTEN": free_address()}
    host, _, port = settings[f"{name}_LISTEN"].rpartition(":")
    with socket.create_server((host, int(port))):
        processes.append(start(command, **settings))
        code, text = ends(processes[0])
    assert (code, settings[f"{name}_LISTEN"] in text, "Traceback" in text) == (1, True, False)


@pytest.mark.parametrize("command", ["consume", "serve"])
def test_other_business_time_zone_is_refused(
    analytics_db: str, amqp_url: str, command: str, processes: list[Any]
) -> None:
    """Neither process starts, and migrate fails, with another zone than the one that cut the stored days."""
    settings = {"ANALYTICS_DATABASE_URL": analytics_db, "AMQP_URL": amqp_url, "BUSINESS_TIME_ZONE": "Europe/Berlin"}
    ports = {"CONSUMER_LISTEN": free_address(), "ANALYTICS_LISTEN": free_address()}
    processes.append(start(command, **settings, **ports))
    code, text = ends(processes[0])
    assert (code, "Traceback" in text) == (1, False)
    assert "BUSINESS_TIME_ZONE is Europe/Berlin, but the database was set up with UTC" in text
    with pytest.raises(MigrationError, match="set up with UTC"):
        analytics_database.migrate_database(MigrateSettings(analytics_db, business_time_zone="Europe/Berlin"))


@pytest.mark.parametrize(
    "lacking", ["DELETE FROM schema_migrations", "DROP TABLE schema_migrations", "DELETE FROM analytics_settings"]
)
def test_database_that_is_not_migrated(analytics_db: str, amqp_url: str, lacking: str, processes: list[Any]) -> None:
    """A database without our migrations is refused with what to do about it."""
    query(analytics_db, lacking)
    settings = {"ANALYTICS_DATABASE_URL": analytics_db, "AMQP_URL": amqp_url, "CONSUMER_LISTEN": free_address()}
    processes.append(start("consume", **settings))
    code, text = ends(processes[0])
    assert (code, "run `migrate` first" in text, "Traceback" in text) == (1, True, False)


def test_migrate_is_repeatable(analytics_db: str) -> None:
    """Migrating again changes nothing; the key that signs page tokens stays."""
    key = query(analytics_db, "SELECT * FROM analytics_settings")
    analytics_database.migrate_database(MigrateSettings(analytics_db))
    assert query(analytics_db, "SELECT * FROM analytics_settings") == key
    assert len(key[0][2]) == 32


async def test_subscription_that_the_broker_forgot(
    analytics_db: str, amqp_url: str, channel: BlockingChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages wait, and none is delivered, on a connection that is well: another connection is served."""
    subscribed = 0
    subscribe = Consumer._subscribe

    async def forgotten(self: Consumer, opened: Channel, inbox: Inbox) -> None:
        nonlocal subscribed
        subscribed += 1
        if subscribed == 1:
            opened.basic_consume = lambda callback, **_: callback(None)
        await subscribe(self, opened, inbox)

    monkeypatch.setattr(Consumer, "_subscribe", forgotten)
    monkeypatch.setattr(consumer_module, "SILENCE_S", 0.2)
    async with consuming(analytics_db, amqp_url):
        publish(channel, GOLDEN)
        await counts(analytics_db, COUNTED, 1)
    assert subscribed == 2
