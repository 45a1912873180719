"""Many clients that retry the same sales at the same time, give up in mid-flight and try again.

The service runs as a process of its own, so that whoever gives up is noticed as over a network, late or not at all, and
not between two steps of one event loop.
"""

import asyncio
import os
import random
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import grpc
import psycopg
import pytest
from google.rpc import error_details_pb2, status_pb2

from retail.purchases.v1.customers_service_pb2 import CreateCustomerRequest
from retail.purchases.v1.customers_service_pb2_grpc import CustomersServiceStub
from retail.purchases.v1.purchases_service_pb2 import CreatePurchaseRequest, UploadPurchasesResponse
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.integration.fuzz_ledger import WROTE_AFTER_END
from tests.integration.processes import Processes
from tests.integration.purchases.test_create_purchase import assert_whole
from tests.integration.purchases.test_upload_purchases import message
from tests.integration.sales import NOON, sale

SEED = int(os.environ.get("RETRIES_SEED", "1000"))
CLIENTS, UPLOADERS = 50, 15  # so many of the clients use UploadPurchases
SALES = 1_000  # that are stored in the end
RIVALS = 100  # more sales, each with the receipt number of one of those: one of the two gets it
IN_FLIGHT = 8  # calls of one client
SALES_PER_MESSAGE = 40
DEADLINE_S = 120.0  # of calls that do not give up
TRY_AGAIN = {grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.ABORTED}

Answer = tuple[str, str]  # what became of a sale, and the purchase that it is, or that holds its receipt number


@pytest.fixture
def process(purchases_db: str, tmp_path: Any) -> Iterator[Processes]:
    """The purchases service alone, on an empty database."""
    processes = Processes(purchases_db, "", "", tmp_path)
    try:
        processes.start("purchases")
        processes.wait_ready("purchases")
        yield processes
    finally:
        processes.end_all()


def backlog(chance: random.Random, known: Sequence[str]) -> list[CreatePurchaseRequest]:
    """Sales, and rivals of some; of known customers, and of customers that come with several sales or with one."""
    shared = [some_uuid(chance) for _ in range(60)]
    sales = []
    for number in range(SALES + RIVALS):
        request = sale(("1.00",) * chance.randint(1, 3))
        request.idempotency_key = some_uuid(chance)
        request.purchase.receipt_id = f"R{number % SALES}"
        request.purchase.purchase_time.seconds = NOON + number % SALES % 3 * 86_400
        request.purchase.cashier_id = 1 + number // SALES  # rivals differ in more than their keys
        customer = chance.choice([None, chance.choice(known), chance.choice(shared), some_uuid(chance)])
        if customer:
            request.purchase.customer_id, request.register_customer = customer, customer not in known
        sales.append(request)
    return sales


def some_uuid(chance: random.Random) -> str:
    return str(uuid.UUID(int=chance.getrandbits(128), version=4))


class Client:
    """Sends all sales in an order of its own, and each again until it has an answer."""

    def __init__(self, number: int, channel: grpc.aio.Channel, sales: Sequence[CreatePurchaseRequest]) -> None:
        self._chance = random.Random(f"{SEED} client {number}")
        self._tills: Any = PurchasesServiceStub(channel)
        self._open = self._chance.sample(sales, len(sales))
        self.answers: dict[str, Answer] = {}  # by key
        self.retries = 0

    async def send_each(self) -> None:
        """One call for each sale."""
        calls: dict[asyncio.Future[Any], CreatePurchaseRequest] = {}
        while self._open or calls:
            while self._open and len(calls) < IN_FLIGHT:
                request = self._open.pop()
                call = self._tills.CreatePurchase(request, timeout=self._patience_s())
                calls[asyncio.ensure_future(_outcome(call))] = request
            done, pending = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            if pending and self._chance.random() < 0.05:
                self._chance.choice(sorted(pending, key=list(calls).index)).cancel()
            for future in done:
                self._note(calls.pop(future), None if future.cancelled() else future.result())

    async def upload(self) -> None:
        """Uploads of many sales; one that ends early is begun again with what was not answered."""
        while self._open:
            sales, self._open = self._open, []
            call = self._tills.UploadPurchases(self._messages(sales), timeout=self._patience_s(20))
            try:
                async for response in call:
                    self._note_results(sales, response)
                    if self._chance.random() < 0.05:
                        call.cancel()
            except (grpc.aio.AioRpcError, asyncio.CancelledError):
                assert await call.code() in TRY_AGAIN or await call.details() == WROTE_AFTER_END, call
                self.retries += 1
            self._open += [each for each in sales if each.idempotency_key not in self.answers]
            self._chance.shuffle(self._open)

    async def _messages(self, sales: Sequence[CreatePurchaseRequest]) -> AsyncIterator[Any]:
        for first in range(0, len(sales), SALES_PER_MESSAGE):
            yield message(first, list(sales[first : first + SALES_PER_MESSAGE]))

    def _patience_s(self, times: int = 1) -> float:
        """Mostly enough; else so little that it ends in mid-flight, if not before anything was sent."""
        return times * self._chance.uniform(0.0005, 0.08) if self._chance.random() < 0.15 else DEADLINE_S

    def _note_results(self, sales: Sequence[CreatePurchaseRequest], response: UploadPurchasesResponse) -> None:
        for result in response.results:
            created = result.WhichOneof("outcome") == "created"
            outcome = _stored(result.created) if created else _refused(result.error)
            self._note(sales[result.sequence_number], outcome, again=False)

    def _note(self, request: CreatePurchaseRequest, outcome: Answer | None, *, again: bool = True) -> None:
        if outcome:
            assert self.answers.setdefault(request.idempotency_key, outcome) == outcome
        else:
            self.retries += 1
            if again:
                self._open.insert(0, request)


async def _outcome(call: Any) -> Answer | None:
    """What became of a sale; None when that is not known."""
    try:
        return _stored(await call)
    except grpc.aio.AioRpcError as error:
        if error.code() in TRY_AGAIN:
            return None
        details = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
        return _refused(status_pb2.Status.FromString(details))


def _stored(reply: Any) -> Answer:
    return "stored", reply.purchase.purchase_id


def _refused(status: status_pb2.Status) -> Answer | None:
    if status.code == grpc.StatusCode.ABORTED.value[0]:
        return None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.reason == "RECEIPT_EXISTS", status  # nothing else is wrong with any of them
    return info.reason, info.metadata["purchase_id"]


def stored(url: str) -> tuple[dict[str, str], set[str]]:
    """The purchases by key, and the customers."""
    with psycopg.connect(url) as connection:
        purchases = connection.execute("SELECT idempotency_key::text, purchase_id::text FROM purchases").fetchall()
        customers = connection.execute("SELECT customer_id::text FROM customers").fetchall()
    return dict(purchases), {customer_id for (customer_id,) in customers}


async def test_everybody_retries_everything(process: Processes, purchases_db: str) -> None:
    """However often, by whomever and how impatiently sales are sent, each is stored once, and all are told the same."""
    print(f"RETRIES_SEED={SEED}")
    chance = random.Random(SEED)
    known = [some_uuid(chance) for _ in range(40)]
    sales = backlog(chance, known)
    channels = [
        grpc.aio.insecure_channel(process.address["purchases"], options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(CLIENTS)
    ]
    desk: Any = CustomersServiceStub(channels[0])
    await asyncio.gather(*(desk.CreateCustomer(CreateCustomerRequest(customer_id=each)) for each in known))

    clients = [Client(number, channel, sales) for number, channel in enumerate(channels)]
    uploads = [client.upload() for client in clients[:UPLOADERS]]
    await asyncio.gather(*uploads, *(client.send_each() for client in clients[UPLOADERS:]))
    await asyncio.gather(*(channel.close() for channel in channels))
    print("retries:", sum(client.retries for client in clients))

    purchases, customers = stored(purchases_db)
    assert_whole(purchases_db, SALES)
    winners = [each for each in sales if each.idempotency_key in purchases]
    holders = {each.purchase.receipt_id: purchases[each.idempotency_key] for each in winners}
    right = {
        each.idempotency_key: ("stored", purchases[each.idempotency_key])
        if each.idempotency_key in purchases
        else ("RECEIPT_EXISTS", holders[each.purchase.receipt_id])
        for each in sales
    }
    assert all(client.answers == right for client in clients)
    assert customers == {*known, *(each.purchase.customer_id for each in winners)} - {""}
