"""What the service can prove of a till's journal: that it has all of it, what is missing, and that a disk is a copy."""

import asyncio
import datetime
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import psycopg
import pytest

from pos.client import PosClient, TillReport, connect
from pos.errors import InvalidRequest
from pos.journal import Journal, Resolution
from purchases_svc.commands import tills as command
from purchases_svc.settings import ServeSettings
from retail.purchases.v1.purchases_service_pb2 import ListIncompleteTillsRequest
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from retail.purchases.v1.till_pb2 import IncompleteTill
from tests.integration.purchases.test_journal import BASKET, WITHIN_S, flush, given, stored
from tests.integration.sales import refusal, sale


@pytest.fixture
def client(purchases_address: str, purchases_channel: grpc.aio.Channel) -> Iterator[PosClient]:
    with connect(purchases_address) as channel:
        yield PosClient(channel)


def opened(directory: Path) -> Journal:
    return Journal(directory, branch_id=1, pos_id="POS-3")


def sell(journal: Journal, count: int) -> list[str]:
    return [journal.record_sale(BASKET, cashier_id=17).receipt_id for _ in range(count)]


async def report(client: PosClient, journal: Journal) -> None:
    """As a flush does now and then."""
    journal._reporter._next_at = 0.0
    await asyncio.to_thread(journal._reporter.report, client, WITHIN_S)


async def test_all_of_a_journal_is_proven(client: PosClient, tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        sell(journal, 12)
        assert (await flush(journal, client)).stored == 12
        (state,) = await asyncio.to_thread(client.till_states, 1, "POS-3")
        assert state.epoch == journal.status().epoch
        assert (state.complete_through, state.highest_sequence, state.reported_through) == (12, 12, 12)
        assert state.missing == () and state.missing_since is None and state.conflict_count == 0
        assert state.clock_offset_ms is None or abs(state.clock_offset_ms) < WITHIN_S * 1000
        assert await asyncio.to_thread(client.till_states, 1, "POS-4") == []


async def test_what_is_missing_is_told(client: PosClient, tmp_path: Path) -> None:
    """In the middle and at the end, until it comes, or the till says that it never will."""
    with opened(tmp_path) as journal:
        sell(journal, 3)
        journal.record_sale(BASKET, cashier_id=0)  # refused
        sell(journal, 4)
        flushed = await flush(journal, client)
        assert (flushed.stored, flushed.refused) == (7, 1)
        sell(journal, 2)
        await report(client, journal)
        (state,) = await asyncio.to_thread(client.till_states, 1, "POS-3")
        assert state.complete_through == 3 and state.missing == ((4, 4), (9, 10)) and state.missing_count == 3
        assert state.missing_since is not None
        journal.resolve(4, Resolution.CLOSE, note="kim: a test")
        assert (await flush(journal, client)).stored == 2
        await report(client, journal)
        (state,) = await asyncio.to_thread(client.till_states, 1, "POS-3")
        assert state.complete_through == 10 and state.missing == () and state.missing_since is None


async def test_a_restored_disk_is_found(client: PosClient, tmp_path: Path, purchases_db: str) -> None:
    """The image is older than what was sent: its numbers are given to nobody again, and whoever asks is told."""
    now, image = tmp_path / "now", tmp_path / "image"
    with opened(now) as journal:
        first = sell(journal, 5)
        await flush(journal, client)
    shutil.copytree(now, image)
    with opened(now) as journal:
        lost = sell(journal, 4)
        await flush(journal, client)
        await report(client, journal)
    with opened(image) as journal:
        before = journal.status().epoch
        offline = sell(journal, 1)  # before there was a network: the number of another sale
        assert offline[0] == lost[0]
        await flush(journal, client)
        assert journal.status().epoch != before
        assert any("restored from an image, or cloned" in text for text in journal.status().warnings)
        (taken,) = journal.refused()  # by day and number: nothing is counted twice, and nothing is lost
        assert "RECEIPT_EXISTS" in taken.reason
        again = journal.resolve(taken.sequence, Resolution.NEW_NUMBER, note="kim: restored")
        after = sell(journal, 3)
        assert again is not None and not {again.receipt_id, *after} & {*first, *lost}
        assert (await flush(journal, client)).stored == 4
        assert journal.verify() == []
    assert sorted(number for number, _ in stored(purchases_db).values()) == sorted(
        [*first, *lost, again.receipt_id, *after]
    )


async def test_a_cloned_till_is_found(client: PosClient, tmp_path: Path, purchases_db: str) -> None:
    """Two disks with one journal, sold on both on other days: all is recorded, and the numbers that met are told."""
    one, two = tmp_path / "one", tmp_path / "two"
    with opened(one) as journal:
        sell(journal, 3)
        await flush(journal, client)
    shutil.copytree(one, two)
    long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=3)
    with opened(one) as first, opened(two) as second:
        receipts = [first.record_sale(BASKET, cashier_id=17) for _ in range(2)]
        receipts += [second.record_sale(BASKET, cashier_id=17, purchase_time=long_ago) for _ in range(2)]
        epoch = first.status().epoch
        assert second.status().epoch == epoch
        assert (await flush(first, client)).stored == 2
        assert (await flush(second, client)).stored == 2  # it learns too late for these two
        for journal in (first, second):
            await report(client, journal)
            assert journal.status().epoch != epoch
        states = {state.epoch: state for state in await asyncio.to_thread(client.till_states, 1, "POS-3")}
        assert set(states) == {epoch, first.status().epoch, second.status().epoch}
        assert states[epoch].conflict_count == 2
        assert not set(sell(first, 2)) & set(sell(second, 2))
        assert given(receipts).items() <= stored(purchases_db).items()


async def test_operators_are_told_after_a_day(
    client: PosClient,
    tmp_path: Path,
    purchases_db: str,
    purchases_address: str,
    purchases_channel: grpc.aio.Channel,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By a command, and by whatever asks the service, such as the page for operators."""

    async def told() -> Sequence[IncompleteTill]:
        reply = await PurchasesServiceStub(purchases_channel).ListIncompleteTills(ListIncompleteTillsRequest())
        assert reply.total_size == len(reply.incomplete_tills)
        return list(reply.incomplete_tills)

    config = ServeSettings(database_url=purchases_db, listen=purchases_address, backlog_months=0)
    with opened(tmp_path) as journal:
        sell(journal, 3)
        await report(client, journal)
        assert not await command.run(config, as_json=False)
        assert await told() == []
        with psycopg.connect(purchases_db) as owner:
            owner.execute("UPDATE till_journals SET complete_since = now() - interval '25 hours'")
        assert await command.run(config, as_json=False)
        assert "POS-3" in capsys.readouterr().out
        assert await command.run(config, as_json=True)
        (till,) = await told()
        assert (till.branch_id, till.pos_id, till.epoch) == (1, "POS-3", journal.status().epoch)
        assert (till.complete_through, till.reported_through, till.conflict_count) == (0, 3, 0)
        assert till.HasField("missing_since_time") and till.HasField("report_time")
        await flush(journal, client)  # nobody has to report for it to be over
        assert not await command.run(config, as_json=False)
        assert await told() == []


async def test_broken_reports_are_refused(client: PosClient, purchases_channel: grpc.aio.Channel) -> None:
    broken = TillReport(0, "till 3", "no", 0, -2, (9,))
    with pytest.raises(InvalidRequest) as refused:
        await asyncio.to_thread(client.report_till, broken)
    assert [each.field for each in refused.value.violations] == [
        "branch_id",
        "pos_id",
        "epoch",
        "first_sequence",
        "last_sequence",
        "void_sequences",
    ]
    request = sale()
    request.journal_entry.epoch = "no"
    refused_sale = await refusal(PurchasesServiceStub(purchases_channel).CreatePurchase(request))
    assert refused_sale.fields == ["journal_entry.epoch", "journal_entry.sequence"]


async def test_a_place_is_no_part_of_the_sale(purchases_channel: grpc.aio.Channel, purchases_db: str) -> None:
    """Sent again with another one, or none, it is the same sale; without one, nothing is written of tills."""
    tills = PurchasesServiceStub(purchases_channel)
    request = sale()
    request.journal_entry.epoch, request.journal_entry.sequence = str(uuid.uuid4()), 7
    assert not (await tills.CreatePurchase(request)).replayed
    request.journal_entry.sequence = 8
    assert (await tills.CreatePurchase(request)).replayed
    request.ClearField("journal_entry")
    assert (await tills.CreatePurchase(request)).replayed
    await asyncio.gather(*(tills.CreatePurchase(sale()) for _ in range(5)))
    with psycopg.connect(purchases_db) as owner:
        assert owner.execute("SELECT sequence, purchase_id IS NOT NULL FROM till_sales").fetchall() == [(7, True)]
        assert owner.execute("SELECT count(*) FROM till_conflicts").fetchone() == (0,)
