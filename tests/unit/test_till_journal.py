"""A till's journal: what it keeps, what it refuses, what it says. How it meets a failing disk: test_journal_disk.py."""

import datetime
import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pos.client import Item
from pos.errors import InvalidSale
from pos.journal import (
    Journal,
    JournalDamaged,
    JournalError,
    JournalFull,
    JournalLocked,
    JournalOfAnotherTill,
    JournalTooNew,
    Limits,
    Resolution,
)
from pos.journal.rows import MIGRATIONS, Settled, State
from pos.journal.store import Store

NOON = datetime.datetime(2026, 10, 24, 12, 0, tzinfo=datetime.UTC)  # the day before clocks are set back in Berlin
BASKET = [Item(1001, 890), Item(2007, 12470)]


class Clock:
    """What the till takes for the time."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime.datetime:
        return self.now

    def turn(self, **by: float) -> None:
        self.now += datetime.timedelta(**by)


@pytest.fixture
def clock() -> Clock:
    return Clock()


Open = Callable[..., Journal]


@pytest.fixture
def opened(tmp_path: Path, clock: Clock) -> Open:
    return lambda **options: Journal(
        tmp_path / "till", branch_id=1, pos_id="POS-3", now=clock, zone=ZoneInfo("Europe/Berlin"), **options
    )


def settle(journal: Journal, *settled: Settled) -> None:
    journal._store.settle(settled, now=NOON.isoformat(timespec="microseconds"))


def test_a_receipt_is_what_the_disk_has(opened: Open) -> None:
    """Numbers and keys are made once; a journal that is opened again goes on with the next."""
    with opened() as journal:
        first = journal.record_sale(BASKET, cashier_id=17, customer_id="7f0c1b1e-6f0c-4f0e-9d43-5d8a4e1f2a3b")
        second = journal.record_sale(BASKET, cashier_id=17)
    with opened() as journal:
        third = journal.record_sale(BASKET, cashier_id=17)
        status = journal.status()
        assert status.last == third and status.waiting == 3 and status.waiting_cents == 3 * 13360
        assert status.oldest_waiting == NOON and not status.warnings
        assert journal.verify() == []
    numbers = [receipt.receipt_id for receipt in (first, second, third)]
    assert [number[5:] for number in numbers] == ["000001", "000002", "000003"]
    assert len({number[:4] for number in numbers}) == 1
    assert len({receipt.sale.idempotency_key for receipt in (first, second, third)}) == 3
    assert first.sale.purchase_time == NOON and first.sale.total_cents == 13360


def test_what_cannot_be_sent_is_not_recorded(opened: Open) -> None:
    with opened() as journal:
        with pytest.raises(InvalidSale, match="items"):
            journal.record_sale([Item(1001, 8.90)], cashier_id=17)  # type: ignore[arg-type]
        with pytest.raises(InvalidSale, match="customer_id"):
            journal.record_sale(BASKET, cashier_id=17, customer_id=3)  # type: ignore[arg-type]
        assert journal.status().waiting == 0
        assert journal.record_sale(BASKET, cashier_id=17).sequence == 1


def test_one_opens_it(opened: Open, tmp_path: Path) -> None:
    with opened(), pytest.raises(JournalLocked, match="another process has the journal open: process"):
        opened()
    journal = opened()
    journal.close()
    journal.close()
    with pytest.raises(JournalError, match="closed"):
        journal.record_sale(BASKET, cashier_id=17)
    with pytest.raises(JournalOfAnotherTill, match="branch 1, till POS-3"):
        Journal(tmp_path / "till", branch_id=1, pos_id="POS-4")


def test_what_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "journal.db") as other:
        other.execute("CREATE TABLE things (it text)")
    other.close()
    with pytest.raises(JournalOfAnotherTill, match="no till's journal"):
        Journal(tmp_path, branch_id=1, pos_id="POS-3")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "journal.db").write_text("these are no pages of a database, however long they go on" * 40)
    with pytest.raises(JournalDamaged):
        Journal(tmp_path / "text", branch_id=1, pos_id="POS-3")


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        (Limits(sales=10), "10 sales"),
        (Limits(amount_cents=10 * 13360), "1,336 of amount"),
        (Limits(free_bytes=1 << 60), "the disk has less than"),
    ],
)
def test_limits(limits: Limits, named: str, opened: Open) -> None:
    """Warned of from 80 % on; then nothing is recorded until what waits is sent."""
    with opened(limits=limits) as journal:
        warned = []
        if "disk" not in named:
            warned = [bool(journal.record_sale(BASKET, cashier_id=17).warnings) for _ in range(10)]
        with pytest.raises(JournalFull, match=named):
            journal.record_sale(BASKET, cashier_id=17)
        if "disk" in named:
            return
        assert warned == [False] * 7 + [True] * 3
        assert journal.status().warnings and journal.status().used == 1.0
        settle(journal, *(Settled(n, State.STORED) for n in range(1, 11)))
        assert not journal.record_sale(BASKET, cashier_id=17).warnings


def test_limit_of_bytes(opened: Open) -> None:
    """Of a small file; with the disk's room in it again after what was stored long ago is gone."""
    with opened(limits=Limits(bytes=40_000)) as journal:
        while journal.status().used <= 1:
            journal.record_sale(BASKET, cashier_id=17)
        with pytest.raises(JournalFull, match="MiB"):
            journal.record_sale(BASKET, cashier_id=17)
        settle(journal, *(Settled(n, State.STORED) for n in range(1, 200)))
        journal._store.forget("2027-01-01")
        assert journal.verify() == []
        journal.record_sale(BASKET, cashier_id=17)


def test_age_is_not_what_a_clock_says(opened: Open, clock: Clock) -> None:
    """Within one start of the machine the age is measured, so that a clock that is set right stops nobody."""
    with opened(limits=Limits(age=datetime.timedelta(days=1))) as journal:
        journal.record_sale(BASKET, cashier_id=17)
        clock.turn(days=30)
        journal.record_sale(BASKET, cashier_id=17)
        with sqlite3.connect(journal._directory / "journal.db") as file:  # as if the machine had been started again
            file.execute("UPDATE journal SET boot_id = 'another'")
        file.close()
        with pytest.raises(JournalFull, match="1 day, 0:00:00 of age"):
            journal.record_sale(BASKET, cashier_id=17)


def test_clocks_that_are_wrong(opened: Open, clock: Clock) -> None:
    """Three days back, a day ahead, over the hour that comes twice: each sale keeps its time and its day, no number is
    given twice, and somebody is told.
    """
    with opened() as journal:
        receipts = [journal.record_sale(BASKET, cashier_id=17)]
        clock.turn(days=-3)
        back = journal.record_sale(BASKET, cashier_id=17)
        assert any("clock went back" in text for text in back.warnings)
        clock.turn(days=4)
        receipts += [back, journal.record_sale(BASKET, cashier_id=17)]
        clock.now = datetime.datetime(2026, 10, 25, 0, 30, tzinfo=datetime.UTC)  # 02:30 in Berlin, for the first time
        receipts.append(journal.record_sale(BASKET, cashier_id=17))
        clock.turn(hours=1)  # 02:30 again
        receipts.append(journal.record_sale(BASKET, cashier_id=17))
        clock.now = datetime.datetime(2026, 10, 25, 22, 59, 59, tzinfo=datetime.UTC)
        receipts.append(journal.record_sale(BASKET, cashier_id=17))
        clock.turn(seconds=1)  # midnight in Berlin, an hour later than the day before
        receipts.append(journal.record_sale(BASKET, cashier_id=17))
        days = [receipt.business_date.isoformat()[5:] for receipt in receipts if receipt.business_date]
        assert days == ["10-24", "10-21", "10-25", "10-25", "10-25", "10-25", "10-26"]
        assert len({receipt.receipt_id for receipt in receipts}) == len(receipts)
        assert len({receipt.sale.purchase_time for receipt in receipts}) == len(receipts)
        assert journal.verify() == []


def test_refused_sales_wait_for_somebody(opened: Open) -> None:
    with opened() as journal:
        for _ in range(3):
            journal.record_sale(BASKET, cashier_id=17)
        settle(journal, *(Settled(n, State.REFUSED, "RECEIPT_EXISTS: taken") for n in (1, 2, 3)))
        assert [each.sequence for each in journal.refused()] == [1, 2, 3]
        assert journal.status().refused == 3
        assert "refused wait for somebody to look at them: 3" in journal.status().warnings[-1]
        before = journal.refused()[0].sale
        assert journal.resolve(1, Resolution.SEND_AGAIN, note="kim: the month is open now") is None
        new = journal.resolve(2, Resolution.NEW_NUMBER, note="kim: cloned till")
        journal.resolve(3, Resolution.CLOSE, note="kim: entered by hand")
        with pytest.raises(KeyError):
            journal.resolve(3, Resolution.CLOSE, note="once more")
        waiting = journal._store.rows([State.WAITING])
        assert [row.sequence for row in waiting] == [1, 4] and new is not None and new.sequence == 4
        assert waiting[0].idempotency_key == before.idempotency_key
        assert new.sale.items == before.items and new.sale.purchase_time == before.purchase_time
        assert journal.status().refused == 0 and journal.verify() == []


def test_export(opened: Open, tmp_path: Path) -> None:
    with opened() as journal:
        receipt = journal.record_sale(BASKET, cashier_id=17)
        assert journal.export(tmp_path / "out.jsonl") == 1
    (line,) = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert line["payload"]["idempotency_key"] == receipt.sale.idempotency_key
    assert (line["state"], line["receipt_id"], line["amount_cents"]) == ("waiting", receipt.receipt_id, 13360)
    assert list(tmp_path.glob("*.part")) == []


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE journal SET payload = CAST(replace(payload, '890', '990') AS BLOB) WHERE sequence = 2",
        "UPDATE journal SET amount_cents = amount_cents + 1 WHERE sequence = 2",
        "UPDATE journal SET device_time = '2026-01-01' WHERE sequence = 1",
        "DELETE FROM journal WHERE sequence = 2",
        "DELETE FROM journal WHERE sequence = 3",
        "DELETE FROM journal WHERE sequence = 1",
        "DELETE FROM journal",
        "UPDATE journal SET idempotency_key = 'x' WHERE sequence = 3",
        "UPDATE meta SET last_hash = zeroblob(32)",
        "DELETE FROM meta",
    ],
)
def test_whatever_is_changed_is_found(change: str, opened: Open, tmp_path: Path) -> None:
    with opened() as journal:
        for _ in range(3):
            journal.record_sale(BASKET, cashier_id=17)
    with sqlite3.connect(tmp_path / "till" / "journal.db") as file:
        file.execute(change)
    file.close()
    with pytest.raises(JournalDamaged):
        opened()


def test_upgrade_with_sales_that_wait(tmp_path: Path) -> None:
    """A later version finds what waits; an earlier one refuses the file and leaves it as it is."""
    with Journal(tmp_path, branch_id=1, pos_id="POS-3") as journal:
        receipt = journal.record_sale(BASKET, cashier_id=17)
    later = (*MIGRATIONS, "ALTER TABLE meta ADD COLUMN colour TEXT; UPDATE meta SET colour = 'blue'")
    store = Store(tmp_path, branch_id=1, pos_id="POS-3", migrations=later)
    assert [row.receipt_id for row in store.rows([State.WAITING])] == [receipt.receipt_id]
    store.close()
    before = (tmp_path / "journal.db").read_bytes()
    with pytest.raises(JournalTooNew, match="install the later one again"):
        Journal(tmp_path, branch_id=1, pos_id="POS-3")
    assert (tmp_path / "journal.db").read_bytes() == before


def test_what_was_stored_long_ago_is_forgotten(opened: Open) -> None:
    """Up to the first that waits; numbers are not given again."""
    with opened() as journal:
        for _ in range(5):
            journal.record_sale(BASKET, cashier_id=17)
        settle(journal, *(Settled(n, State.STORED) for n in (1, 2, 4)))
        assert journal._store.forget("2026-10-24") == 0
        assert journal._store.forget("2026-10-25") == 2
        assert [row.sequence for row in journal._store.rows()] == [3, 4, 5] and journal.verify() == []
        settle(journal, *(Settled(n, State.STORED) for n in (3, 5)))
        assert journal._store.forget("2026-10-25") == 3 and journal.verify() == []
    with opened() as journal:
        assert journal.record_sale(BASKET, cashier_id=17).sequence == 6


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.sampled_from(["sell", "store", "refuse", "again", "forget", "epoch", "open"]), max_size=25))
def test_any_history_is_whole(steps: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever is done in whatever order: the chain holds, and no number or key is ever given again."""
    directory = tmp_path_factory.mktemp("journal")
    journal = Journal(directory, branch_id=1, pos_id="POS-3")
    numbers: list[str] = []
    for step in steps:
        store = journal._store
        waiting = [row.sequence for row in store.rows([State.WAITING], limit=2)]
        refused = [row.sequence for row in store.rows([State.REFUSED], limit=1)]
        match step:
            case "sell":
                numbers.append(journal.record_sale(BASKET, cashier_id=1).receipt_id)
            case "store":
                settle(journal, *(Settled(n, State.STORED) for n in waiting))
            case "refuse":
                settle(journal, *(Settled(n, State.REFUSED, "no") for n in waiting[:1]))
            case "again" if refused:
                receipt = journal.resolve(refused[0], Resolution.NEW_NUMBER, note="")
                assert receipt is not None
                numbers.append(receipt.receipt_id)
            case "forget":
                store.forget("2027-01-01")
            case "epoch":
                store.begin_epoch(store.meta().next_sequence + 3, "a test")
            case "open":
                journal.close()
                journal = Journal(directory, branch_id=1, pos_id="POS-3")
    assert journal.verify() == []
    assert len(set(numbers)) == len(numbers)
    assert len({number[5:] for number in numbers}) == len(numbers)
    journal.close()


class Doubts(set[str]):
    """Before a sale is in doubt no more, somebody looks into the journal, and waits for nothing but the journal."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.look = threading.Thread(target=store.rows)

    def discard(self, element: object) -> None:
        self.look.start()
        self.look.join(0.2)
        super().discard(element)


def test_a_sale_that_is_on_the_disk_is_made_void_by_nobody(opened: Open) -> None:
    """Whoever comes at the very moment between its commit and its receipt: what a flush would not send is lost."""
    with opened() as journal:
        doubts = journal._store._in_doubt = Doubts(journal._store)
        receipt = journal.record_sale(BASKET, cashier_id=17)
        doubts.look.join()
        assert [(row.receipt_id, row.state) for row in journal._store.rows()] == [(receipt.receipt_id, State.WAITING)]
