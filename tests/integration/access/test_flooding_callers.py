"""Who floods is slowed down, by who it is and not by its connection; nobody else is."""

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import psycopg
import pytest

from retail.purchases.v1 import purchases_service_pb2 as pb
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.integration.access.backbone import Backbone
from tests.integration.sales import Refusal, sale

SERVICE = "retail.purchases.v1.PurchasesService"
PER_S, AT_ONCE = 5, 10


@pytest.fixture(scope="module")
def purchases(purchases_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backbone]:
    chain = Backbone(purchases_url, "", "", tmp_path_factory.mktemp("backbone"))
    chain.environ["CALLER_CALLS_PER_S"] = str(PER_S)
    try:
        chain.start("purchases")
        chain.wait_ready("purchases")
        yield chain
    finally:
        chain.end_all()


def test_calls_over_any_number_of_connections_are_one_callers(purchases: Backbone) -> None:
    hasty, calm = purchases.certificate("/branch/95/till/POS-1"), purchases.certificate("/branch/95/till/POS-2")
    channels = [purchases.channel("purchases", pair) for pair in (hasty, hasty, hasty, calm)]
    stubs = [PurchasesServiceStub(channel) for channel in channels]
    began = time.monotonic()
    with ThreadPoolExecutor(30) as threads:
        reasons = list(threads.map(lambda n: _outcome(stubs[n % 3].GetPurchase, pb.GetPurchaseRequest()), range(600)))
    let_in = reasons.count("INVALID_REQUEST")
    assert let_in + reasons.count("RATE_EXCEEDED") == 600
    assert AT_ONCE <= let_in <= AT_ONCE + PER_S * (time.monotonic() - began) + 1
    assert stubs[3].CreatePurchase(sale(branch_id=95, pos_id="POS-2"))
    for channel in channels:
        channel.close()


def test_a_flood_is_refused_before_anything_is_done_for_it(purchases: Backbone, purchases_url: str) -> None:
    """Nothing of it is read: bytes that are no message are refused as any other call is. Nothing of it is stored."""
    with (
        purchases.channel("purchases", purchases.certificate("/branch/97/till/POS-1")) as channel,
        ThreadPoolExecutor(30) as threads,
    ):
        create = PurchasesServiceStub(channel).CreatePurchase
        garbage: Any = channel.unary_unary(f"/{SERVICE}/CreatePurchase")
        began = time.monotonic()
        calls = (sale(branch_id=97, pos_id="POS-1") for _ in range(20 * AT_ONCE))
        outcomes = Counter(threads.map(lambda call: _outcome(create, call), calls))
        of_garbage = Counter(threads.map(lambda _: _outcome(garbage, b"\xff"), range(20 * AT_ONCE)))
        let_in = PER_S * (time.monotonic() - began) + 1  # meanwhile
    assert set(outcomes) == {"OK", "RATE_EXCEEDED"}
    assert set(of_garbage) <= {"RATE_EXCEEDED", "MALFORMED_MESSAGE"}
    assert of_garbage["RATE_EXCEEDED"] and of_garbage["MALFORMED_MESSAGE"] <= let_in
    with psycopg.connect(purchases_url) as connection:
        assert connection.execute("SELECT count(*) FROM purchases WHERE branch_id = 97").fetchone() == (outcomes["OK"],)


def _outcome(call: Any, request: Any) -> str:
    try:
        call(request)
    except grpc.RpcError as error:
        refused = Refusal(error)  # type: ignore[arg-type]
        if refused.reason == "RATE_EXCEEDED":
            assert (refused.code, refused.retry.retry_delay.seconds) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 1)
        return str(refused.reason)
    return "OK"


def test_messages_of_a_stream_wait_and_are_answered(purchases: Backbone) -> None:
    """An upload is no flood of refusals: it is read more slowly."""
    sales = [sale(branch_id=96, pos_id="POS-1") for _ in range(3 * AT_ONCE)]
    messages = (pb.UploadPurchasesRequest(uploads=[pb.PurchaseUpload(create_purchase=each)]) for each in sales)
    began = time.monotonic()
    with purchases.channel("purchases", purchases.certificate("/branch/96/till/POS-1")) as channel:
        replies = list(PurchasesServiceStub(channel).UploadPurchases(messages))
    outcomes = [result.WhichOneof("outcome") for reply in replies for result in reply.results]
    assert outcomes == ["created"] * len(sales)
    assert time.monotonic() - began > AT_ONCE / PER_S
