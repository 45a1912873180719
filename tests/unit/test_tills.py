"""Many tills at once, against a small purchases service in memory."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice

import grpc
import pytest

from pos.client import Sale
from pos.simulator import simulate
from pos.tills import TILLS, TILLS_PER_CHANNEL, SaleFailed, Tills
from retail.purchases.v1 import purchases_service_pb2
from retail.purchases.v1.purchases_service_pb2 import CreatePurchaseRequest, CreatePurchaseResponse
from tests.unit.test_open_stream import Shop as StreamingShop

NAME = purchases_service_pb2.DESCRIPTOR.services_by_name["PurchasesService"].full_name


class Shop:
    """Stores sales by key as the service does; refuses one receipt, loses one answer, forgets keys, all on demand."""

    def __init__(self) -> None:
        self.attempts: Counter[str] = Counter()
        self.refused_receipt = ""
        self.lost_answer_to = ""
        self.forgetful = False
        self.silent = threading.Event()
        self._stored: dict[str, str] = {}
        self._lock = threading.Lock()

    def create_purchase(self, request: CreatePurchaseRequest, context: grpc.ServicerContext) -> CreatePurchaseResponse:
        key = request.idempotency_key
        with self._lock:
            self.attempts[key] += 1
            attempt = self.attempts[key]
            replayed = key in self._stored and not self.forgetful
            if not replayed:
                self._stored[key] = f"purchase {len(self._stored)}, attempt {attempt}"
        if request.purchase.receipt_id == self.refused_receipt:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, "taken")
        if request.purchase.receipt_id == self.lost_answer_to and attempt == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the answer got lost")
        if self.silent.is_set():
            context.abort(grpc.StatusCode.UNAVAILABLE, "closed for now")
        request.purchase.purchase_id = self._stored[key]
        request.purchase.create_time.GetCurrentTime()
        return CreatePurchaseResponse(purchase=request.purchase, replayed=replayed)

    @contextmanager
    def open(self) -> Iterator[str]:
        """Serve while the block runs; gives the address."""
        handler = grpc.unary_unary_rpc_method_handler(
            self.create_purchase,
            request_deserializer=CreatePurchaseRequest.FromString,
            response_serializer=CreatePurchaseResponse.SerializeToString,
        )
        server = grpc.server(ThreadPoolExecutor(8))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, {"CreatePurchase": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


@pytest.fixture
def shop() -> Shop:
    return Shop()


@pytest.fixture(scope="module")
def sales() -> list[Sale]:
    return list(islice(simulate(1), 400))


def test_every_sale_arrives_and_some_arrive_twice(shop: Shop, sales: list[Sale]) -> None:
    """All sales are sent once, about one in twenty once more; the counters tell exactly what happened."""
    with shop.open() as target, Tills(sales, target, seed=1) as tills:
        assert tills.wait(60)
    assert set(shop.attempts) == {sale.idempotency_key for sale in sales}
    assert set(shop.attempts.values()) == {1, 2}
    assert sum(count == 2 for count in shop.attempts.values()) == tills.duplicates_sent
    assert 5 <= tills.duplicates_sent <= 40
    assert tills.recorded == 400
    assert tills.replayed == 0


def test_sales_go_over_open_streams(sales: list[Sale]) -> None:
    """If that is asked for: all of them, those that are sent twice among them, and nothing is called."""
    shop = StreamingShop()
    with shop.open() as target, Tills(sales, target, seed=1, streams=True) as tills:
        assert tills.wait(60)
    assert (shop.stored, tills.recorded, tills.replayed, shop.called.total()) == (400, 400, 0, 0)
    assert shop.streamed.total() == 400 + tills.duplicates_sent
    assert shop.streams == TILLS // TILLS_PER_CHANNEL


def test_the_same_sales_are_doubled_every_time(shop: Shop, sales: list[Sale]) -> None:
    """Which sales are sent twice depends on the seed and the sale alone; a second run finds everything stored."""
    with shop.open() as target:
        for _ in range(2):
            with Tills(sales, target, seed=1) as tills:
                assert tills.wait(60)
    assert set(shop.attempts.values()) == {2, 4}
    assert tills.replayed == 400


def test_a_lost_answer_is_asked_for_again(shop: Shop, sales: list[Sale]) -> None:
    """A sale whose answer got lost is sent again with its key, and counts once."""
    shop.lost_answer_to = sales[7].receipt_id
    with shop.open() as target, Tills(sales[:20], target, seed=1) as tills:
        assert tills.wait(60)
    assert shop.attempts[sales[7].idempotency_key] >= 2
    assert tills.recorded == 20


def test_a_refused_sale_stops_all_tills_and_is_named(shop: Shop, sales: list[Sale]) -> None:
    """The error names the receipt, branch and till, and what the service said."""
    shop.refused_receipt = sales[30].receipt_id
    with (
        shop.open() as target,
        pytest.raises(SaleFailed, match=rf"{shop.refused_receipt} \(branch .*ALREADY_EXISTS: taken"),
        Tills(sales, target, seed=1) as tills,
    ):
        tills.wait(60)


def test_a_sale_stored_twice_is_an_alarm(shop: Shop, sales: list[Sale]) -> None:
    """Tills compare the answers to what they sent twice: two purchases for one key stop everything."""
    shop.forgetful = True
    with shop.open() as target, pytest.raises(SaleFailed, match="stored twice"), Tills(sales, target, seed=1) as tills:
        tills.wait(60)


def test_tills_wait_for_a_service_that_is_away(shop: Shop, sales: list[Sale]) -> None:
    """During an outage the tills show why they wait; when it is over, every sale gets through."""
    shop.silent.set()
    with shop.open() as target, Tills(sales, target, seed=1) as tills:
        deadline = time.monotonic() + 30
        while tills.trouble is None and time.monotonic() < deadline:
            assert not tills.wait(0.01)
        assert "closed for now" in str(tills.trouble)
        shop.silent.clear()
        assert tills.wait(60)
        assert tills.trouble is None
    assert tills.recorded == 400


def test_leaving_early_is_quick(shop: Shop, sales: list[Sale]) -> None:
    """When the block is left in the middle of an outage, no till goes on waiting."""
    shop.silent.set()
    with shop.open() as target:
        with Tills(sales, target, seed=1) as tills:
            assert not tills.wait(0.3)
            started = time.monotonic()
        assert time.monotonic() - started < 10
    assert threading.active_count() < 20
