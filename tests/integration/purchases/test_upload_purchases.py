"""UploadPurchases over real gRPC on a real database."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc
import psycopg
import pytest
from google.rpc import error_details_pb2

import purchases_svc.__main__ as purchases
from purchases_svc.settings import ServeSettings
from retail.purchases.v1.purchases_service_pb2 import (
    CreatePurchaseRequest,
    PurchaseUpload,
    PurchaseUploadResult,
    UploadPurchasesRequest,
)
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.conftest import WAIT_S, eventually
from tests.integration.conftest import free_address, running
from tests.integration.purchases.test_create_purchase import assert_whole, count
from tests.integration.sales import refusal, sale


@pytest.fixture
def tills(purchases_channel: grpc.aio.Channel) -> Any:
    return PurchasesServiceStub(purchases_channel)


def message(first: int, sales: list[CreatePurchaseRequest]) -> UploadPurchasesRequest:
    return UploadPurchasesRequest(
        uploads=[PurchaseUpload(sequence_number=first + n, create_purchase=s) for n, s in enumerate(sales)]
    )


async def upload(tills: Any, messages: list[UploadPurchasesRequest]) -> dict[int, PurchaseUploadResult]:
    async def requests() -> AsyncIterator[UploadPurchasesRequest]:
        for each in messages:
            yield each

    results: dict[int, PurchaseUploadResult] = {}
    async for response in tills.UploadPurchases(requests()):
        for result in response.results:
            assert result.sequence_number not in results
            results[result.sequence_number] = result
    return results


async def test_backlog_is_stored_and_answered(tills: Any, purchases_db: str) -> None:
    """Every sale is answered once, after it is durable; sent again, everything is replayed."""
    backlog = [message(n * 500, [sale(("1.00",)) for _ in range(500)]) for n in range(4)]
    first = await upload(tills, backlog)
    assert sorted(first) == list(range(2_000))
    assert all(not result.created.replayed for result in first.values())
    assert_whole(purchases_db, 2_000)
    again = await upload(tills, backlog)
    assert all(result.created.replayed for result in again.values())
    assert {n: r.created.purchase for n, r in again.items()} == {n: r.created.purchase for n, r in first.items()}
    assert_whole(purchases_db, 2_000)


async def test_refused_sales_spare_their_neighbours(tills: Any, purchases_db: str) -> None:
    """Each refused sale gets the status that CreatePurchase would give; the others are stored."""
    sales = [sale() for _ in range(10)]
    sales[1].purchase.branch_id = 0
    sales[2].purchase.receipt_id = sales[0].purchase.receipt_id
    sales[3].idempotency_key = sales[0].idempotency_key
    sales[4].purchase.customer_id = str(uuid.uuid4())
    sales[5].purchase.purchase_time.seconds = 4_000_000_000
    sales[6].CopyFrom(sales[0])
    results = await upload(tills, [message(100, sales)])
    reasons = {}
    for number, result in results.items():
        if result.WhichOneof("outcome") == "error":
            info = error_details_pb2.ErrorInfo()
            result.error.details[0].Unpack(info)
            reasons[number] = info.reason
    assert reasons == {
        101: "INVALID_PURCHASE",
        102: "RECEIPT_EXISTS",
        103: "IDEMPOTENCY_KEY_REUSED",
        104: "CUSTOMER_NOT_FOUND",
        105: "PURCHASE_TIME_AHEAD",
    }
    assert results[106].created.replayed
    assert results[106].created.consistency_token == results[100].created.consistency_token != ""
    assert_whole(purchases_db, 4)


async def test_answers_come_while_the_stream_stays_open(tills: Any) -> None:
    """A till may wait for each answer before it sends more."""
    call = tills.UploadPurchases()
    for n in range(3):
        await call.write(message(n, [sale()]))
        response = await asyncio.wait_for(call.read(), 10)
        assert [result.sequence_number for result in response.results] == [n]
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() == grpc.StatusCode.OK


async def test_sales_that_come_one_by_one_are_answered_in_any_order(tills: Any, purchases_db: str) -> None:
    """One that waits for a row holds up neither its neighbours in the message nor those behind it, however many."""
    customer_id = str(uuid.uuid4())
    await tills.CreatePurchase(sale(customer_id=customer_id, register_customer=True))
    call = tills.UploadPurchases()
    answered: set[int] = set()

    async def read_until(complete: set[int]) -> None:
        while not complete <= answered:
            results = (await call.read()).results
            assert not answered & {result.sequence_number for result in results}
            assert all(result.created.purchase.purchase_id for result in results)
            answered.update(result.sequence_number for result in results)

    async with await psycopg.AsyncConnection.connect(purchases_db) as holder:
        await holder.execute("SELECT FROM customers WHERE customer_id = %s FOR UPDATE", [customer_id])
        await call.write(message(0, [sale(), sale(customer_id=customer_id), sale()]))
        for number in range(3, 203):
            await call.write(message(number, [sale()]))
        await asyncio.wait_for(read_until({0, *range(2, 203)}), WAIT_S)
        assert 1 not in answered
    await asyncio.wait_for(read_until({1}), WAIT_S)
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() == grpc.StatusCode.OK
    assert_whole(purchases_db, 204)


async def test_too_many_sales_or_none_in_a_message(tills: Any) -> None:
    """A message has 1 to 500 sales; what came before it is answered."""
    for wrong in (message(0, [sale(("1.00",))] * 501), UploadPurchasesRequest()):
        call = tills.UploadPurchases()
        await call.write(message(7, [sale()]))
        await call.write(wrong)
        assert [result.sequence_number for result in (await call.read()).results] == [7]
        refused = await refusal(call.read())
        assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["uploads"])


async def test_garbage_in_the_stream(purchases_channel: grpc.aio.Channel) -> None:
    """Bytes that are no message end the stream as such."""
    call: Any = purchases_channel.stream_stream("/retail.purchases.v1.PurchasesService/UploadPurchases")()
    await call.write(b"\xff\xff")
    refused = await refusal(call.read())
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")


async def test_client_that_does_not_read_is_slowed_down(tills: Any, purchases_db: str) -> None:
    """Of a client that never reads its answers only a bounded number of messages is taken in; others are served."""
    big = tuple("1.00" for _ in range(100))
    messages = [message(n * 100, [sale(big) for _ in range(100)]) for n in range(40)]
    lazy = tills.UploadPurchases()

    async def push() -> None:
        for each in messages:
            await lazy.write(each)

    pushing = asyncio.ensure_future(push())
    await eventually(lambda: _at_least(purchases_db, 200), "the first messages are stored")
    assert not (await asyncio.wait_for(tills.CreatePurchase(sale()), WAIT_S)).replayed
    lazy.cancel()
    await asyncio.gather(pushing, return_exceptions=True)
    assert count(purchases_db, "purchases") < 4_001
    assert (await tills.CreatePurchase(sale())).purchase.purchase_id


async def _at_least(url: str, purchases: int) -> bool:
    return count(url, "purchases") >= purchases


async def test_drain_ends_open_streams(purchases_db: str) -> None:
    """A server that stops answers what it has read, then tells the till to go elsewhere, at once."""
    config = ServeSettings(purchases_db, listen=free_address(), metrics_listen="127.0.0.1:0", backlog_months=0)
    async with running(lambda stop: purchases.serve(config, stop), config.listen) as channel:
        tills: Any = PurchasesServiceStub(channel)
        call = tills.UploadPurchases()
        await call.write(message(1, [sale()]))
        assert (await call.read()).results[0].created.purchase.purchase_id
        ended = asyncio.ensure_future(refusal(call.read()))
    refused = await asyncio.wait_for(ended, WAIT_S)
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")


async def test_streams_of_one_connection_wait_for_each_other(tills: Any, purchases_db: str) -> None:
    """Together they have what one caller may have on its way: they are slowed down, and nobody's sale is refused."""
    uploads = [upload(tills, [message(n * 500, [sale(("1.00",)) for _ in range(500)])]) for n in range(8)]
    for results in await asyncio.gather(*uploads):
        assert {result.WhichOneof("outcome") for result in results.values()} == {"created"}
    assert count(purchases_db, "purchases") == 4_000
