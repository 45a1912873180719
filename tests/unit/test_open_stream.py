"""An open stream for sales as they happen, against a small purchases service in memory."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from queue import SimpleQueue
from typing import Any

import grpc
import pytest

import pos.open_stream
from pos import errors
from pos.client import OpenStream, PosClient, Recorded, Sale, connect
from pos.errors import OutcomeUnknown, PosError
from pos.open_stream import SALES_PER_MESSAGE
from pos.simulator import simulate
from retail.purchases.v1 import purchases_service_pb2 as pb2
from tests.unit.test_backlog import NAME, status

WAIT_S = 30.0


class Shop:
    """Stores sales by key, from streams and from calls; says nothing, breaks and refuses on demand."""

    def __init__(self) -> None:
        self.streamed, self.called = Counter[str](), Counter[str]()  # attempts by key
        self.streams = 0
        self.sales_of_messages: list[int] = []
        self.unanswered: set[str] = set()  # keys that streams say nothing about
        self.refusals: dict[str, Any] = {}  # statuses by key
        self.refuses_streams: tuple[grpc.StatusCode, str] | None = None
        self.refuses_calls: tuple[grpc.StatusCode, str] | None = None
        self.breaks = threading.Event()  # the stream, when its next sale has come: it is stored and not answered
        self.breaks_with = grpc.StatusCode.UNAVAILABLE
        self._stored: dict[str, str] = {}
        self._lock = threading.Lock()
        self._answers: list[SimpleQueue[pb2.UploadPurchasesResponse | None]] = []

    @property
    def stored(self) -> int:
        return len(self._stored)

    def upload(self, requests: Iterator[pb2.UploadPurchasesRequest], context: Any) -> Iterator[Any]:
        self.streams += 1
        if self.refuses_streams:
            context.abort(*self.refuses_streams)
        answers: SimpleQueue[pb2.UploadPurchasesResponse | None] = SimpleQueue()
        self._answers.append(answers)

        def read() -> None:
            try:
                for message in requests:
                    self.sales_of_messages.append(len(message.uploads))
                    for upload in message.uploads:
                        self._take(upload, answers)
            except Exception:  # the client has gone
                pass
            answers.put(None)

        threading.Thread(target=read).start()
        while response := answers.get():
            yield response
        if self.breaks.is_set():
            self.breaks.clear()
            context.abort(self.breaks_with, "the server went away")

    def end_streams(self) -> None:
        """As a server does that drains, or with a stream that was idle for long."""
        for answers in self._answers:
            answers.put(None)

    def _take(self, upload: pb2.PurchaseUpload, answers: "SimpleQueue[Any]") -> None:
        sale = upload.create_purchase
        self.streamed[sale.idempotency_key] += 1
        result = pb2.PurchaseUploadResult(sequence_number=upload.sequence_number)
        if refusal := self.refusals.get(sale.idempotency_key):
            result.error.CopyFrom(refusal)
        else:
            result.created.CopyFrom(self._store(sale))
        if self.breaks.is_set():
            answers.put(None)
        elif sale.idempotency_key not in self.unanswered:
            answers.put(pb2.UploadPurchasesResponse(results=[result]))

    def create(self, request: pb2.CreatePurchaseRequest, context: Any) -> pb2.CreatePurchaseResponse:
        self.called[request.idempotency_key] += 1
        if self.refuses_calls:
            context.abort(*self.refuses_calls)
        return self._store(request)

    def _store(self, sale: pb2.CreatePurchaseRequest) -> pb2.CreatePurchaseResponse:
        with self._lock:
            replayed = sale.idempotency_key in self._stored
            purchase_id = self._stored.setdefault(sale.idempotency_key, f"purchase {len(self._stored)}")
        response = pb2.CreatePurchaseResponse(purchase=sale.purchase, replayed=replayed, consistency_token="token")
        response.purchase.purchase_id = purchase_id
        return response

    @contextmanager
    def open(self) -> Iterator[str]:
        """Serve while the block runs; gives the address."""
        handlers: dict[str, Any] = {
            "UploadPurchases": grpc.stream_stream_rpc_method_handler(
                self.upload,
                request_deserializer=pb2.UploadPurchasesRequest.FromString,
                response_serializer=pb2.UploadPurchasesResponse.SerializeToString,
            ),
            "CreatePurchase": grpc.unary_unary_rpc_method_handler(
                self.create,
                request_deserializer=pb2.CreatePurchaseRequest.FromString,
                response_serializer=pb2.CreatePurchaseResponse.SerializeToString,
            ),
        }
        server = grpc.server(ThreadPoolExecutor(80))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            self.end_streams()
            server.stop(None).wait()


@pytest.fixture
def shop() -> Shop:
    return Shop()


@pytest.fixture
def target(shop: Shop) -> Iterator[str]:
    with shop.open() as target:
        yield target


@pytest.fixture(scope="module")
def sales() -> list[Sale]:
    return list(islice(simulate(1), 700))


@pytest.fixture
def pauses() -> list[float]:
    return []


@contextmanager
def opened(target: str, pauses: list[float], **settings: Any) -> Iterator[OpenStream[Recorded]]:
    """A stream whose pauses are noted; they are slept, but not for long."""

    def pause(pause_s: float, _: PosError) -> None:
        pauses.append(pause_s)
        time.sleep(min(pause_s, 0.01))

    with connect(target) as channel, PosClient(channel, pause=pause, **settings).open_stream() as stream:
        yield stream


@pytest.fixture
def stream(target: str, pauses: list[float]) -> Iterator[OpenStream[Recorded]]:
    with opened(target, pauses) as stream:
        yield stream


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_sales_go_over_one_stream(shop: Shop, stream: OpenStream[Recorded], sales: list[Sale]) -> None:
    """Each is answered by itself, with what a call would say, and nothing is called."""
    for sale in sales[:20]:
        recorded = stream.record(sale, register_customer=True)
        assert recorded.purchase.receipt_id == sale.receipt_id
        assert recorded.purchase.total_cents == sale.total_cents
        assert (recorded.replayed, recorded.consistency_token) == (False, "token")
    assert stream.record(sales[3]).replayed
    assert (shop.streams, shop.stored, shop.called.total()) == (1, 20, 0)
    assert set(shop.sales_of_messages) == {1}


def test_many_threads_share_a_stream(
    shop: Shop, stream: OpenStream[Recorded], sales: list[Sale], pauses: list[float]
) -> None:
    """Each of 64 threads gets its own answers."""
    with ThreadPoolExecutor(64) as tills:
        answers = list(tills.map(stream.record, sales))
    assert [each.purchase.receipt_id for each in answers] == [sale.receipt_id for sale in sales]
    assert (shop.streams, shop.stored, shop.called.total(), pauses) == (1, 700, 0, [])
    assert max(shop.sales_of_messages) <= SALES_PER_MESSAGE


def test_a_sale_without_an_answer_holds_up_nobody(
    shop: Shop, target: str, sales: list[Sale], pauses: list[float]
) -> None:
    """Others are answered before it; it has its own deadline, and is then sent again."""
    late, *others = sales[:30]
    shop.unanswered = {late.idempotency_key}
    with opened(target, pauses, attempt_timeout_s=1.0) as stream, ThreadPoolExecutor() as tills:
        waiting = tills.submit(stream.record, late)
        until(lambda: late.idempotency_key in shop.streamed)
        for sale in others:
            assert not stream.record(sale).replayed
        until(lambda: shop.streamed[late.idempotency_key] + shop.called[late.idempotency_key] > 1)
        shop.unanswered.clear()
        assert waiting.result().replayed
    assert len(pauses) >= 1
    assert shop.stored == 30


def test_a_dead_stream_is_left(shop: Shop, target: str, sales: list[Sale], pauses: list[float]) -> None:
    """A stream on which nothing was said for as long as an answer may take is cut, and the sale goes by a call."""
    shop.unanswered = {sale.idempotency_key for sale in sales}
    with opened(target, pauses, attempt_timeout_s=0.5, total_timeout_s=WAIT_S) as stream:
        assert stream.record(sales[0]).replayed
        shop.unanswered.clear()
        for sale in sales[1:]:
            stream.record(sale)
            if shop.streams > 1 and shop.streamed[sale.idempotency_key]:
                break
            time.sleep(0.01)
        else:
            pytest.fail("no stream was opened again")
    assert shop.called[sales[0].idempotency_key] == 1


def test_patience_ends(shop: Shop, target: str, sales: list[Sale], pauses: list[float]) -> None:
    """Neither a stream nor a call helps: the outcome is unknown."""
    shop.refuses_streams = shop.refuses_calls = (grpc.StatusCode.UNAVAILABLE, "closed for now")
    with opened(target, pauses, total_timeout_s=0.3) as stream, pytest.raises(OutcomeUnknown, match="closed for now"):
        stream.record(sales[0])
    assert pauses


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.PERMISSION_DENIED])
def test_a_stream_that_breaks_loses_nothing(
    shop: Shop, stream: OpenStream[Recorded], sales: list[Sale], pauses: list[float], code: grpc.StatusCode
) -> None:
    """What was sent on it goes by a call at once, with the same key, and is one sale; soon there is a stream again."""
    shop.breaks_with = code  # which one of its sales may have been for
    stream.record(sales[0])
    shop.breaks.set()
    assert stream.record(sales[1]).replayed
    assert (shop.streamed[sales[1].idempotency_key], shop.called[sales[1].idempotency_key]) == (1, 1)
    until(lambda: not stream.record(sales[2]).purchase.purchase_id or shop.streams == 2)
    assert (shop.stored, pauses) == (3, [])


def test_a_stream_that_the_server_ends_is_replaced_quietly(
    shop: Shop, stream: OpenStream[Recorded], sales: list[Sale], pauses: list[float]
) -> None:
    """Whether it was idle or the server drains: no sale waits for it, and each is stored once."""
    with ThreadPoolExecutor(8) as tills:
        answers = []
        for first in range(0, 700, 100):
            answers += list(tills.map(stream.record, sales[first : first + 100]))
            shop.end_streams()
    assert (shop.stored, len(answers), pauses) == (700, 700, [])
    assert shop.streams > 1


def test_a_stream_is_renewed(
    shop: Shop, target: str, sales: list[Sale], pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a while sales go on with a new one, which another server may take; nobody waits for that."""
    monkeypatch.setattr(pos.open_stream, "STREAM_S", (0.02, 0.05))
    with opened(target, pauses) as stream, ThreadPoolExecutor(8) as tills:
        answers = list(tills.map(stream.record, sales))
        until(lambda: bool(stream.record(sales[0])) and shop.streams > 3)
    assert (shop.stored, len(answers), pauses) == (700, 700, [])
    assert not any(each.replayed for each in answers)


def test_a_service_without_streams_is_called(
    shop: Shop, stream: OpenStream[Recorded], sales: list[Sale], pauses: list[float]
) -> None:
    """It is asked for a stream once in a while, not for each sale."""
    shop.refuses_streams = (grpc.StatusCode.UNIMPLEMENTED, "no such method")
    for sale in sales[:50]:
        assert not stream.record(sale).replayed
    assert (shop.streams, shop.called.total(), pauses) == (1, 50, [])


REFUSALS = [
    (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PURCHASE", errors.InvalidSale),
    (grpc.StatusCode.ALREADY_EXISTS, "RECEIPT_EXISTS", errors.ReceiptTaken),
    (grpc.StatusCode.FAILED_PRECONDITION, "IDEMPOTENCY_KEY_REUSED", errors.IdempotencyKeyReused),
    (grpc.StatusCode.FAILED_PRECONDITION, "CUSTOMER_NOT_FOUND", errors.CustomerUnknown),
    (grpc.StatusCode.OUT_OF_RANGE, "PURCHASE_TIME_OUT_OF_RANGE", errors.PurchaseTimeOutOfRange),
    (grpc.StatusCode.FAILED_PRECONDITION, "A_REASON_OF_THE_FUTURE", errors.SaleRefused),
    (grpc.StatusCode.INTERNAL, "INTERNAL", errors.OutcomeUnknown),
    (grpc.StatusCode.OK, "", errors.OutcomeUnknown),  # a result that holds no outcome
    (grpc.StatusCode.PERMISSION_DENIED, "", errors.CallFailed),
]


@pytest.mark.parametrize(("code", "reason", "expected"), REFUSALS)
def test_each_refusal_has_the_class_that_it_has_for_a_call(
    shop: Shop,
    stream: OpenStream[Recorded],
    sales: list[Sale],
    pauses: list[float],
    code: grpc.StatusCode,
    reason: str,
    expected: type[PosError],
) -> None:
    """It is not retried, and the sales beside it are stored."""
    bad, *good = sales[:20]
    shop.refusals = {bad.idempotency_key: status(code, reason, "no")}
    with ThreadPoolExecutor() as tills:
        waiting = tills.submit(stream.record, bad)
        assert not any(each.replayed for each in tills.map(stream.record, good))
        with pytest.raises(PosError) as caught:
            waiting.result()
    assert type(caught.value) is expected
    assert (shop.streams, shop.stored, shop.streamed.total(), pauses) == (1, 19, 20, [])


def test_a_busy_service_is_asked_again(
    shop: Shop, stream: OpenStream[Recorded], sales: list[Sale], pauses: list[float]
) -> None:
    """After the pause that it asks for, with the same key, and on the same stream."""
    sale = sales[0]
    shop.refusals = {
        sale.idempotency_key: status(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", "busy", retry_after_s=3)
    }
    with ThreadPoolExecutor() as tills:
        waiting = tills.submit(stream.record, sale)
        until(lambda: len(pauses) > 0)
        shop.refusals.clear()
        assert waiting.result().purchase.receipt_id == sale.receipt_id
    assert pauses[0] >= 3
    assert (shop.streams, shop.called.total()) == (1, 0)


def test_what_cannot_be_sent_is_refused(shop: Shop, stream: OpenStream[Recorded], sales: list[Sale]) -> None:
    """It never reaches the stream, which goes on."""
    with pytest.raises(errors.InvalidSale):
        stream.record(None)  # type: ignore[arg-type]
    assert stream.record(sales[0])
    assert (shop.streams, shop.streamed.total()) == (1, 1)


def test_more_sales_than_may_be_in_flight_wait_for_room(
    shop: Shop, stream: OpenStream[Recorded], sales: list[Sale], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are sent when others have been answered."""
    monkeypatch.setattr(pos.open_stream, "IN_FLIGHT_MAX", 2)
    with ThreadPoolExecutor(16) as tills:
        answers = list(tills.map(stream.record, sales[:200]))
    assert max(shop.sales_of_messages) <= 2
    assert (shop.streams, shop.stored, shop.called.total(), len(answers)) == (1, 200, 0, 200)


def test_closing_waits_for_the_answers(shop: Shop, target: str, sales: list[Sale], pauses: list[float]) -> None:
    """Whoever has sent a sale gets its answer; whoever comes later is told, and nothing is sent."""
    with connect(target) as channel, ThreadPoolExecutor(32) as tills:
        stream = PosClient(channel).open_stream()
        answers = [tills.submit(stream.record, sale) for sale in sales[:200]]
        until(lambda: shop.stored >= 50)
        stream.close()
        outcomes = [answer.exception() for answer in answers]
        with pytest.raises(OutcomeUnknown, match="closed"):
            stream.record(sales[300])
        stream.close()
    told = [each for each in outcomes if each is not None]
    assert all(isinstance(each, OutcomeUnknown) for each in told)
    assert shop.stored == 200 - len(told) == shop.streamed.total()


def test_closing_has_a_deadline(shop: Shop, target: str, sales: list[Sale]) -> None:
    """Who has no answer by then does not know what became of the sale, and is not kept."""
    shop.unanswered = {sales[0].idempotency_key}
    with connect(target) as channel, ThreadPoolExecutor() as tills:
        stream = PosClient(channel, attempt_timeout_s=10 * WAIT_S, total_timeout_s=10 * WAIT_S).open_stream()
        waiting = tills.submit(stream.record, sales[0])
        until(lambda: shop.streamed.total() == 1)
        stream.close(drain_s=0.1)
        with pytest.raises(OutcomeUnknown, match="closed"):
            waiting.result(WAIT_S)
    assert shop.called.total() == 0


def test_a_closed_channel_ends_the_stream(shop: Shop, target: str, sales: list[Sale]) -> None:
    """Also for those who wait for an answer, and nothing is retried."""
    shop.unanswered = {sales[0].idempotency_key}
    with connect(target) as channel, ThreadPoolExecutor() as tills:
        stream = PosClient(channel, pause=lambda *_: pytest.fail("retried")).open_stream()
        waiting = tills.submit(stream.record, sales[0])
        until(lambda: shop.streamed.total() == 1)
        channel.close()
        attempts: list[Callable[[], Recorded]] = [waiting.result, lambda: stream.record(sales[1])]
        for attempt in attempts:
            with pytest.raises(OutcomeUnknown, match="closed"):
                attempt()
        stream.close()


def test_no_thread_is_left(target: str, sales: list[Sale], pauses: list[float]) -> None:
    """Those of a stream end with it."""
    before = threading.active_count()
    for _ in range(5):
        with opened(target, pauses) as stream:
            stream.record(sales[0])
    until(lambda: threading.active_count() <= before + 2)  # gRPC's own for a channel come and go
