"""A caller of a branch records for itself, finds what is its branch's, and learns nothing of the others."""

import threading
import uuid
from collections.abc import Iterator
from typing import Any

import grpc
import psycopg
import pytest

from retail.purchases.v1 import purchases_service_pb2 as pb
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from retail.relay.v1 import outbox_service_pb2
from retail.relay.v1.outbox_service_pb2_grpc import OutboxServiceStub
from tests.conftest import WAIT_S
from tests.integration.access.backbone import DOMAIN, Backbone
from tests.integration.sales import NOON, Refusal, sale

CreatePurchase = "/retail.purchases.v1.PurchasesService/CreatePurchase"


class Tills:
    """A stub for each till that is asked for."""

    def __init__(self, chain: Backbone) -> None:
        self._chain, self._channels = chain, dict[str, grpc.Channel]()

    def __call__(self, path: str) -> Any:
        if path not in self._channels:
            self._channels[path] = self._chain.channel("purchases", self._chain.certificate(path))
        return PurchasesServiceStub(self._channels[path])

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()


@pytest.fixture
def callers(chain_with_certificates: Backbone) -> Iterator[Tills]:
    tills = Tills(chain_with_certificates)
    yield tills
    tills.close()


def refused(call: Any, *arguments: Any, **options: Any) -> Refusal:
    try:
        reply = call(*arguments, **options)
        if hasattr(reply, "__next__"):
            for _ in reply:
                pass
    except grpc.RpcError as error:
        return Refusal(error)  # type: ignore[arg-type]
    raise AssertionError("not refused")


def stored(url: str, **fields: Any) -> int:
    with psycopg.connect(url) as connection:
        where = " AND ".join(f"{name} = %({name})s" for name in fields)
        row = connection.execute(f"SELECT count(*) FROM purchases WHERE {where}", fields).fetchone()
        assert row is not None
        return int(row[0])


def test_a_till_records_for_itself_only(callers: Tills, purchases_url: str, chain_with_certificates: Backbone) -> None:
    own, other_till, other_branch = (
        sale(branch_id=branch_id, pos_id=pos_id) for branch_id, pos_id in ((21, "POS-3"), (21, "POS-4"), (22, "POS-3"))
    )
    till = callers("/branch/21/till/POS-3")
    assert till.CreatePurchase(own).purchase.branch_id == 21
    for request in (other_till, other_branch):
        denied = refused(till.CreatePurchase, request)
        assert (denied.code, denied.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
        assert stored(purchases_url, receipt_id=request.purchase.receipt_id) == 0
    records = [r for r in chain_with_certificates.records("purchases") if r.get("caller", "").endswith("21/till/POS-3")]
    assert [(r["method"], r["what"]) for r in records] == [(CreatePurchase, "till"), (CreatePurchase, "branch")]


@pytest.mark.parametrize("sales", [2, 50], ids=["sales one by one", "a backlog"])
@pytest.mark.parametrize("foreign", [{"branch_id": 32}, {"pos_id": "POS-4"}, {"pos_id": ""}, {"branch_id": 0}])
def test_each_message_of_a_stream_is_looked_at(
    callers: Tills, purchases_url: str, foreign: dict[str, Any], sales: int
) -> None:
    """What came before is recorded and answered; of a message with one foreign sale, nothing is; the stream ends."""
    good, *also_good, bad = (sale(branch_id=31) for _ in range(1 + sales))
    for name, value in foreign.items():
        setattr(bad.purchase, name, value)
    answered = threading.Event()

    def messages() -> Iterator[pb.UploadPurchasesRequest]:
        yield pb.UploadPurchasesRequest(uploads=[pb.PurchaseUpload(create_purchase=good)])
        assert answered.wait(WAIT_S)
        yield pb.UploadPurchasesRequest(uploads=[pb.PurchaseUpload(create_purchase=each) for each in (*also_good, bad)])

    replies = callers("/branch/31/till/POS-3").UploadPurchases(messages(), timeout=60)
    first = next(replies)
    answered.set()
    denied = refused(lambda: replies)
    assert denied.code == grpc.StatusCode.PERMISSION_DENIED
    assert first.results[0].created.purchase.receipt_id == good.purchase.receipt_id
    assert stored(purchases_url, receipt_id=good.purchase.receipt_id) == 1
    assert not any(stored(purchases_url, receipt_id=each.purchase.receipt_id) for each in also_good)
    assert stored(purchases_url, receipt_id=bad.purchase.receipt_id) == 0


@pytest.mark.parametrize("who", ["till/POS-9", "manager/anna"])
def test_a_foreign_purchase_is_as_one_that_is_not_there(callers: Tills, who: str) -> None:
    """The same answer but for the id that was asked for."""
    purchase_id = callers("/branch/41/till/POS-3").CreatePurchase(sale(branch_id=41)).purchase.purchase_id
    assert (
        callers(f"/branch/41/{who}").GetPurchase(pb.GetPurchaseRequest(purchase_id=purchase_id)).purchase.branch_id
        == 41
    )
    absent_id = str(uuid.uuid4())
    foreign, absent = (
        refused(callers(f"/branch/42/{who}").GetPurchase, pb.GetPurchaseRequest(purchase_id=asked))
        for asked in (purchase_id, absent_id)
    )
    assert foreign.code == grpc.StatusCode.NOT_FOUND
    assert str(foreign.status).replace(purchase_id, absent_id) == str(absent.status)
    for path in ("/reader/hq", "/operator/kim", "/service/consumer"):
        assert callers(path).GetPurchase(pb.GetPurchaseRequest(purchase_id=purchase_id)).purchase.branch_id == 41


def test_lists_have_the_own_branch_only(callers: Tills) -> None:
    for branch_id in (51, 52):
        callers(f"/branch/{branch_id}/till/POS-3").CreatePurchase(sale(branch_id=branch_id))
    till = callers("/branch/51/till/POS-3")
    (purchase,) = till.ListPurchases(pb.ListPurchasesRequest(branch_id=51)).purchases
    assert purchase.branch_id == 51
    for request in (pb.ListPurchasesRequest(), pb.ListPurchasesRequest(branch_id=52)):
        assert refused(till.ListPurchases, request).code == grpc.StatusCode.PERMISSION_DENIED
    everything = callers("/reader/hq").ListPurchases(pb.ListPurchasesRequest()).purchases
    assert {51, 52} <= {purchase.branch_id for purchase in everything}


def test_a_page_of_another_branch_cannot_be_turned_to(callers: Tills) -> None:
    for _ in range(2):
        callers("/branch/61/till/POS-3").CreatePurchase(sale(branch_id=61))
    request = pb.ListPurchasesRequest(branch_id=61, page_size=1)
    token = callers("/branch/61/till/POS-3").ListPurchases(request).next_page_token
    assert token
    request = pb.ListPurchasesRequest(branch_id=62, page_size=1, page_token=token)
    assert refused(callers("/branch/62/till/POS-3").ListPurchases, request).reason == "INVALID_TOKEN"


def test_a_key_that_another_branch_has_tells_nothing_of_its_purchase(callers: Tills) -> None:
    first = sale(branch_id=71)
    held = callers("/branch/71/till/POS-3").CreatePurchase(first).purchase
    foreign = refused(
        callers("/branch/72/till/POS-3").CreatePurchase, sale(branch_id=72, idempotency_key=first.idempotency_key)
    )
    assert foreign.reason == "IDEMPOTENCY_KEY_REUSED"
    assert held.purchase_id not in str(foreign.status)
    assert held.receipt_id not in str(foreign.status)
    own = refused(
        callers("/branch/71/till/POS-4").CreatePurchase,
        sale(branch_id=71, pos_id="POS-4", idempotency_key=first.idempotency_key),
    )
    assert own.info.metadata["purchase_id"] == held.purchase_id


def test_a_receipt_number_is_the_branchs_own(callers: Tills) -> None:
    """The same number in another branch is another receipt; in the own one, its holder is named."""
    held = callers("/branch/81/till/POS-3").CreatePurchase(sale(branch_id=81, receipt_id="R-81")).purchase
    assert callers("/branch/82/till/POS-3").CreatePurchase(sale(branch_id=82, receipt_id="R-81"))
    own = refused(callers("/branch/81/till/POS-3").CreatePurchase, sale(branch_id=81, receipt_id="R-81"))
    assert (own.reason, own.info.metadata["purchase_id"]) == ("RECEIPT_EXISTS", held.purchase_id)


def test_an_operators_change_is_on_record_before_it_is_done(chain_with_certificates: Backbone) -> None:
    """Also one that then fails; a service's is not, nor what changes nothing."""
    chain, event_id = chain_with_certificates, str(uuid.uuid4())
    request = outbox_service_pb2.RequeueEventsRequest(event_ids=[event_id])
    for path in ("/operator/lee", "/service/consumer"):
        with chain.channel("relay", chain.certificate(path)) as channel:
            stub = OutboxServiceStub(channel)
            stub.GetOutboxStatus(outbox_service_pb2.GetOutboxStatusRequest())
            assert refused(stub.RequeueEvents, request).reason == "EVENT_NOT_FOUND"
    ours = [r for r in chain.records("relay") if r["event"] == "change by an operator" and event_id in r["request"]]
    (record,) = ours
    assert record["caller"] == f"{DOMAIN}/operator/lee"
    assert record["method"] == "/retail.relay.v1.OutboxService/RequeueEvents"


def test_only_the_keeper_moves_the_mark_of_the_outbox(chain_with_certificates: Backbone, purchases_url: str) -> None:
    """A second reader may list what was committed, and says nothing of what the retention may drop."""
    chain, ask = chain_with_certificates, outbox_service_pb2.ListCommittedEventIdsRequest
    with psycopg.connect(purchases_url) as connection:
        for path in ("/operator/lee", "/service/gateway"):
            with chain.channel("relay", chain.certificate(path)) as channel:
                stub = OutboxServiceStub(channel)
                *_, last = stub.ListCommittedEventIds(ask())
                assert refused(
                    stub.ListCommittedEventIds, ask(after_snapshot=last.snapshot, acknowledge=True)
                ).reason == ("PERMISSION_DENIED")
            given = connection.execute("SELECT after_snapshot::text FROM outbox_listing").fetchone()
            assert given is not None
            assert not last.snapshot.endswith(f":{given[0]}")
            connection.rollback()
    assert any(record.get("what") == "field" for record in chain.records("relay"))


def test_sums_are_of_the_own_branch(callers: Tills) -> None:
    for branch_id in (91, 92):
        callers(f"/branch/{branch_id}/till/POS-3").CreatePurchase(sale(branch_id=branch_id, seconds=NOON))
    request = pb.ListControlTotalsRequest(branch_ids=[91])
    for date in (request.first_date, request.last_date):
        date.year, date.month, date.day = 2026, 3, 1
    (row,) = callers("/branch/91/manager/anna").ListControlTotals(request).control_totals
    assert (row.branch_id, row.purchase_count) == (91, 1)
