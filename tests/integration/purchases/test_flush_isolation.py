"""Whatever one sale, one row or one connection does, the sales of all others go on."""

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import psycopg
import pytest

from chassis import postgres, zones
from chassis.errors import Overloaded, TransactionConflict
from pos.calls import ATTEMPT_TIMEOUT_S
from purchases_svc import flush, waiting
from purchases_svc.admission import SHARE_SALES_MIN, Turns
from purchases_svc.answers import Recorded
from purchases_svc.backlog import Backlog
from purchases_svc.entry import Call, Entry
from purchases_svc.errors import CustomerUnknown
from purchases_svc.partitions import Partitions
from purchases_svc.record import Recorder
from purchases_svc.sale import JournalEntry, Purchase, Sale
from purchases_svc.settings import ServeSettings
from purchases_svc.writing import AT_A_TILL
from tests.conftest import WAIT_S, eventually, pool
from tests.faults.proxy import Loop, Proxy
from tests.integration.purchase_events import query
from tests.integration.purchases.test_create_purchase import assert_whole, count, stored_sale

NAME = "isolation"


@asynccontextmanager
async def recording(url: str, flush_timeout_s: float = 30.0, **limits: int) -> AsyncIterator[Recorder]:
    """A recorder with its pool as the service has it."""
    async with postgres.open_pool(
        url,
        role="purchases_service",
        application_name=NAME,
        size=flush.CONNECTIONS,
        statement_timeout_s=60,
        settings=flush.LOCK_TIMEOUT,
    ) as opened:
        await opened.wait(timeout=WAIT_S)
        partitions = Partitions(opened)
        await partitions.look_ahead()
        most: dict[str, Any] = {"waiting_max": 20_000, "waiting_items_max": 400_000, "batch_max": 500, **limits}
        recorder = Recorder(
            opened, partitions, Backlog(opened, 0), zone=zones.load("UTC"), flush_timeout_s=flush_timeout_s, **most
        )
        yield recorder
        await recorder.close()


def sale(**changes: Any) -> Sale:
    return stored_sale(purchase_time=datetime.now(UTC), **changes)


async def others_sell(recorder: Recorder, sales: int = 20) -> None:
    for number in range(sales):
        async with asyncio.timeout(WAIT_S):
            await recorder.record(sale(), f"till {number % 4}")


@contextmanager
def held(url: str, statement: str, *arguments: object) -> Iterator[psycopg.Connection]:
    """A transaction of somebody else that stays open."""
    with psycopg.connect(url) as connection:
        connection.execute(statement, arguments)
        yield connection


async def test_locked_customer_holds_up_only_the_sales_to_it(purchases_db: str) -> None:
    customer = str(uuid.uuid4())
    async with recording(purchases_db) as recorder:
        await recorder.record(sale(customer_id=customer, register_customer=True))
        with held(purchases_db, "SELECT FROM customers WHERE customer_id = %s FOR UPDATE", customer):
            waiting = [asyncio.create_task(recorder.record(sale(customer_id=customer))) for _ in range(3)]
            await others_sell(recorder)
            late = asyncio.create_task(recorder.record(sale(customer_id=customer)))
            await others_sell(recorder)
            assert not any(task.done() for task in (*waiting, late))
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*waiting, late)
    assert_whole(purchases_db, 45)


async def test_lock_that_stays_ends_in_an_error_that_is_worth_a_retry(purchases_db: str) -> None:
    customer = str(uuid.uuid4())
    async with recording(purchases_db, flush_timeout_s=1.0) as recorder:
        await recorder.record(sale(customer_id=customer, register_customer=True))
        lock = "SELECT FROM customers WHERE customer_id = %s FOR UPDATE"
        with held(purchases_db, lock, customer), pytest.raises(TransactionConflict):
            await recorder.record(sale(customer_id=customer))


async def test_lock_on_what_cannot_be_seen_holds_up_one_sale(purchases_db: str) -> None:
    """Somebody has inserted the same receipt number and does not commit: no row to be seen, but to be waited for."""
    blocked = sale(receipt_id="held", pos_id="POS-9")
    day = blocked.purchase_time.date()
    async with recording(purchases_db) as recorder:
        await others_sell(recorder, 1)
        insert = (
            "INSERT INTO receipts (branch_id, pos_id, business_day, receipt_id, purchase_id, purchase_time)"
            " VALUES (1, 'POS-9', %s, 'held', %s, %s)"
        )
        with held(purchases_db, insert, day, uuid.uuid4(), blocked.purchase_time) as other:
            batch = [asyncio.create_task(recorder.record(sale())) for _ in range(20)]
            waiting = asyncio.create_task(recorder.record(blocked))
            await others_sell(recorder)
            async with asyncio.timeout(WAIT_S):
                await asyncio.gather(*batch)
            assert not waiting.done()
            other.rollback()
        async with asyncio.timeout(WAIT_S):
            await waiting
    assert_whole(purchases_db, 42)


def backends(url: str) -> list[int]:
    return [pid for (pid,) in query(url, f"SELECT pid FROM pg_stat_activity WHERE application_name = '{NAME}'")]


async def test_frozen_connection_costs_one_flush(purchases_db: str) -> None:
    """A process of PostgreSQL that stands still holds up what is in its hands, and nothing else."""
    async with recording(purchases_db, flush_timeout_s=3.0) as recorder:
        await others_sell(recorder, 2)
        pids = backends(purchases_db)
        os.kill(pids[0], signal.SIGSTOP)
        try:
            tills = [asyncio.create_task(_sell_until_stored(recorder)) for _ in range(60)]
            async with asyncio.timeout(WAIT_S):
                await asyncio.gather(*tills)
        finally:
            os.kill(pids[0], signal.SIGCONT)
    assert count(purchases_db, "purchases") == 62


async def test_who_waits_on_a_frozen_connection_is_tried_on_another(purchases_db: str) -> None:
    """And is answered long before the flush's time is over: tills do not wait for so long."""
    async with recording(purchases_db, flush_timeout_s=12.0) as recorder:
        await others_sell(recorder, 2)
        frozen = backends(purchases_db)[0]
        os.kill(frozen, signal.SIGSTOP)
        try:
            async with asyncio.timeout(WAIT_S):
                await asyncio.gather(*(recorder.record(sale(), f"till {number}") for number in range(60)))
        finally:
            os.kill(frozen, signal.SIGCONT)
    assert count(purchases_db, "purchases") == 62


def test_how_soon_another_connection_is_tried() -> None:
    """The rest is for cutting off the first, and for the second try."""
    first_try_s = ServeSettings("").flush_timeout_s / AT_A_TILL
    assert first_try_s + 2 * postgres.CANCEL_TIMEOUT_S <= ATTEMPT_TIMEOUT_S - 1


async def _sell_until_stored(recorder: Recorder) -> None:
    """As a till does: the same sale with the same key, until the answer comes."""
    mine = sale()
    while True:
        try:
            await recorder.record(mine, mine.idempotency_key)
        except (TransactionConflict, psycopg.OperationalError):
            await asyncio.sleep(0.1)
        else:
            return


async def test_recorder_ends_though_its_connections_are_frozen(purchases_db: str) -> None:
    async with recording(purchases_db, flush_timeout_s=2.0) as recorder:
        pids = backends(purchases_db)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            calls = [asyncio.create_task(recorder.record(sale())) for _ in range(5)]
            await asyncio.sleep(0)  # they are taken in
            async with asyncio.timeout(WAIT_S):
                await recorder.close()
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            for call in calls:
                call.cancel()


@pytest.mark.parametrize("table", ["purchases", "purchase_items", "receipts"])
async def test_month_that_cannot_be_made_holds_up_only_its_sales(purchases_db: str, table: str) -> None:
    """ANALYZE, VACUUM or an index that is built hold such a lock on the table, for minutes if it is large."""
    old = datetime(2008, 2, 3, tzinfo=UTC)
    async with recording(purchases_db) as recorder:
        with held(purchases_db, f"LOCK TABLE {table} IN SHARE UPDATE EXCLUSIVE MODE"):
            waiting = asyncio.create_task(recorder.record(stored_sale(purchase_time=old)))
            await others_sell(recorder, 100)
            assert not waiting.done()
        async with asyncio.timeout(WAIT_S):
            await waiting


async def test_analyze_stops_no_sale_of_a_month_that_is_there(purchases_db: str) -> None:
    """What remains: a sale of a month that nobody has sold in yet waits, and is told to come again."""
    old = datetime(2008, 2, 3, tzinfo=UTC)
    tables = ("purchases", "purchase_items", "receipts", "idempotency_keys", "customers", "outbox_events")
    async with recording(purchases_db, flush_timeout_s=4.0) as recorder:
        await others_sell(recorder, 1)
        for table in tables:
            with held(purchases_db, f"ANALYZE {table}"):  # with its partitions, until the transaction ends
                await others_sell(recorder)
        with held(purchases_db, "ANALYZE purchases"), pytest.raises(TransactionConflict):
            await recorder.record(stored_sale(purchase_time=old))
        await recorder.record(stored_sale(purchase_time=old))
    assert_whole(purchases_db, 2 + 20 * len(tables))


async def test_repeats_of_a_refused_key_share_the_refusal(purchases_db: str) -> None:
    """As many as distinct sales would fit into as many flushes; they take no more of them."""
    refused = sale(customer_id=str(uuid.uuid4()))
    async with recording(purchases_db) as recorder:
        before = flush.FLUSHES._value.get()
        calls = [recorder.record(refused, f"till {number}") for number in range(2_000)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(outcome, CustomerUnknown) for outcome in outcomes)
        assert flush.FLUSHES._value.get() - before <= 2_000 / 500 + 2


async def test_repeat_with_other_content_gets_its_own_chance(purchases_db: str) -> None:
    refused = sale(customer_id=str(uuid.uuid4()))
    good = refused._replace(customer_id=None)
    async with recording(purchases_db) as recorder:
        outcomes = await asyncio.gather(*map(recorder.record, [refused, good, refused, good]), return_exceptions=True)
    assert [type(outcome).__name__ for outcome in outcomes] == [
        "CustomerUnknown",
        "Recorded",
        "CustomerUnknown",
        "Recorded",
    ]
    assert [outcome.replayed for outcome in outcomes if isinstance(outcome, Recorded)] == [False, True]
    assert_whole(purchases_db, 1)


async def test_one_caller_cannot_fill_the_room_of_all(purchases_db: str) -> None:
    """A flood is refused at a tenth of what may wait; whoever else comes gets in."""
    async with recording(purchases_db) as recorder:
        flood = [asyncio.create_task(recorder.record(sale(), "flood")) for _ in range(2_500)]
        await others_sell(recorder, 4)
        outcomes = await asyncio.gather(*flood, return_exceptions=True)
    refused = sum(isinstance(outcome, Overloaded) for outcome in outcomes)
    assert refused == 500
    assert count(purchases_db, "purchases") == 2_004


async def test_what_comes_by_the_hundred_goes_in_small_flushes_beside_live_sales(
    purchases_db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have the same processors as the flushes of sales at tills."""
    monkeypatch.setattr(waiting, "EXPECTED_S", WAIT_S)
    async with recording(purchases_db) as recorder:
        await recorder.record(sale(), "till")
        async with asyncio.TaskGroup() as tasks:
            backlog = tasks.create_task(recorder.record_all([sale() for _ in range(500)], "backlog"))
            while not backlog.done():
                await recorder.record(sale(), "till")
        assert all(isinstance(outcome, Recorded) for outcome in backlog.result())
    flushes = [sales for (sales,) in query(purchases_db, "SELECT count(*) FROM purchases GROUP BY xmin::text")]
    assert sum(flushes) > 500
    assert max(flushes) <= waiting.BULK_BESIDE_LIVE


async def test_half_of_the_time_is_left_to_sales_at_tills(purchases_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backlog pauses after each flush for as long as that took, while somebody may come to a till."""
    monkeypatch.setattr(waiting, "EXPECTED_S", WAIT_S)
    monkeypatch.setattr(flush, "SLOW_FLUSH_S", WAIT_S)
    taken: list[tuple[float, float]] = []
    async with recording(purchases_db) as recorder:
        store, clock = recorder._flushes._flush, asyncio.get_running_loop().time

        async def timed(batch: list[Entry], until: float) -> None:
            began = clock()
            await store(batch, until)
            taken.append((began, clock()))

        await recorder.record(sale(), "till")
        monkeypatch.setattr(recorder._flushes, "_flush", timed)
        await recorder.record_all([sale() for _ in range(100)], "backlog")
    assert len(taken) == 100 / waiting.BULK_BESIDE_LIVE
    for (began, ended), (following, _) in pairwise(taken):
        assert following - ended > 0.9 * (ended - began)


async def test_what_a_journal_kept_is_no_sale_at_a_till(purchases_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few of them come at once: tills that were offline bring them a handful at a time, and many tills do."""
    monkeypatch.setattr(waiting, "EXPECTED_S", WAIT_S)
    begin, epoch = datetime.now(UTC) - timedelta(hours=1), str(uuid.uuid4())

    def kept(number: int) -> Sale:
        moment = begin + timedelta(seconds=number)
        return sale()._replace(purchase_time=moment, journal=JournalEntry(epoch, number, None))

    async with recording(purchases_db) as recorder:
        await recorder.record(sale(), "till")
        async with asyncio.TaskGroup() as tasks:
            drains = [tasks.create_task(recorder.record(kept(n), f"till {n}")) for n in range(1, 301)]
            while not all(task.done() for task in drains):
                await recorder.record(sale(), "till")
    flushes = query(
        purchases_db,
        f"SELECT count(*), count(DISTINCT purchase_time < '{begin + timedelta(minutes=10)}') FROM purchases"
        " GROUP BY xmin::text",
    )
    assert max(sales for sales, _ in flushes) <= waiting.BULK_BESIDE_LIVE
    assert {kinds for _, kinds in flushes} == {1}  # nobody at a till goes with them


@pytest.mark.parametrize(
    ("age_s", "offset_ms", "kept"),
    [
        (0, None, False),
        (59, None, False),
        (61, None, True),
        (3 * 86_400, 3 * 86_400_000, False),  # its till's clock is three days behind
        (0, -86_400_000, True),  # a day ahead: it was sold yesterday
        (0, 1 << 62, False),
        (0, -(1 << 62), True),
    ],
)
def test_which_sales_were_kept_in_a_journal(age_s: float, offset_ms: int | None, kept: bool) -> None:
    now = datetime.now(UTC)
    sold = sale()._replace(purchase_time=now - timedelta(seconds=age_s))
    assert not sold.was_kept(now)
    assert sold._replace(journal=JournalEntry(str(uuid.uuid4()), 1, offset_ms)).was_kept(now) is kept


async def test_a_caller_has_a_share_of_each_flush_beside_others(
    purchases_db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of repeats of one key: they are answered together, while all others wait."""
    monkeypatch.setattr(waiting, "EXPECTED_S", WAIT_S)
    async with recording(purchases_db) as recorder:
        for caller in ("till", "flood"):
            await recorder.record(sale(), caller)
        flood = [asyncio.create_task(recorder.record(sale(), "flood")) for _ in range(200)]
        await asyncio.gather(*flood)
        answered = flush.FLUSHED._value.get()
        refused = sale(customer_id=str(uuid.uuid4()))
        repeats = [asyncio.create_task(recorder.record(refused, "flood")) for _ in range(200)]
        await recorder.record(sale(), "till")
        assert flush.FLUSHED._value.get() - answered <= 2
        assert sum(task.done() for task in repeats) <= 2 * waiting.LIVE_OF_CALLER_BESIDE_OTHERS
        await asyncio.gather(*repeats, return_exceptions=True)
    flushes = [sales for (sales,) in query(purchases_db, "SELECT count(*) FROM purchases GROUP BY xmin::text")]
    assert sum(flushes) == 203
    assert max(flushes) <= waiting.LIVE_OF_CALLER_BESIDE_OTHERS


async def test_without_live_sales_flushes_are_full(purchases_db: str) -> None:
    async with recording(purchases_db) as recorder:
        await recorder.record_all([sale() for _ in range(500)], "backlog")
    assert query(purchases_db, "SELECT count(*) FROM purchases GROUP BY xmin::text") == [(500,)]


def test_callers_take_turns() -> None:
    loop = asyncio.new_event_loop()
    try:
        turns = Turns()

        async def fill() -> None:
            flood, other = Call("flood", 100), Call("other", 2)
            for place in range(100):
                turns.put(_entry(flood, place))
            for place in range(2):
                turns.put(_entry(other, place))

        loop.run_until_complete(fill())
        assert [turns.take().caller for _ in range(6)] == ["flood", "other", "flood", "other", "flood", "flood"]
        assert sum(1 for _ in iter(lambda: bool(turns) and turns.take(), False)) == 96
    finally:
        loop.close()


def _entry(call: Call, place: int) -> Entry:
    now = datetime.now(UTC)
    return Entry(Purchase(str(uuid.uuid4()), str(uuid.uuid4()), now, now.date(), sale()), call, place)


def test_share_holds_what_an_upload_has_in_flight() -> None:
    assert SHARE_SALES_MIN == 2 * 500


async def test_connection_comes_back_while_its_caller_waits(purchases_db: str) -> None:
    """Nobody tells a pool that the server is back: who waits for a connection asks again and again."""
    loop = Loop()
    url = psycopg.conninfo.conninfo_to_dict(purchases_db)
    proxy = Proxy(loop, "database", (str(url["host"]), int(str(url["port"]))))
    try:
        through = psycopg.conninfo.make_conninfo(purchases_db, host="127.0.0.1", port=proxy.port)
        async with pool(through, "purchases_service", 1) as opened:
            proxy.refuse(True)
            waiting = asyncio.create_task(opened.getconn(timeout=WAIT_S))

            async def has_failed() -> bool:
                return opened.get_stats().get("connections_errors", 0) >= 2

            await eventually(has_failed, "attempts to connect go on while somebody waits")
            proxy.refuse(False)
            async with asyncio.timeout(WAIT_S / 2):
                await opened.putconn(await waiting)
    finally:
        proxy.close()
        loop.close()
