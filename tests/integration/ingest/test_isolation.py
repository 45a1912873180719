"""Messages that end what touches them, and messages that only seem to."""

import asyncio
import subprocess
from collections import Counter
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import pika
import psycopg
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from analytics_svc.ingest import settling
from analytics_svc.ingest.consumer import QUEUE
from analytics_svc.ingest.messages import READ_FAILED, Message, read
from analytics_svc.ingest.settling import ALONE, FAILURES_MAX, Settler
from tests.conftest import eventually, pool
from tests.integration.conftest import free_address
from tests.integration.consumers import (
    COUNTED,
    QUARANTINED,
    all_left,
    consuming,
    counts,
    depth,
    is_true,
    make_queue,
    publish,
    start,
)
from tests.integration.poisoned_consumer import EXIT_CODE, MARKED_PRODUCT_ID
from tests.integration.purchase_events import GOLDEN, Sold, expected, query, read_models, sold, some_sales

DEATHS_MAX = 2  # CONSUMER_DEATHS_MAX, by default
PROCESSES_START_AGAIN = pytest.mark.timeout(900)  # on a busy machine
TRIALS = "SELECT count(*) FROM message_trials"
WAITING = "FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"


def poison() -> tuple[Sold, bytes]:
    """A sale that both bugs die of."""
    sale = sold(lines=((MARKED_PRODUCT_ID, 1, Decimal("6.66")),))
    return sale, sale.body(pos_id="POISON")


def of(analytics_db: str, amqp_url: str, **settings: str) -> dict[str, str]:
    return {"ANALYTICS_DATABASE_URL": analytics_db, "AMQP_URL": amqp_url, **settings}


def test_what_a_process_remembers_of_messages_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may settle them, and then nobody tells this one."""
    monkeypatch.setattr(settling, "NOTED_MAX", 3)
    failures: Counter[bytes] = Counter()
    for digest in (b"a", b"b", b"a", b"c", b"d", b"d"):
        settling._note(failures, digest)
    assert failures == {b"b": 1, b"c": 1, b"d": 2}


async def restarted_until_settled(
    started: list[Any], bug: str, settled: str, settings: dict[str, str], *, consumers: int = 1
) -> int:
    """Keep consumers running, as a supervisor does, until the statement is true; returns how many died."""
    running: list[subprocess.Popen[bytes]] = []
    deaths = 0

    async def goes_on() -> str | None:
        nonlocal deaths
        ended = [process for process in running if process.poll() is not None]
        for process in ended:
            assert process.returncode == EXIT_CODE, process.communicate()[1].decode()[-2000:]
            running.remove(process)
        deaths += len(ended)
        while len(running) < consumers:
            running.append(start("consume", bug=bug, CONSUMER_LISTEN=free_address(), **settings))
            started.append(running[-1])
        if await is_true(settings["ANALYTICS_DATABASE_URL"], settled):
            return "settled"
        return "died" if ended else None

    # A deadline for each process: on a busy machine it takes long to start.
    while await eventually(goes_on, settled, within_s=120) == "died":
        pass
    for process in running:
        process.kill()
        process.wait()
    return deaths


@PROCESSES_START_AGAIN
@pytest.mark.parametrize("bug", ["decode", "apply"])
async def test_one_poison_among_500_ends_the_process(
    analytics_db: str, amqp_url: str, channel: BlockingChannel, processes: list[Any], bug: str
) -> None:
    """Only the poison is quarantined, unread, after one death in company, one in a small group, and two alone."""
    await make_queue(analytics_db, amqp_url, channel)
    sales = some_sales(500, seed=21)
    culprit, body = poison()
    for sale in sales[:250]:
        publish(channel, sale.body(), message_id=sale.event_id)
    publish(channel, body, message_id=culprit.event_id)
    for sale in sales[250:]:
        publish(channel, sale.body(), message_id=sale.event_id)
    deaths = await restarted_until_settled(
        processes,
        bug,
        f"SELECT ({COUNTED}) = 500 AND ({QUARANTINED}) = 1 AND ({TRIALS}) = 0",
        of(analytics_db, amqp_url, CONSUMER_PREFETCH="300", CONSUMER_BATCH_MAX="100"),
    )
    assert deaths == 2 + DEATHS_MAX
    assert query(analytics_db, "SELECT reason, event_id::text, body FROM quarantined_events") == [
        ("KILLS_CONSUMER", culprit.event_id, body)
    ]
    assert read_models(analytics_db) == expected(sales)


@PROCESSES_START_AGAIN
async def test_known_poison_is_not_tried_again(
    analytics_db: str, amqp_url: str, channel: BlockingChannel, processes: list[Any]
) -> None:
    """Published again, it ends one process, which did not know; it comes a second time, and is known."""
    await make_queue(analytics_db, amqp_url, channel)
    settings = of(analytics_db, amqp_url)
    culprit, body = poison()
    for count, deaths in ((1, 2 + DEATHS_MAX), (2, 1)):
        await all_left(channel)
        publish(channel, body, sold("1.00").body(), message_id=culprit.event_id)
        assert deaths == await restarted_until_settled(
            processes, "decode", f"SELECT ({COUNTED}) = {count} AND ({QUARANTINED}) = 1 AND ({TRIALS}) = 0", settings
        )


@PROCESSES_START_AGAIN
async def test_poison_between_two_consumers(
    analytics_db: str, amqp_url: str, channel: BlockingChannel, processes: list[Any]
) -> None:
    """Deaths are counted across processes: three poisons end, and nothing else does, whoever gets them."""
    await make_queue(analytics_db, amqp_url, channel)
    sales = some_sales(400, seed=22)
    culprits = [poison() for _ in range(3)]
    for index, sale in enumerate(sales):
        publish(channel, sale.body(), message_id=sale.event_id)
        if index in (20, 30, 300):
            culprit, body = culprits[(20, 30, 300).index(index)]
            publish(channel, body, message_id=culprit.event_id)
    await restarted_until_settled(
        processes,
        "decode",
        f"SELECT ({COUNTED}) = 400 AND ({QUARANTINED}) = 3",
        of(analytics_db, amqp_url, CONSUMER_PREFETCH="100", CONSUMER_BATCH_MAX="30"),
        consumers=2,
    )
    kept = query(analytics_db, "SELECT reason, event_id::text FROM quarantined_events")
    assert sorted(kept) == sorted(("KILLS_CONSUMER", culprit.event_id) for culprit, _ in culprits)
    assert read_models(analytics_db) == expected(sales)


async def test_kills_while_the_database_hangs_blame_no_event(
    analytics_db: str, amqp_url: str, channel: BlockingChannel, processes: list[Any]
) -> None:
    """An event that waits for a lock, alone, while impatient operators kill the process again and again, counts."""
    await make_queue(analytics_db, amqp_url, channel)
    sale = sold("1.00")
    publish(channel, sale.body(), message_id=sale.event_id)
    settings = of(analytics_db, amqp_url)
    with psycopg.connect(analytics_db) as holder:
        holder.execute("SELECT FROM freshness FOR UPDATE")
        for trial in range(DEATHS_MAX + 3):
            processes.append(start("consume", CONSUMER_LISTEN=free_address(), **settings))
            await eventually(lambda: is_true(analytics_db, f"SELECT count(*) > 0 {WAITING}"), "the batch waits")
            if trial > 1:  # alone by now
                await eventually(lambda: is_true(analytics_db, "SELECT deaths = 0 FROM message_trials"), "no death")
            processes[-1].kill()
            processes[-1].wait()
            query(analytics_db, f"SELECT pg_terminate_backend(pid, 5000) {WAITING}")  # it would go on waiting
    async with consuming(analytics_db, amqp_url):
        await counts(analytics_db, COUNTED, 1)
    assert query(analytics_db, f"SELECT ({QUARANTINED}), ({TRIALS})") == [(0, 0)]


async def test_a_stop_in_the_middle_of_a_trial_blames_no_event(analytics_db: str) -> None:
    """A process that has to stop gives up what it tries; that it did, again and again, is no death."""
    sale = sold("1.00")
    message = Message(sale.body(), {})
    async with pool(analytics_db, "analytics_consumer", size=2) as opened:
        settler = Settler(opened, ZoneInfo("UTC"), DEATHS_MAX)
        with psycopg.connect(analytics_db) as holder:
            holder.execute("SELECT FROM freshness FOR UPDATE")
            for _ in range(DEATHS_MAX + 2):
                trying = asyncio.ensure_future(settler.settle_again([message]))
                await eventually(lambda: is_true(analytics_db, f"SELECT count(*) > 0 {WAITING}"), "the trial waits")
                trying.cancel()
                await asyncio.wait({trying})
                assert trying.cancelled()
                await eventually(lambda: is_true(analytics_db, f"SELECT count(*) = 0 {WAITING}"), "it was given up")
                assert query(analytics_db, "SELECT deaths FROM message_trials") == [(0,)]
        await settler.settle_again([message])
    assert query(analytics_db, f"SELECT ({COUNTED}), ({QUARANTINED}), ({TRIALS})") == [(1, 0, 0)]


async def test_redelivered_50_times(analytics_db: str, amqp_url: str, channel: BlockingChannel) -> None:
    """An event whose channel closes under it 50 times is neither dropped nor quarantined, and then counts once."""
    await make_queue(analytics_db, amqp_url, channel)
    publish(channel, GOLDEN)
    with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
        for _ in range(50):

            async def delivered() -> bool:
                taken = connection.channel()
                method, _, body = taken.basic_get(QUEUE)
                taken.close()
                return bool(method) and body == GOLDEN

            await eventually(delivered, "the event is there")
    async with consuming(analytics_db, amqp_url):
        await counts(analytics_db, COUNTED, 1)
    assert query(analytics_db, f"SELECT ({QUARANTINED}), ({TRIALS})") == [(0, 0)]
    assert query(analytics_db, "SELECT purchases_count FROM sales_totals WHERE branch_id = 0") == [(1,)]
    assert depth(channel) == 0


async def test_mass_redelivery_stays_quick(analytics_db: str, amqp_url: str, channel: BlockingChannel) -> None:
    """After an ordinary restart with everything in flight, nothing is tried alone."""
    await make_queue(analytics_db, amqp_url, channel)
    sales = some_sales(600, seed=23)
    publish(channel, *[sale.body() for sale in sales])
    with pika.BlockingConnection(pika.URLParameters(amqp_url)) as dying:
        taken = dying.channel()
        for _ in sales:
            taken.basic_get(QUEUE)
    alone = ALONE._value.get()
    async with consuming(analytics_db, amqp_url):
        await counts(analytics_db, COUNTED, 600)
    assert ALONE._value.get() == alone
    assert read_models(analytics_db) == expected(sales)
    assert query(analytics_db, TRIALS) == [(0,)]


FAILS = """
    CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.product_id = 666 THEN
            RAISE EXCEPTION 'something broke inside' USING ERRCODE = 'XX000';
        END IF;
        RETURN NEW;
    END
    $$;
    CREATE TRIGGER fails BEFORE INSERT ON product_sales_daily FOR EACH ROW EXECUTE FUNCTION fail()
"""


@pytest.mark.parametrize("neighbours", [0, 60])
async def test_event_that_breaks_the_transaction(
    analytics_db: str, amqp_url: str, channel: BlockingChannel, neighbours: int
) -> None:
    """An error that may have many causes is held against an event that meets it alone while made-up sales pass."""
    query(analytics_db, FAILS)
    sales = some_sales(neighbours, seed=24)
    culprit, body = poison()
    async with consuming(analytics_db, amqp_url):
        publish(channel, *[sale.body() for sale in sales[:30]], body, *[sale.body() for sale in sales[30:]])
        await counts(analytics_db, QUARANTINED, 1)
        await counts(analytics_db, COUNTED, neighbours)
    ((reason, event_id, detail),) = query(analytics_db, "SELECT reason, event_id::text, detail FROM quarantined_events")
    assert (reason, event_id) == ("APPLY_FAILED", culprit.event_id)
    assert "XX000" in detail
    assert FAILURES_MAX > 1
    assert read_models(analytics_db) == expected(sales)
    assert depth(channel) == 0


def test_event_that_our_decoder_does_not_cope_with() -> None:
    """A bug of ours quarantines its event instead of blocking the queue."""
    body = sold("1.00").body()
    found = read(Message(body, {"message_id": "019B92CD-80A0-7C3E-8F5A-2B6D1C0E4F77"}), "no time zone", settling.ANY)  # type: ignore[arg-type]
    assert (found.reason, found.event_id) == (READ_FAILED, "019b92cd-80a0-7c3e-8f5a-2b6d1c0e4f77")  # type: ignore[union-attr]
    assert found.body == body  # type: ignore[union-attr]
