"""Months past their retention: dropped whole, and never with an event that is not sent."""

import asyncio
import datetime
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator

import psycopg
import pytest

from chassis import lifecycle
from chassis.postgres import Pool
from purchases_svc import retention, tills
from purchases_svc.answers import Recorded
from purchases_svc.backlog import Backlog
from purchases_svc.errors import OutboxFull, PurchaseTimeOutOfRange
from purchases_svc.partitions import Partitions
from purchases_svc.sale import JournalEntry, Sale
from tests.conftest import WAIT_S, eventually, pool, today
from tests.integration.purchases.test_create_purchase import assert_whole, count, make_recorder, stored_sale

pytestmark = pytest.mark.usefixtures("one_day")


def month_ago(months: int) -> datetime.datetime:
    """Noon on the second day of a month in the past: far from its edges."""
    first = retention.horizon(months, today()) if months else today().replace(day=1)
    assert first
    return datetime.datetime.combine(first.replace(day=2), datetime.time(12), datetime.UTC)


def old_sale(months: int) -> Sale:
    return stored_sale(purchase_time=month_ago(months))


@pytest.fixture
async def opened(purchases_db: str) -> AsyncIterator[Pool]:
    async with pool(purchases_db, "purchases_service", size=4) as service:
        yield service


async def record(opened: Pool, *sales: Sale) -> None:
    recorder = make_recorder(opened, Partitions(opened))
    for outcome in await recorder.record_all(sales):
        assert not isinstance(outcome, Exception), outcome


def mark_sent(url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("UPDATE outbox_events SET status = 'SENT'")


def keep(url: str, months: int) -> None:
    """The owner decides."""
    with psycopg.connect(url) as connection:
        connection.execute("UPDATE chain_settings SET keep_months = %s", [months])


async def drop(opened: Pool, keep_months: int) -> list[datetime.date]:
    assert isinstance(opened.conninfo, str)
    keep(opened.conninfo, keep_months)
    return await retention.drop_old_months(opened)


async def test_old_months_go_and_young_ones_stay(opened: Pool, purchases_db: str) -> None:
    """Of a month past its retention nothing is left, of the others everything; a second run finds nothing to do."""
    await record(opened, *(old_sale(months) for months in (0, 1, 3, 4, 4)))
    mark_sent(purchases_db)
    assert await drop(opened, 3) == [month_ago(4).date().replace(day=1)]
    assert await drop(opened, 3) == []
    for table in ("purchases", "idempotency_keys", "purchase_items"):
        assert count(purchases_db, table) == 3, table
    assert await drop(opened, 1) == [month_ago(3).date().replace(day=1)]
    with psycopg.connect(purchases_db) as connection:
        connection.execute("DELETE FROM outbox_events WHERE aggregate_id NOT IN (SELECT purchase_id FROM purchases)")
        connection.execute("DELETE FROM receipts WHERE purchase_id NOT IN (SELECT purchase_id FROM purchases)")
    assert_whole(purchases_db, 2)


async def test_closed_month_replays_what_it_has(opened: Pool, purchases_db: str) -> None:
    """A month that cannot be dropped yet takes in nothing new and answers retries, whoever is asked."""
    known = old_sale(5)
    await record(opened, known)
    before = make_recorder(opened, Partitions(opened))
    await before.record(known)  # it counts on the month
    keep(purchases_db, 3)
    async with opened.connection() as connection:
        await connection.execute("SELECT close_purchases_month(%s)", [month_ago(5).date().replace(day=1)])
        cursor = await connection.execute("SELECT drop_purchases_month(%s)", [month_ago(5).date().replace(day=1)])
        assert await cursor.fetchone() == ("some of its events are NEW",)
    for recorder in (before, make_recorder(opened, Partitions(opened))):
        refused, replayed = await recorder.record_all([old_sale(5), known])
        assert isinstance(refused, PurchaseTimeOutOfRange)
        assert isinstance(replayed, Recorded)
        assert replayed.replayed
    assert_whole(purchases_db, 1)


async def test_unsent_events_keep_their_month(opened: Pool, purchases_db: str) -> None:
    """A month with an event that is NEW or FAILED stays, whole, however old it is."""
    await record(opened, old_sale(5), old_sale(6))
    with psycopg.connect(purchases_db) as connection:
        connection.execute("UPDATE outbox_events SET status = 'FAILED', next_attempt_at = 'infinity'"
                           " WHERE event_id = (SELECT min(event_id::text)::uuid FROM outbox_events)")  # fmt: skip
    assert await drop(opened, 3) == []
    assert_whole(purchases_db, 2)


async def test_sale_that_commits_while_retention_looks(opened: Pool, purchases_db: str) -> None:
    """The month is locked before it is looked at: an open transaction with a new sale in it keeps it."""
    await record(opened, old_sale(5))
    mark_sent(purchases_db)
    old = month_ago(5)
    with psycopg.connect(purchases_db) as writer:
        writer.execute(
            "INSERT INTO purchases (purchase_id, purchase_time, business_day, receipt_id, idempotency_key,"
            " branch_id, cashier_id, pos_id, total_amount, item_count, event_id)"
            " VALUES (gen_random_uuid(), %s, %s, 'R', gen_random_uuid(), 1, 1, 'P', 5, 1, gen_random_uuid())",
            [old, old.date()],
        )
        assert await drop(opened, 3) == []  # it waits a second for the lock, not longer
        writer.commit()
    assert count(purchases_db, "purchases") == 2


async def test_sales_past_the_retention_are_refused(opened: Pool) -> None:
    """What retention may drop takes in no new sale: with its key gone, it could come twice. A known one is replayed."""
    known = old_sale(5)
    await record(opened, known)
    recorder = make_recorder(opened, Partitions(opened), retention_months=lambda: 3)
    assert (await recorder.record(known)).replayed
    with pytest.raises(PurchaseTimeOutOfRange):
        await recorder.record(old_sale(4))
    assert not (await recorder.record(old_sale(3))).replayed


async def test_dropped_month_stays_closed(opened: Pool, purchases_db: str) -> None:
    """What was dropped takes in no sale, whatever retention a process knows of: it could come in twice."""
    await record(opened, old_sale(5))
    mark_sent(purchases_db)
    assert len(await drop(opened, 3)) == 1
    recorder = make_recorder(opened, Partitions(opened))
    with pytest.raises(PurchaseTimeOutOfRange):
        await recorder.record(old_sale(5))
    assert not (await recorder.record(old_sale(4))).replayed


async def test_month_dropped_while_somebody_waits_to_make_it(opened: Pool, purchases_db: str) -> None:
    """Who wants a month and waits for the lock, while it is dropped, does not make it anew: its keys are gone."""
    await record(opened, old_sale(5))
    mark_sent(purchases_db)
    month = month_ago(5).date().replace(day=1)
    keep(purchases_db, 3)
    with psycopg.connect(purchases_db) as dropping, psycopg.connect(purchases_db, autocommit=True) as watching:
        dropping.execute("SELECT close_purchases_month(%s)", [month])  # takes the lock
        making = asyncio.ensure_future(Partitions(opened).ensure([month], []))

        async def waits() -> bool:
            waiting = "SELECT FROM pg_locks WHERE relation = 'months_lock'::regclass AND NOT granted"
            return bool(watching.execute(waiting).fetchall())

        await eventually(waits, "somebody waits for the lock")
        assert dropping.execute("SELECT drop_purchases_month(%s)", [month]).fetchone() == (None,)
        dropping.commit()
        with pytest.raises(psycopg.errors.DatetimeFieldOverflow):
            await making
    assert month not in {each.month for each in await retention.months(opened)}


@pytest.mark.parametrize("keep_months", [0, 3])
async def test_functions_refuse_months_that_are_kept(opened: Pool, purchases_db: str, keep_months: int) -> None:
    """The service's login closes and drops no month that the owner keeps, whatever it asks; nor does it decide that."""
    await record(opened, *(old_sale(months) for months in (0, 2, 3)))
    mark_sent(purchases_db)
    keep(purchases_db, keep_months)
    kept = [str(month_ago(months).date().replace(day=1)) for months in (0, 2, 3, 5)][: 3 if keep_months else 4]
    async with opened.connection() as connection:
        for month in [*kept, *(f"{month} BC" for month in kept), kept[0][:-1] + "2", "infinity", "-infinity", None]:
            for function in ("close_purchases_month", "drop_purchases_month"):
                with pytest.raises(psycopg.errors.InvalidParameterValue):
                    await connection.execute(f"SELECT {function}(%s)", [month])
            cursor = await connection.execute("SELECT delete_keys_of_dropped_month(%s, NULL, 10)", [month])
            assert await cursor.fetchone() == (None,)  # it is not dropped
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await connection.execute("UPDATE chain_settings SET keep_months = 1")
    assert_whole(purchases_db, 3)


async def test_full_outbox_refuses_sales(opened: Pool, purchases_db: str) -> None:
    """With too many events waiting, sales are refused with a pause to keep; when they are gone, sales are taken."""
    await record(opened, *(stored_sale(idempotency_key=str(uuid.uuid4())) for _ in range(5)))
    backlog = Backlog(opened, 5)
    async with lifecycle.beside(backlog.watch()):
        recorder = make_recorder(opened, Partitions(opened), backlog=backlog)
        await eventually(lambda: _is(backlog, full=True), "the outbox is full")
        with pytest.raises(OutboxFull):
            await recorder.record(stored_sale())
        mark_sent(purchases_db)
        await eventually(lambda: _is(backlog, full=False), "the outbox has room")
        assert not (await recorder.record(stored_sale())).replayed


async def test_one_counts_what_waits_and_the_others_read_it(opened: Pool, purchases_db: str) -> None:
    """While the last count is young, for what it cost, or somebody counts, nobody else does; then one of them."""
    await record(opened, *(stored_sale(idempotency_key=str(uuid.uuid4())) for _ in range(5)))
    backlogs = [Backlog(opened, most) for most in (4, 100)]

    async def look() -> list[int]:
        return [await backlog.look() for backlog in backlogs]

    def store(counted: str) -> None:
        with psycopg.connect(purchases_db) as connection:
            connection.execute(f"UPDATE outbox_backlog SET waiting = 70, counted_up_to = 100, {counted}")

    assert await look() == [4, 5]  # the first one had counted up to 4 only
    store("counted_at = now(), took = '0'")
    assert await look() == [4, 70]
    store("counted_at = now() - interval '1 minute', took = '1 minute'")
    assert await look() == [4, 70]
    store("counted_at = now() - interval '1 minute', took = '1 second'")
    with psycopg.connect(purchases_db) as counting:
        counting.execute("SELECT FROM outbox_backlog FOR UPDATE")
        assert await look() == [4, 70]
    assert await look() == [4, 5]
    store("counted_at = now() + interval '1 hour', took = '0'")  # a clock was set back
    assert await look() == [4, 5]


async def _is(backlog: Backlog, *, full: bool) -> bool:
    return backlog.full is full


async def _are(sales: list[Sale], at_least: int) -> bool:
    return len(sales) >= at_least


async def test_operator_sees_the_months(opened: Pool, purchases_db: str) -> None:
    """`partitions` prints each month and what retention would do, and drops nothing unless told."""
    await record(opened, old_sale(0), old_sale(5), old_sale(6))
    with psycopg.connect(purchases_db) as connection:
        connection.execute(
            "UPDATE outbox_events SET status = 'SENT' WHERE aggregate_id IN (SELECT purchase_id FROM purchases"
            " WHERE purchase_time < %s)",
            [month_ago(5) - datetime.timedelta(days=10)],
        )

    def command(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "purchases_svc", *arguments],
            env={
                "PURCHASES_DATABASE_URL": purchases_db,
                "COLUMNS": "120",
            },
            capture_output=True,
            text=True,
            check=True,
            timeout=WAIT_S,
        ).stdout

    assert "Outbox: 30 full days is kept." in await asyncio.to_thread(command, "retention")
    assert "Outbox: 60 full days" in await asyncio.to_thread(command, "retention", "--keep-outbox-days", "60")
    assert "3 full months" in await asyncio.to_thread(command, "retention", "--keep-months", "3")
    shown = await asyncio.to_thread(command, "partitions")
    lines = {line.split()[1]: line for line in shown.splitlines() if line.startswith("│")}
    assert "drop" in lines[f"{month_ago(6):%Y-%m}"]
    assert "keep: 1 events are not sent" in lines[f"{month_ago(5):%Y-%m}"]
    assert lines[f"{month_ago(0):%Y-%m}"].rstrip(" │").endswith("keep")
    assert count(purchases_db, "purchases") == 3
    await asyncio.to_thread(command, "partitions", "--drop")
    assert count(purchases_db, "purchases") == 2


async def test_interrupted_retention_goes_on(opened: Pool, purchases_db: str) -> None:
    """A month is dropped in one step; whoever dies while its keys are deleted leaves them to the next run."""
    sales = [old_sale(5) for _ in range(30)]
    await record(opened, *sales)
    mark_sent(purchases_db)
    month = month_ago(5).date().replace(day=1)
    keep(purchases_db, 3)
    async with opened.connection() as connection:  # as far as somebody came
        await connection.execute("SELECT close_purchases_month(%s)", [month])
        await connection.execute("SELECT drop_purchases_month(%s)", [month])
        await connection.execute("SELECT delete_keys_of_dropped_month(%s, NULL, 10)", [month])
    assert (count(purchases_db, "purchases"), count(purchases_db, "idempotency_keys")) == (0, 20)

    recorder = make_recorder(opened, Partitions(opened))  # which knows of no retention
    for outcome in await recorder.record_all(sales):  # with their keys and without
        assert isinstance(outcome, PurchaseTimeOutOfRange)
    taken_again = stored_sale(idempotency_key=deleted_key(purchases_db, sales), purchase_time=month_ago(0))
    assert not (await recorder.record(taken_again)).replayed

    assert await drop(opened, 3) == []
    with psycopg.connect(purchases_db) as connection_:
        left = connection_.execute("SELECT idempotency_key::text FROM idempotency_keys").fetchall()
        assert left == [(taken_again.idempotency_key,)]
        tables = connection_.execute("SELECT relname FROM pg_class WHERE relname LIKE 'dropped%'").fetchall()
        assert [name for (name,) in tables if name != "dropped_months"] == []


EPOCH, TILL = str(uuid.uuid4()), tills.Till(1, "POS-1")


def journalled(months: int, sequence: int, epoch: str = EPOCH) -> Sale:
    return old_sale(months)._replace(journal=JournalEntry(epoch, sequence, None))


async def reported(opened: Pool, last: int, *voids: int) -> tills.State:
    async with opened.connection() as connection, connection.transaction():
        return await tills.report(connection, tills.Report(TILL, EPOCH, 1, last, voids, None))


def places(url: str) -> list[int]:
    with psycopg.connect(url) as connection:
        return [n for (n,) in connection.execute("SELECT sequence FROM till_sales ORDER BY epoch, sequence")]


@pytest.mark.parametrize("at_a_time", [10_000, 1])
async def test_places_in_journals_go_with_their_month(
    opened: Pool, purchases_db: str, monkeypatch: pytest.MonkeyPatch, at_a_time: int
) -> None:
    """Only what is known of single sales: what was proven of the journal stays, and nothing is missing that was not.

    Numbers 4 and 9 never came; 3 never will. The till's clock was wrong for 11, which has to wait for the others.
    """
    monkeypatch.setattr(retention, "ROWS_PER_TRANSACTION", at_a_time)
    numbers = {1: 5, 2: 5, 5: 4, 6: 4, 7: 2, 8: 1, 10: 0, 11: 5, 12: 0}
    await record(opened, *(journalled(months, number) for number, months in numbers.items()))
    before = await reported(opened, 12, 3)
    assert before.missing == [(4, 4), (9, 9)] and before.complete_through == 3
    mark_sent(purchases_db)
    assert len(await drop(opened, 3)) == 2
    assert places(purchases_db) == [6, 7, 8, 10, 11, 12]
    after = await reported(opened, 12, 3)
    assert (after.missing, after.complete_through, after.highest_sequence) == ([(9, 9)], 8, 12)
    assert await drop(opened, 3) == []
    assert places(purchases_db) == [6, 7, 8, 10, 11, 12]
    assert len(await drop(opened, 1)) == 1
    assert places(purchases_db) == [7, 8, 10, 11, 12]


async def test_the_highest_number_of_a_journal_is_known_for_ever(opened: Pool, purchases_db: str) -> None:
    """By it an old copy of a disk is found, also one of a till that has sold nothing for years."""
    await record(opened, *(journalled(5, number) for number in (1, 2, 3)))
    await reported(opened, 2)
    await record(opened, journalled(5, 2))  # a copy's
    assert (await reported(opened, 2)).conflict_count == 1
    never_reported = str(uuid.uuid4())
    await record(opened, *(journalled(5, number, never_reported) for number in (1, 2)))
    mark_sent(purchases_db)
    assert len(await drop(opened, 3)) == 1
    async with opened.connection() as connection:
        state = await tills.state(connection, TILL, EPOCH)
        assert (state.highest_sequence, state.complete_through, state.missing) == (3, 3, [])
        assert state.conflict_count == 0
        assert (await tills.state(connection, TILL, never_reported)).missing == []
    assert count(purchases_db, "till_sales") == 1 + 2


async def test_places_of_months_that_are_kept_stay(opened: Pool, purchases_db: str) -> None:
    """Whatever is asked, by whoever has the service's login; also of a month that cannot be dropped yet."""
    await record(opened, journalled(5, 1), journalled(5, 2), journalled(4, 3), journalled(0, 4))
    await reported(opened, 4)
    async with opened.connection() as connection:
        for most in (10_000, 0, -1, None):
            cursor = await connection.execute("SELECT forget_till_places(%s)", [most])
            assert await cursor.fetchone() in ((0,), (None,))
    assert await drop(opened, 3) == []  # events are not sent
    assert places(purchases_db) == [1, 2, 3, 4]


def deleted_key(url: str, sales: list[Sale]) -> str:
    with psycopg.connect(url) as connection:
        kept = {key for (key,) in connection.execute("SELECT idempotency_key::text FROM idempotency_keys")}
    return next(sale.idempotency_key for sale in sales if sale.idempotency_key not in kept)


async def test_service_that_counts_on_a_dropped_month(opened: Pool, purchases_db: str) -> None:
    """A process that has stored sales in a month refuses more of them, once it was dropped behind its back."""
    recorder = make_recorder(opened, Partitions(opened))
    known = old_sale(5)
    await recorder.record(known)
    mark_sent(purchases_db)
    assert len(await drop(opened, 3)) == 1
    good = old_sale(0)
    refused, replayed, stored = await recorder.record_all([old_sale(5), known, good])
    assert isinstance(refused, PurchaseTimeOutOfRange)
    assert isinstance(replayed, PurchaseTimeOutOfRange)
    assert isinstance(stored, Recorded)


async def test_service_that_counts_on_a_settled_day(opened: Pool, purchases_db: str) -> None:
    """A process whose clock is at a day that was settled behind its back has it opened, and stores its sales."""
    recorder = make_recorder(opened, Partitions(opened))
    await recorder.record(old_sale(0))
    mark_sent(purchases_db)
    with psycopg.connect(purchases_db) as connection:  # no day that is settled is today, unless a clock is wrong
        connection.execute(
            f"ALTER TABLE outbox_events_{today():%Y_%m_%d} ADD CONSTRAINT settled CHECK (false) NOT VALID"
        )
        connection.execute(
            "UPDATE outbox_calendar SET settled_in = transaction_ids_realm(), last_xid = '1' WHERE day = %s", [today()]
        )
    assert isinstance(await recorder.record(old_sale(0)), Recorded)


async def test_sales_and_retention_race_for_a_month(opened: Pool, purchases_db: str) -> None:
    """Retention tries to drop a month in which sales go on: no acknowledged sale goes with its event unsent."""
    recorder = make_recorder(opened, Partitions(opened))
    stop = asyncio.Event()
    acknowledged: list[Sale] = []

    async def sell() -> None:
        while not stop.is_set():
            sale = old_sale(5)
            if not isinstance((await recorder.record_all([sale]))[0], Exception):
                acknowledged.append(sale)
            await asyncio.sleep(0)

    async def publish() -> None:
        """Only what still has its purchase: what retention took away unsent would stay."""
        async with pool(purchases_db, "postgres", size=1) as owner, owner.connection() as connection:
            while not stop.is_set():
                await connection.execute(
                    "UPDATE outbox_events SET status = 'SENT' WHERE status = 'NEW'"
                    " AND aggregate_id IN (SELECT purchase_id FROM purchases)"
                )

    working = [asyncio.ensure_future(each) for each in (sell(), sell(), publish())]
    dropped: list[datetime.date] = []
    async with asyncio.timeout(120):
        while not dropped:
            await eventually(lambda: _are(acknowledged, 50), "sales go on")
            dropped = await drop(opened, 3)
    stop.set()
    await asyncio.gather(*working)
    with psycopg.connect(purchases_db) as connection:
        events = connection.execute("SELECT status, count(*) FROM outbox_events GROUP BY 1").fetchall()
    assert events == [("SENT", len(acknowledged))]
    assert (count(purchases_db, "purchases"), count(purchases_db, "idempotency_keys")) == (0, 0)
