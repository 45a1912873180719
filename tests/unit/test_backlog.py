"""Uploading a backlog, against a small purchases service in memory."""

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from unittest.mock import ANY

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from pos.backlog import Backlog
from pos.client import PosClient, Recorded, Sale, connect
from pos.errors import InvalidSale, OutcomeUnknown, PosError, ReceiptTaken
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
def sales() -> list[Sale]:
    return list(islice(simulate(1), 2_900))


def upload(target: str, sales: list[Sale], **settings: float) -> tuple[dict[str, Recorded | PosError], list[float]]:
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
