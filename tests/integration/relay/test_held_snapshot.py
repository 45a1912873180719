"""An old snapshot somewhere keeps vacuum from cleaning up behind the relay; it must not make the relay slower.

`make test HELD_SNAPSHOT_S=600 ARGS='tests/integration/relay/test_held_snapshot.py -s'` is the long run:
it prints, for each minute, what was sent and what that cost the database.
"""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pika
import psycopg
import pytest

from chassis.postgres import Pool
from relay_svc import inspection
from relay_svc.outbox import START, Position
from relay_svc.publisher import Publisher
from relay_svc.relay import Relay
from tests.conftest import eventually, pool
from tests.integration.outbox_events import all_sent, make_days
from tests.sizes import how_many

SECONDS = how_many("HELD_SNAPSHOT_S")
PER_S = int(os.environ.get("HELD_SNAPSHOT_PER_S", "0"))  # events offered; 0 means as many as go through
PARTS = 10
BACKLOG_MAX = 10_000  # events, when as many as possible are offered
LEAST = 0.8  # of the speed at the beginning; only in long runs, as in a few seconds a machine may do something else
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

pytestmark = pytest.mark.timeout(SECONDS + 120)


@pytest.fixture
async def outbox(purchases_db: str) -> AsyncIterator[Pool]:
    make_days(purchases_db)
    async with pool(purchases_db, "purchases_relay", size=4) as opened:
        yield opened


@pytest.fixture
def bound(amqp_url: str) -> str:
    """A queue that keeps the newest few messages only, and so stays small."""
    with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
        channel = connection.channel()
        channel.exchange_declare("purchases", "topic", durable=True)
        channel.queue_delete("kept.short")
        channel.queue_declare("kept.short", durable=True, arguments={"x-queue-type": "quorum", "x-max-length": 1_000})
        channel.queue_bind("kept.short", "purchases", "purchases.created")
    return amqp_url


@contextmanager
def writing(url: str) -> Iterator[None]:
    """Events committed all the time, a hundred in a transaction."""
    stop = threading.Event()

    def write() -> None:
        began, written = time.monotonic(), 0
        with psycopg.connect(url, autocommit=True) as connection:
            while not stop.is_set():
                connection.execute(
                    "INSERT INTO outbox_events (event_id, event_type, aggregate_id, occurred_at, payload_json)"
                    " SELECT uuidv7(), 'PurchaseCreated', gen_random_uuid(), now(),"
                    " jsonb_build_object('filling', repeat('x', 500)) FROM generate_series(1, 100)"
                )
                written += 100
                if PER_S:
                    stop.wait(max(began + written / PER_S - time.monotonic(), 0))
                elif written % BACKLOG_MAX == 0:
                    while waiting(connection) > BACKLOG_MAX and not stop.wait(0.02):
                        pass

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def waiting(connection: "psycopg.Connection[Any]") -> int:
    row = connection.execute("SELECT outbox_waiting(1000000)").fetchone()
    assert row
    return int(row[0])


def sessions_cpu_s(connection: "psycopg.Connection[Any]") -> float:
    """CPU time of the relay's sessions."""
    pids = connection.execute(
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'test' AND datname = current_database()"
    ).fetchall()
    ticks = 0
    for (pid,) in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS_PER_S


async def test_relay_keeps_its_speed(outbox: Pool, purchases_db: str, bound: str) -> None:
    publisher = Publisher(bound, confirm_timeout_s=10)
    relay = Relay(outbox, publisher, window=500, attempts_max=3, look_every_s=0.025)
    stop = asyncio.Event()
    parts = []
    with (
        psycopg.connect(purchases_db, application_name="old report") as idle,
        psycopg.connect(purchases_db, autocommit=True) as looking,
    ):
        idle.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        idle.execute("SELECT count(*) FROM outbox_events")
        running = asyncio.ensure_future(relay.run(stop))
        with writing(purchases_db):
            for _ in range(PARTS):
                before, cpu_before = relay.sent, sessions_cpu_s(looking)
                await asyncio.sleep(SECONDS / PARTS)  # what is measured is time
                events = relay.sent - before
                cpu_us = (sessions_cpu_s(looking) - cpu_before) / max(events, 1) * 1e6
                parts.append(events)
                backlog, rate = waiting(looking), events / SECONDS * PARTS
                print(f"{rate:8,.0f} events/s, database {cpu_us:5.1f} us/event, {backlog:6,} waiting")
        await eventually(lambda: all_sent(purchases_db), "what was written is sent")
        async with outbox.connection() as connection:
            blocker = await inspection.cleanup_blocker(connection)
        from_here = touched(looking, relay._position)
        from_the_start = touched(looking, START)
        stop.set()
        await running
        publisher.disconnect()
        if SECONDS > inspection.BLOCKER_AGE_MIN_S:
            assert blocker
            assert (blocker.pid, blocker.name) == (idle.info.backend_pid, "old report")
    total = relay.sent
    print(f"{total:,} events; a claim touches {from_here:,} pages, from the start of the outbox {from_the_start:,}")
    assert total > 1_000
    if SECONDS >= 60:
        assert parts[-1] + parts[-2] >= LEAST * (parts[0] + parts[1])
    # What makes it so, whatever the machine does meanwhile: a claim passes by what was sent before.
    assert from_here < from_the_start / 5
    assert from_the_start > total / 50


def touched(connection: "psycopg.Connection[Any]", position: Position) -> int:
    """Pages that it takes to find the next event from a position."""
    row = connection.execute(
        """
        EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT FROM outbox_events e
        WHERE e.status = 'NEW' AND (e.created_xid, e.event_id) > (%s::xid8, %s::uuid)
        ORDER BY e.created_xid, e.event_id LIMIT 1 OFFSET 100000
        """,
        [str(position.xid), position.event_id],
    ).fetchone()
    assert row
    plan = row[0][0]["Plan"]
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])
