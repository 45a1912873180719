"""Uploading a backlog, against a small purchases service in memory."""

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any
from unittest.mock import ANY

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from pos.backlog import Backlog
from pos.client import Item, PosClient, Recorded, Sale, connect
from pos.errors import ClockAhead, InvalidSale, OutcomeUnknown, PosError, ReceiptTaken
from pos.simulator import simulate
from pos.tills import Repetition, SaleFailed, repeats
from pos.upload import IN_FLIGHT, SALES_PER_MESSAGE
from retail.purchases.v1 import purchases_service_pb2 as pb2

NAME = pb2.DESCRIPTOR.services_by_name["PurchasesService"].full_name


class Depot:
    """Stores uploaded sales by key, as the service does; breaks, refuses and puts off on demand."""

    def __init__(self) -> None:
        self.attempts: Counter[str] = Counter()
        self.message_sizes: list[int] = []
        self.streams = 0
        self.breaks = 0  # streams that are still to break: all is stored, half of it is answered
        self.refused_receipt = ""
        self.busy_for = 0  # sales that are still to be told to come again
        self.ahead: dict[str, int] = {}  # keys of sales whose time is so many seconds ahead, when they first come
        self.closed = threading.Event()
        self._stored: dict[str, str] = {}

    def upload(
        self, requests: Iterator[pb2.UploadPurchasesRequest], context: grpc.ServicerContext
    ) -> Iterator[pb2.UploadPurchasesResponse]:
        self.streams += 1
        if self.closed.is_set():
            context.abort(grpc.StatusCode.UNAVAILABLE, "closed for now")
        for request in requests:
            self.message_sizes.append(len(request.uploads))
            results = [self._result(upload) for upload in request.uploads]
            if self.breaks:
                self.breaks -= 1
                yield pb2.UploadPurchasesResponse(results=results[::2])
                context.abort(grpc.StatusCode.UNAVAILABLE, "the server went away")
            yield pb2.UploadPurchasesResponse(results=reversed(results))

    def _result(self, upload: pb2.PurchaseUpload) -> pb2.PurchaseUploadResult:
        sale = upload.create_purchase
        self.attempts[sale.idempotency_key] += 1
        result = pb2.PurchaseUploadResult(sequence_number=upload.sequence_number)
        if sale.purchase.receipt_id == self.refused_receipt:
            result.error.CopyFrom(status(grpc.StatusCode.ALREADY_EXISTS, "RECEIPT_EXISTS", "taken"))
        elif wait_s := self.ahead.get(sale.idempotency_key, 0) if self.attempts[sale.idempotency_key] == 1 else 0:
            result.error.CopyFrom(status(grpc.StatusCode.UNAVAILABLE, "PURCHASE_TIME_AHEAD", "ahead", wait_s))
        elif self.busy_for:
            self.busy_for -= 1
            result.error.CopyFrom(status(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", "busy", retry_after_s=3))
        else:
            result.created.replayed = sale.idempotency_key in self._stored
            result.created.purchase.CopyFrom(sale.purchase)
            new_id = f"purchase {len(self._stored)}"
            result.created.purchase.purchase_id = self._stored.setdefault(sale.idempotency_key, new_id)
        return result

    @contextmanager
    def open(self) -> Iterator[str]:
        """Serve while the block runs; gives the address."""
        handler = grpc.stream_stream_rpc_method_handler(
            self.upload,
            request_deserializer=pb2.UploadPurchasesRequest.FromString,
            response_serializer=pb2.UploadPurchasesResponse.SerializeToString,
        )
        server = grpc.server(ThreadPoolExecutor(4))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, {"UploadPurchases": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def status(code: grpc.StatusCode, reason: str, text: str, retry_after_s: int = 0) -> status_pb2.Status:
    built = status_pb2.Status(code=code.value[0], message=text)
    details = [error_details_pb2.ErrorInfo(reason=reason)]
    if retry_after_s:
        details.append(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=retry_after_s)))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        built.details.append(packed)
    return built


@pytest.fixture
def depot() -> Depot:
    return Depot()


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with Depot().open() as target:
        yield target


@pytest.fixture(scope="module")
def sales() -> list[Sale]:
    return list(islice(simulate(1), 2_900))


def upload(target: str, sales: list[Sale], **settings: Any) -> tuple[dict[str, Recorded | PosError], list[float]]:
    """The outcomes by key, and the pauses that were asked for and not slept."""
    pauses: list[float] = []
    with connect(target) as channel:
        client = PosClient(channel, pause=lambda pause_s, _: pauses.append(pause_s), **settings)
        outcomes = list(client.upload_purchases(iter(sales), register_customers=True))
    assert len(outcomes) == len({each.sale.idempotency_key for each in outcomes})
    return {each.sale.idempotency_key: each.outcome for each in outcomes}, pauses


def test_full_messages_and_one_outcome_for_each_sale(depot: Depot, sales: list[Sale]) -> None:
    """Everything goes over one stream in messages of the greatest size, and each sale is answered once."""
    with depot.open() as target:
        outcomes, pauses = upload(target, sales)
    assert depot.message_sizes == [SALES_PER_MESSAGE] * 5 + [400]
    assert (depot.streams, pauses) == (1, [])
    assert set(depot.attempts.values()) == {1}
    for sale in sales:
        outcome = outcomes[sale.idempotency_key]
        assert isinstance(outcome, Recorded)
        assert outcome.purchase.receipt_id == sale.receipt_id


def test_sales_that_are_too_big_spare_their_neighbours(depot: Depot, sales: list[Sale]) -> None:
    """What would burst its message is not sent but refused, also when there is nothing else to send."""
    big = [dataclasses.replace(sale, receipt_id="9" * 1_000_000) for sale in sales[1:9:3]]
    few = [sales[0], *big, sales[10]]
    with depot.open() as target:
        outcomes, pauses = upload(target, few)
        assert upload(target, big) == ({sale.idempotency_key: ANY for sale in big}, [])
        with connect(target) as channel, pytest.raises(InvalidSale):
            PosClient(channel).create_purchase(big[0])
    assert {key for key, each in outcomes.items() if isinstance(each, InvalidSale)} == {
        sale.idempotency_key for sale in big
    }
    assert (depot.attempts.total(), pauses) == (2, [])


def test_no_sales_at_all(depot: Depot) -> None:
    """An empty backlog is sent at once."""
    with depot.open() as target:
        assert upload(target, []) == ({}, [])


def test_sales_are_taken_as_they_are_needed(depot: Depot, sales: list[Sale]) -> None:
    """A backlog that is longer than memory can be sent: only some thousand sales are on their way."""
    taken = 0

    def source() -> Iterator[Sale]:
        nonlocal taken
        for sale in sales:
            taken += 1
            yield sale

    with depot.open() as target, connect(target) as channel:
        for answered, _ in enumerate(PosClient(channel).upload_purchases(source())):
            assert taken - answered <= IN_FLIGHT + SALES_PER_MESSAGE


def test_a_stream_that_breaks_is_resumed(depot: Depot, sales: list[Sale]) -> None:
    """Only what was not answered is sent again, and counts once."""
    depot.breaks = 2
    with depot.open() as target:
        outcomes, pauses = upload(target, sales)
    assert len(outcomes) == len(sales)
    assert (depot.streams, len(pauses)) == (3, 2)
    assert sum(depot.attempts.values()) >= len(sales) + SALES_PER_MESSAGE
    assert {count for key, count in depot.attempts.items() if key == sales[0].idempotency_key} == {1}
    assert sum(isinstance(each, Recorded) and each.replayed for each in outcomes.values()) >= SALES_PER_MESSAGE // 2


def test_sales_that_are_put_off_come_again(depot: Depot, sales: list[Sale]) -> None:
    """Some sales find the service busy: they are sent again after the pause that it asks for."""
    depot.busy_for = 3
    with depot.open() as target:
        outcomes, pauses = upload(target, sales)
    assert all(isinstance(each, Recorded) for each in outcomes.values())
    assert depot.streams == 2
    assert len(pauses) == 1 and pauses[0] >= 3
    assert [depot.attempts[sale.idempotency_key] for sale in sales[:4]] == [2, 2, 2, 1]


def test_a_refused_sale_spares_the_others(depot: Depot, sales: list[Sale]) -> None:
    """What is refused for good is told, and the rest is stored."""
    depot.refused_receipt = sales[30].receipt_id
    with depot.open() as target:
        outcomes, _ = upload(target, sales)
    refused = [sale for sale in sales if sale.receipt_id == depot.refused_receipt]
    assert all(isinstance(outcomes.pop(sale.idempotency_key), ReceiptTaken) for sale in refused)
    assert all(isinstance(each, Recorded) for each in outcomes.values())


def test_sales_that_cannot_be_sent_spare_their_neighbours(depot: Depot, sales: list[Sale]) -> None:
    """Whatever is wrong with a sale is its own matter: it is refused by name, and all others are stored."""
    spoilt: dict[str, Any] = {
        "product": dataclasses.replace(sales[10], items=[Item(2**70, 100)]),
        "branch": dataclasses.replace(sales[11], branch_id=-(2**70)),
        "receipt": dataclasses.replace(sales[12], receipt_id="\ud800"),
        "time": dataclasses.replace(sales[13], purchase_time=sales[13].purchase_time.replace(tzinfo=None)),
        "price": dataclasses.replace(sales[14], items=[Item(1001, 8.9)]),  # type: ignore[arg-type]
        "number": dataclasses.replace(sales[15], receipt_id=4711),  # type: ignore[arg-type]
        "nothing": None,
    }
    backlog: list[Any] = list(sales[:700])
    for place, sale in enumerate(spoilt.values()):
        backlog.insert(100 * place, sale)
    with depot.open() as target, connect(target) as channel:
        outcomes = list(PosClient(channel).upload_purchases(backlog))
        for sale in spoilt.values():
            with pytest.raises(InvalidSale):
                PosClient(channel).create_purchase(sale)
    refused = [each for each in outcomes if not isinstance(each.outcome, Recorded)]
    assert {id(each.sale) for each in refused} == {id(sale) for sale in spoilt.values()}
    assert all(isinstance(each.outcome, InvalidSale) for each in refused)
    assert len(outcomes) == 707 and len(depot.attempts) == 700
    named = {name: each for name, sale in spoilt.items() for each in refused if each.sale is sale}
    assert "purchase.branch_id" in str(named["branch"].outcome)
    assert "purchase.items[0]" in str(named["price"].outcome)


def test_a_sale_of_the_future_spares_its_neighbours(depot: Depot, sales: list[Sale]) -> None:
    """One that is seconds ahead is sent again at the end; one that is hours ahead is told so at once."""
    seconds, hours = sales[3].idempotency_key, sales[4].idempotency_key
    depot.ahead = {seconds: 7, hours: 7_200}
    with depot.open() as target:
        outcomes, pauses = upload(target, sales)
    assert pauses == [7.0]
    assert isinstance(outcomes.pop(hours), ClockAhead)
    assert all(isinstance(outcome, Recorded) for outcome in outcomes.values())
    assert len(outcomes) == len(sales) - 1
    assert depot.attempts[seconds] == 2


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=2**31),
    st.floats(),
    st.decimals(),
    st.text(st.characters(codec=None)),
    st.binary(),
    st.datetimes(),
    st.datetimes(timezones=st.timezones()),
    st.lists(st.integers()),
    st.dictionaries(st.text(), st.integers()),
    st.just(object()),
)
AMOUNTS = st.one_of(st.integers(min_value=0, max_value=10**15), ANYTHING)
ITEMS = st.one_of(ANYTHING, st.lists(st.one_of(ANYTHING, st.builds(Item, AMOUNTS, AMOUNTS)), max_size=4))
SALES = st.one_of(
    ANYTHING,
    st.builds(
        Sale,
        receipt_id=ANYTHING,
        branch_id=ANYTHING,
        cashier_id=ANYTHING,
        pos_id=ANYTHING,
        items=ITEMS,
        customer_id=ANYTHING,
        purchase_time=ANYTHING,
        idempotency_key=st.one_of(ANYTHING, st.uuids().map(str)),
    ),
)
METHODS: dict[str, Callable[[PosClient, list[Any]], Any]] = {
    "create": lambda client, values: client.create_purchase(values[0], register_customer=values[1]),
    "upload": lambda client, values: list(client.upload_purchases(values[2], register_customers=values[1])),
    "stream": lambda client, values: client.open_stream().record(values[0], register_customer=values[1]),
    "get": lambda client, values: client.get_purchase(values[1]),
    "list": lambda client, values: list(
        client.list_purchases(customer_id=values[1], branch_id=values[3], start_time=values[4], end_time=values[5])
    ),
    "totals": lambda client, values: list(client.list_control_totals(values[1], values[3], branch_ids=values[2])),
    "customer": lambda client, values: client.create_customer(values[1]),
    "known customer": lambda client, values: client.get_customer(values[1]),
}


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_nothing_but_pos_errors_leaves_the_library(target: str, data: st.DataObject) -> None:
    """Whatever is put in: each call returns, or raises an error of the documented tree; so do a sale's outcomes."""
    method = data.draw(st.sampled_from(sorted(METHODS)))
    values = [
        data.draw(SALES),
        data.draw(ANYTHING),
        data.draw(st.one_of(ANYTHING, st.lists(SALES, max_size=5))),
        *data.draw(st.tuples(ANYTHING, ANYTHING, ANYTHING)),
    ]
    with connect(target) as channel, suppress(PosError):
        result = METHODS[method](PosClient(channel, total_timeout_s=0.5, attempt_timeout_s=0.5), values)
        if method == "upload":
            assert len(result) == len(values[2])


def test_patience_ends(depot: Depot, sales: list[Sale]) -> None:
    """Without any answer for the total timeout, the outcome is unknown."""
    depot.closed.set()
    with depot.open() as target, pytest.raises(OutcomeUnknown, match="closed for now"):
        upload(target, sales, total_timeout_s=0.05)


def test_a_backlog_counts_what_it_sends(depot: Depot, sales: list[Sale]) -> None:
    """The same sales are sent twice as by the tills, and a second run finds everything stored."""
    twice = sum(repeats(sale, 1) is not None for sale in sales)
    assert {repeats(sale, 1) for sale in sales} == {None, *Repetition}
    with depot.open() as target:
        for replayed in (0, len(sales)):
            with Backlog(sales, target, seed=1) as backlog:
                assert backlog.wait(60)
            assert (backlog.recorded, backlog.replayed, backlog.duplicates_sent) == (len(sales), replayed, twice)
    assert set(depot.attempts.values()) == {2, 4}


def test_a_backlog_stops_at_a_refused_sale(depot: Depot, sales: list[Sale]) -> None:
    """The error names the receipt and what the service said."""
    depot.refused_receipt = sales[30].receipt_id
    with (
        depot.open() as target,
        pytest.raises(SaleFailed, match=rf"{depot.refused_receipt} \(branch .*RECEIPT_EXISTS: taken"),
        Backlog(sales, target, seed=1) as backlog,
    ):
        backlog.wait(60)


def test_leaving_a_backlog_early_is_quick(depot: Depot, sales: list[Sale]) -> None:
    """While it waits for a service that is away, it shows why, and ends at once when it is left."""
    depot.closed.set()
    with depot.open() as target:
        with Backlog(sales, target, seed=1) as backlog:
            deadline = time.monotonic() + 30
            while backlog.trouble is None and time.monotonic() < deadline:
                assert not backlog.wait(0.01)
            assert "closed for now" in str(backlog.trouble)
            started = time.monotonic()
        assert time.monotonic() - started < 10
