"""A till's journal against a real service: what was recorded is stored, once, whatever happens meanwhile."""

import asyncio
import datetime
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psycopg
import pytest

from pos.client import Item, PosClient, Sale, connect
from pos.journal import Flushed, Journal, Receipt, Resolution
from tests.integration.conftest import free_address

BASKET = [Item(1001, 890), Item(2007, 12470)]
WITHIN_S = 30.0


@pytest.fixture
def client(purchases_address: str) -> Iterator[PosClient]:
    with connect(purchases_address) as channel:
        yield PosClient(channel)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "till", branch_id=1, pos_id="POS-3") as opened:
        yield opened


def stored(database: str) -> dict[str, tuple[str, int]]:
    """Receipt number and cents of what the service has, by key."""
    with psycopg.connect(database) as connection:
        rows = connection.execute(
            "SELECT idempotency_key::text, receipt_id, (100 * total_amount)::bigint FROM purchases"
        ).fetchall()
    assert len({key for key, _, _ in rows}) == len(rows)
    return {key: (receipt_id, cents) for key, receipt_id, cents in rows}


def given(receipts: list[Receipt]) -> dict[str, tuple[str, int]]:
    return {each.sale.idempotency_key: (each.receipt_id, each.sale.total_cents) for each in receipts}


async def flush(journal: Journal, client: PosClient, within_s: float = WITHIN_S) -> Flushed:
    return await asyncio.to_thread(journal.flush, client, within_s=within_s)


async def test_what_waits_is_stored_once(
    journal: Journal, client: PosClient, purchases_channel: grpc.aio.Channel, purchases_db: str
) -> None:
    customer = "7f0c1b1e-6f0c-4f0e-9d43-5d8a4e1f2a3b"
    receipts = [journal.record_sale(BASKET, cashier_id=17, customer_id=customer) for _ in range(30)]
    assert await flush(journal, client) == Flushed(30, 0, 0, None)
    assert await flush(journal, client) == Flushed(0, 0, 0, None)
    assert stored(purchases_db) == given(receipts)
    status = journal.status()
    assert status.waiting == 0 and status.clock_offset is not None
    assert abs(status.clock_offset) < datetime.timedelta(seconds=WITHIN_S)


async def test_a_refused_sale_holds_up_no_other(
    journal: Journal, client: PosClient, purchases_channel: grpc.aio.Channel, purchases_db: str
) -> None:
    """It waits for somebody; under another number, it is stored as well."""
    first = journal.record_sale(BASKET, cashier_id=17)
    rival = Sale(receipt_id=first.receipt_id, branch_id=1, cashier_id=17, pos_id="POS-3", items=BASKET)
    await asyncio.to_thread(client.create_purchase, rival)
    wrong = journal.record_sale(BASKET, cashier_id=0)
    unknown = journal.record_sale(
        BASKET, cashier_id=17, customer_id="7f0c1b1e-6f0c-4f0e-9d43-5d8a4e1f2a3b", register_customer=False
    )
    good = journal.record_sale(BASKET, cashier_id=17)
    assert await flush(journal, client) == Flushed(1, 3, 0, None)
    taken, invalid, customer = journal.refused()
    assert "RECEIPT_EXISTS" in taken.reason and "cashier_id" in invalid.reason
    assert "CUSTOMER_NOT_FOUND" in customer.reason
    renumbered = journal.resolve(taken.sequence, Resolution.NEW_NUMBER, note="kim")
    assert renumbered is not None
    journal.resolve(wrong.sequence, Resolution.CLOSE, note="kim: a test")
    await asyncio.to_thread(client.create_customer, "7f0c1b1e-6f0c-4f0e-9d43-5d8a4e1f2a3b")
    journal.resolve(unknown.sequence, Resolution.SEND_AGAIN, note="kim: registered")
    assert await flush(journal, client) == Flushed(2, 0, 0, None)
    expected = given([renumbered, unknown, good])
    assert stored(purchases_db) == expected | {rival.idempotency_key: (rival.receipt_id, rival.total_cents)}


async def test_without_a_network(journal: Journal) -> None:
    """Within its time it says why, and keeps everything."""
    receipt = journal.record_sale(BASKET, cashier_id=17)
    with connect(free_address()) as channel:
        started = time.monotonic()
        flushed = await flush(journal, PosClient(channel), within_s=1.5)
        assert time.monotonic() - started < 10
    assert flushed.waiting == 1 and flushed.trouble is not None
    assert journal.status().last == receipt


async def test_a_clock_that_is_ahead(
    tmp_path: Path, client: PosClient, purchases_channel: grpc.aio.Channel, purchases_db: str
) -> None:
    """A day: what was sold waits until its time has come, holds up nobody, and the next status names the offset."""
    ahead = datetime.timedelta(days=1)
    now = {"ahead": ahead}
    with Journal(
        tmp_path / "till", branch_id=1, pos_id="POS-3", now=lambda: datetime.datetime.now(datetime.UTC) + now["ahead"]
    ) as journal:
        early = journal.record_sale(BASKET, cashier_id=17)
        good = journal.record_sale(BASKET, cashier_id=17, purchase_time=datetime.datetime.now(datetime.UTC))
        flushed = await flush(journal, client, within_s=5)
        assert flushed.stored == 1 and flushed.waiting == 1 and flushed.trouble is not None
        assert flushed.trouble.status.reason == "PURCHASE_TIME_AHEAD"
        assert any("ahead of the service's" in text for text in journal.status().warnings)
        assert stored(purchases_db) == given([good])
        assert journal.refused() == [] and journal.status().last is not None
        now["ahead"] = datetime.timedelta()  # somebody sets the clock; the sale keeps the time that it was given
        assert any("went back" in text for text in journal.record_sale(BASKET, cashier_id=17).warnings)
        assert (await flush(journal, client, within_s=5)).stored == 1
        assert early.sale.idempotency_key not in stored(purchases_db)


async def test_a_clock_that_is_behind(
    tmp_path: Path, client: PosClient, purchases_channel: grpc.aio.Channel, purchases_db: str
) -> None:
    behind = datetime.timedelta(days=3)
    with Journal(
        tmp_path / "till", branch_id=1, pos_id="POS-3", now=lambda: datetime.datetime.now(datetime.UTC) - behind
    ) as journal:
        receipt = journal.record_sale(BASKET, cashier_id=17)
        assert (await flush(journal, client)).stored == 1
        assert stored(purchases_db) == given([receipt])
        offset = journal.status().clock_offset
        assert offset is not None and abs(offset - behind) < datetime.timedelta(minutes=1)
        assert "behind the service's" in journal.status().warnings[0]
