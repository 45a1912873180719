"""The till's client library, against the service played by hand through grpcio-testing's channel."""

import datetime
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import grpc_testing
import pytest
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2
from google.type import date_pb2, decimal_pb2
from grpc import StatusCode

from pos import errors
from pos.calls import pause_before_retry
from pos.client import BusinessDays, DayTotals, Item, PosClient, Sale, connect
from pos.errors import PosError
from pos.service_config import FIRST_BACKOFF_S, MOST_BACKOFF_S, TOTAL_TIMEOUT_S
from retail.purchases.v1 import customers_service_pb2, purchase_pb2, purchases_service_pb2

T = TypeVar("T")

PURCHASES = purchases_service_pb2.DESCRIPTOR.services_by_name["PurchasesService"]
CUSTOMERS = customers_service_pb2.DESCRIPTOR.services_by_name["CustomersService"]
CREATE = PURCHASES.methods_by_name["CreatePurchase"]
GET = PURCHASES.methods_by_name["GetPurchase"]
LIST = PURCHASES.methods_by_name["ListPurchases"]
TOTALS = PURCHASES.methods_by_name["ListControlTotals"]

MORNING = datetime.datetime(2026, 3, 2, 9, 30, 15, 123456, tzinfo=datetime.UTC)
PURCHASE_ID = "0195-stored"


class Service:
    """The service's side of a client's calls: takes them one by one, and answers each as the test says."""

    def __init__(self) -> None:
        self.channel = grpc_testing.channel([PURCHASES, CUSTOMERS], grpc_testing.strict_real_time())
        self.pauses: list[float] = []  # the client's pauses between attempts, asked for and not slept
        self._threads = ThreadPoolExecutor()

    def client(self, **settings: Any) -> PosClient:
        return PosClient(self.channel, pause=lambda pause_s, _: self.pauses.append(pause_s), **settings)

    def during(self, call: Callable[[], T]) -> Future[T]:
        return self._threads.submit(call)

    def take(self, method: Any) -> tuple[Any, Any]:
        _, request, rpc = self.channel.take_unary_unary(method)
        return request, rpc

    def close(self) -> None:
        self._threads.shutdown()


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


def a_sale() -> Sale:
    return Sale(
        receipt_id="4711",
        branch_id=3,
        cashier_id=17,
        pos_id="POS-2",
        customer_id="7f0c1b1e-6f0c-4f0e-9d43-5d8a4e1f2a3b",
        purchase_time=MORNING,
        items=[Item(1001, 890), Item(2007, 12470), Item(3, 5)],
    )


def stored(request: Any) -> purchases_service_pb2.CreatePurchaseResponse:
    purchase = purchase_pb2.Purchase()
    purchase.CopyFrom(request.purchase)
    purchase.purchase_id = PURCHASE_ID
    purchase.create_time.FromDatetime(MORNING)
    return purchases_service_pb2.CreatePurchaseResponse(purchase=purchase, consistency_token="token")


def answer(rpc: Any, reply: message.Message) -> None:
    rpc.terminate(reply, (), StatusCode.OK, "")


def refuse(rpc: Any, code: StatusCode, *details: message.Message) -> None:
    """Answer with a status and, when there are details, the rich form of it."""
    status = status_pb2.Status(code=code.value[0], message="no")
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    metadata = (("grpc-status-details-bin", status.SerializeToString()),) if details else ()
    rpc.terminate(None, metadata, code, "no")


def info(reason: str, **metadata: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain="purchases.retail.example", metadata=metadata)


def retry_after(seconds: float) -> error_details_pb2.RetryInfo:
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(round(seconds * 1000))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def amount(value: str) -> decimal_pb2.Decimal:
    return decimal_pb2.Decimal(value=value)


def test_sale_becomes_the_message_of_the_contract(service: Service) -> None:
    """Every field of a sale arrives, amounts with two fraction digits and the receipt's total among them."""
    sale = a_sale()
    call = service.during(lambda: service.client().create_purchase(sale, register_customer=True))
    request, rpc = service.take(CREATE)
    answer(rpc, stored(request))
    call.result()

    expected = purchases_service_pb2.CreatePurchaseRequest(
        idempotency_key=sale.idempotency_key,
        register_customer=True,
        purchase=purchase_pb2.Purchase(
            receipt_id="4711",
            branch_id=3,
            cashier_id=17,
            pos_id="POS-2",
            customer_id="7f0c1b1e-6f0c-4f0e-9d43-5d8a4e1f2a3b",
            total_amount=amount("133.65"),
            items=[
                purchase_pb2.PurchaseItem(product_id=1001, quantity=1, unit_price=amount("8.90")),
                purchase_pb2.PurchaseItem(product_id=2007, quantity=1, unit_price=amount("124.70")),
                purchase_pb2.PurchaseItem(product_id=3, quantity=1, unit_price=amount("0.05")),
            ],
        ),
    )
    expected.purchase.purchase_time.FromDatetime(MORNING)
    assert expected == request


def test_recorded_sale_comes_back_as_plain_values(service: Service) -> None:
    """The answer to a sale holds the stored purchase, whether it was a replay, and the consistency token."""
    sale = a_sale()
    call = service.during(lambda: service.client().create_purchase(sale))
    request, rpc = service.take(CREATE)
    reply = stored(request)
    reply.replayed = True
    answer(rpc, reply)

    recorded = call.result()
    assert recorded.replayed
    assert recorded.consistency_token == "token"
    assert recorded.purchase.purchase_id == PURCHASE_ID
    assert recorded.purchase.items == tuple(sale.items)
    assert recorded.purchase.total_cents == 13365
    assert recorded.purchase.purchase_time == MORNING
    assert recorded.purchase.customer_id == sale.customer_id


def test_anonymous_sale_names_no_customer(service: Service) -> None:
    """Without a customer the field is absent, not empty, both ways."""
    sale = Sale(receipt_id="1", branch_id=1, cashier_id=1, pos_id="POS-1", items=[Item(1, 1)])
    call = service.during(lambda: service.client().create_purchase(sale))
    request, rpc = service.take(CREATE)
    assert not request.purchase.HasField("customer_id")
    answer(rpc, stored(request))
    assert call.result().purchase.customer_id is None


def test_every_sale_has_a_key_of_its_own() -> None:
    """Two sales with the same content are two sales."""
    assert a_sale().idempotency_key != a_sale().idempotency_key


@pytest.mark.parametrize(
    "code",
    [
        StatusCode.UNAVAILABLE,
        StatusCode.DEADLINE_EXCEEDED,
        StatusCode.ABORTED,
        StatusCode.RESOURCE_EXHAUSTED,
        StatusCode.CANCELLED,  # not by the till: gRPC throws calls away that it has no room for
    ],
)
def test_passing_trouble_is_retried_with_the_same_key(service: Service, code: StatusCode) -> None:
    """After a passing trouble the very same request is sent again, key included, until it is answered."""
    call = service.during(lambda: service.client().create_purchase(a_sale()))
    seen = []
    for _ in range(3):
        request, rpc = service.take(CREATE)
        seen.append(request.SerializeToString(deterministic=True))
        refuse(rpc, code)
    request, rpc = service.take(CREATE)
    seen.append(request.SerializeToString(deterministic=True))
    answer(rpc, stored(request))

    assert call.result().purchase.purchase_id == PURCHASE_ID
    assert len(set(seen)) == 1
    assert len(service.pauses) == 3


def test_pauses_are_jittered_and_bounded(service: Service) -> None:
    """Pauses between attempts differ, never exceed the bound, and may be as long as the doubled backoff."""
    call = service.during(lambda: service.client().create_purchase(a_sale()))
    for _ in range(12):
        _, rpc = service.take(CREATE)
        refuse(rpc, StatusCode.UNAVAILABLE)
    request, rpc = service.take(CREATE)
    answer(rpc, stored(request))
    call.result()

    assert all(0 <= pause_s <= MOST_BACKOFF_S for pause_s in service.pauses)
    assert service.pauses[0] <= 0.1
    assert len(set(service.pauses)) == 12


def test_client_waits_at_least_as_long_as_the_service_asks(service: Service) -> None:
    """RetryInfo is honoured: the pause is never shorter, and at most twice as long."""
    call = service.during(lambda: service.client().create_purchase(a_sale()))
    _, rpc = service.take(CREATE)
    refuse(rpc, StatusCode.RESOURCE_EXHAUSTED, info("OVERLOADED"), retry_after(3.5))
    request, rpc = service.take(CREATE)
    answer(rpc, stored(request))
    call.result()

    assert 3.5 <= service.pauses[0] <= 7.0


def test_tills_that_failed_together_do_not_come_back_together() -> None:
    """What is told to wait a second comes back spread over the second after it."""
    busy = errors.Status(StatusCode.RESOURCE_EXHAUSTED, "busy", retry_delay_s=1.0)
    pauses = [pause_before_retry(busy, FIRST_BACKOFF_S, TOTAL_TIMEOUT_S) or 0.0 for _ in range(2_000)]
    tenths = Counter(int(10 * pause_s) for pause_s in pauses)
    assert set(tenths) == set(range(10, 20))
    assert max(tenths.values()) < 400


def test_a_time_to_wait_for_is_not_missed_for_the_jitter() -> None:
    """A sale that is taken in 20 s is sent again within 30."""
    ahead = errors.Status(StatusCode.UNAVAILABLE, "ahead", retry_delay_s=20.0)
    assert all(20 <= (pause_before_retry(ahead, FIRST_BACKOFF_S, 30.0) or 0) < 26 for _ in range(1_000))
    assert pause_before_retry(ahead, FIRST_BACKOFF_S, 19.0) is None


def test_a_sale_of_the_future_is_not_refused(service: Service) -> None:
    """It is told by how much its time is ahead, and can be sent again."""
    call = service.during(lambda: service.client().create_purchase(a_sale()))
    _, rpc = service.take(CREATE)
    refuse(rpc, StatusCode.UNAVAILABLE, info("PURCHASE_TIME_AHEAD", ahead_seconds="7200.5"), retry_after(3600))
    with pytest.raises(errors.ClockAhead) as caught:
        call.result()
    assert isinstance(caught.value, errors.OutcomeUnknown)
    assert caught.value.ahead == datetime.timedelta(hours=2, milliseconds=500)


def test_a_closed_channel_ends_the_call() -> None:
    """It is not retried: nothing will come of it."""
    with connect("127.0.0.1:1") as channel:
        client = PosClient(channel, pause=lambda *_: pytest.fail("retried"))
    with pytest.raises(errors.OutcomeUnknown, match="closed"):
        client.create_purchase(a_sale())
    with pytest.raises(errors.Unavailable, match="closed"):
        client.get_purchase(PURCHASE_ID)
    with pytest.raises(errors.OutcomeUnknown, match="closed"):
        list(client.upload_purchases([a_sale()]))


def test_no_retry_that_would_come_after_the_total_deadline(service: Service) -> None:
    """A service that asks for more patience than there is gets no second attempt; the outcome is unknown."""
    call = service.during(lambda: service.client(total_timeout_s=5).create_purchase(a_sale()))
    _, rpc = service.take(CREATE)
    refuse(rpc, StatusCode.UNAVAILABLE, info("DATABASE_UNAVAILABLE"), retry_after(6))

    with pytest.raises(errors.OutcomeUnknown, match="DATABASE_UNAVAILABLE"):
        call.result()
    assert service.pauses == []


def test_no_retry_after_a_pause_that_took_too_long(service: Service) -> None:
    """A till that slept through its deadline, as a suspended machine does, does not send the sale again."""
    client = PosClient(service.channel, total_timeout_s=0.3, pause=lambda *_: time.sleep(0.35))
    call = service.during(lambda: client.create_purchase(a_sale()))
    _, rpc = service.take(CREATE)
    refuse(rpc, StatusCode.UNAVAILABLE)
    with pytest.raises(errors.OutcomeUnknown):
        call.result()


def test_every_attempt_and_the_whole_call_have_a_deadline() -> None:
    """A service that accepts connections and never answers costs the till its total timeout, in several attempts."""
    attempts: list[PosError] = []

    def pause(_: float, why: PosError) -> None:
        attempts.append(why)

    with socket.create_server(("127.0.0.1", 0)) as deaf, connect(f"127.0.0.1:{deaf.getsockname()[1]}") as channel:
        client = PosClient(channel, attempt_timeout_s=0.1, total_timeout_s=1.0, pause=pause)
        started = time.monotonic()
        with pytest.raises(errors.OutcomeUnknown, match="DEADLINE_EXCEEDED"):
            client.create_purchase(a_sale())
        elapsed = time.monotonic() - started
    assert 0.1 < elapsed < 20  # and not as long as a till would wait by default
    assert 1 <= len(attempts) <= 10


def test_what_a_pause_raises_ends_the_call(service: Service) -> None:
    """A till that is being closed leaves a call between two attempts."""

    class Closing(Exception):
        pass

    def pause(_: float, __: PosError) -> None:
        raise Closing

    call = service.during(lambda: PosClient(service.channel, pause=pause).create_purchase(a_sale()))
    _, rpc = service.take(CREATE)
    refuse(rpc, StatusCode.UNAVAILABLE)
    with pytest.raises(Closing):
        call.result()


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (StatusCode.INVALID_ARGUMENT, "INVALID_PURCHASE", errors.InvalidSale),
        (StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE", errors.InvalidSale),
        (StatusCode.ALREADY_EXISTS, "RECEIPT_EXISTS", errors.ReceiptTaken),
        (StatusCode.FAILED_PRECONDITION, "IDEMPOTENCY_KEY_REUSED", errors.IdempotencyKeyReused),
        (StatusCode.FAILED_PRECONDITION, "CUSTOMER_NOT_FOUND", errors.CustomerUnknown),
        (StatusCode.OUT_OF_RANGE, "PURCHASE_TIME_OUT_OF_RANGE", errors.PurchaseTimeOutOfRange),
        (StatusCode.FAILED_PRECONDITION, "A_REASON_OF_THE_FUTURE", errors.SaleRefused),
        (StatusCode.INTERNAL, "INTERNAL", errors.OutcomeUnknown),
        (StatusCode.UNKNOWN, "", errors.OutcomeUnknown),
        (StatusCode.PERMISSION_DENIED, "", errors.CallFailed),
        (StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED", errors.CallFailed),
    ],
)
def test_each_refusal_has_its_class_and_is_never_retried(
    service: Service, code: StatusCode, reason: str, expected: type[PosError]
) -> None:
    """A definite answer ends the call at once, as the exception that tells what to do about the sale."""
    call = service.during(lambda: service.client().create_purchase(a_sale()))
    _, rpc = service.take(CREATE)
    refuse(rpc, code, *([info(reason)] if reason else []))
    with pytest.raises(PosError) as caught:
        call.result()
    assert type(caught.value) is expected
    assert service.pauses == []


def test_invalid_sale_names_every_violation(service: Service) -> None:
    """All broken fields come with their paths, so that the till can show them at once."""
    call = service.during(lambda: service.client().create_purchase(a_sale()))
    _, rpc = service.take(CREATE)
    fields = error_details_pb2.BadRequest()
    fields.field_violations.add(field="purchase.branch_id", description="must be positive", reason="NOT_POSITIVE")
    fields.field_violations.add(field="purchase.items[2].quantity", description="must be 1")
    refuse(rpc, StatusCode.INVALID_ARGUMENT, info("INVALID_PURCHASE"), fields)
    with pytest.raises(errors.InvalidSale) as caught:
        call.result()
    assert caught.value.violations == (
        ("purchase.branch_id", "must be positive", "NOT_POSITIVE"),
        ("purchase.items[2].quantity", "must be 1", ""),  # a service that says no more
    )


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (StatusCode.ALREADY_EXISTS, "RECEIPT_EXISTS"),
        (StatusCode.FAILED_PRECONDITION, "IDEMPOTENCY_KEY_REUSED"),
    ],
)
def test_the_sale_in_the_way_is_named(service: Service, code: StatusCode, reason: str) -> None:
    """A taken receipt and a reused key tell which stored purchase has it."""
    call = service.during(lambda: service.client().create_purchase(a_sale()))
    _, rpc = service.take(CREATE)
    refuse(rpc, code, info(reason, purchase_id="the-other"))
    with pytest.raises((errors.ReceiptTaken, errors.IdempotencyKeyReused)) as caught:
        call.result()
    assert caught.value.purchase_id == "the-other"


def test_broken_details_do_not_hide_the_status(service: Service) -> None:
    """Details that are no google.rpc.Status count as none."""
    call = service.during(lambda: service.client().create_purchase(a_sale()))
    _, rpc = service.take(CREATE)
    rpc.terminate(None, (("grpc-status-details-bin", b"\xff\xff\xff"),), StatusCode.INVALID_ARGUMENT, "no")
    with pytest.raises(errors.InvalidSale, match="INVALID_ARGUMENT: no"):
        call.result()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (StatusCode.NOT_FOUND, errors.NotFound),
        (StatusCode.INVALID_ARGUMENT, errors.InvalidRequest),
        (StatusCode.INTERNAL, errors.CallFailed),
    ],
)
def test_reads_have_errors_of_their_own(service: Service, code: StatusCode, expected: type[PosError]) -> None:
    """A read that fails is never an unknown outcome: nothing was to be stored."""
    call = service.during(lambda: service.client().get_purchase("x"))
    request, rpc = service.take(GET)
    assert request.purchase_id == "x"
    refuse(rpc, code)
    with pytest.raises(PosError) as caught:
        call.result()
    assert type(caught.value) is expected


def test_read_that_meets_trouble_too_long_is_unavailable(service: Service) -> None:
    """A read gives up after its total timeout and says that trying later may help."""
    call = service.during(lambda: service.client(total_timeout_s=1).get_purchase("x"))
    _, rpc = service.take(GET)
    refuse(rpc, StatusCode.UNAVAILABLE, retry_after(2))
    with pytest.raises(errors.Unavailable):
        call.result()


def test_listing_fetches_page_after_page(service: Service) -> None:
    """All purchases of all pages come in order, asked for with the same filters and the page's token."""
    client = service.client()
    call = service.during(lambda: list(client.list_purchases(branch_id=2, start_time=MORNING)))
    sent = []
    for ids, token in ((["a", "b"], "next"), (["c"], "")):
        request, rpc = service.take(LIST)
        sent.append((request.page_token, request.branch_id, request.HasField("customer_id")))
        assert request.start_time.ToDatetime(datetime.UTC) == MORNING
        purchases = [purchase_pb2.Purchase(purchase_id=i, total_amount=amount("1.00")) for i in ids]
        answer(rpc, purchases_service_pb2.ListPurchasesResponse(purchases=purchases, next_page_token=token))

    assert [purchase.purchase_id for purchase in call.result()] == ["a", "b", "c"]
    assert sent == [("", 2, False), ("next", 2, False)]


def a_date(day: datetime.date) -> date_pb2.Date:
    return date_pb2.Date(year=day.year, month=day.month, day=day.day)


def a_row(day: datetime.date, branch_id: int) -> purchases_service_pb2.ControlTotals:
    return purchases_service_pb2.ControlTotals(
        sales_date=a_date(day),
        branch_id=branch_id,
        purchase_count=4,
        purchase_with_customer_count=3,
        item_count=9,
        revenue=amount("1234567890123.45"),
    )


def test_control_totals_cover_all_days_in_windows(service: Service) -> None:
    """Without dates, every stored day is asked for exactly once, at most 31 days a call, all pages of each."""
    first, last = datetime.date(2026, 1, 1), datetime.date(2026, 2, 5)
    call = service.during(lambda: list(service.client().list_control_totals()))
    _, rpc = service.take(TOTALS)
    days = purchases_service_pb2.ListControlTotalsResponse(
        time_zone="UTC", earliest_sales_date=a_date(first), latest_sales_date=a_date(last)
    )
    answer(rpc, days)
    asked = []
    for row, token in ((a_row(first, 1), "more"), (a_row(first, 2), ""), (a_row(last, 1), "")):
        request, rpc = service.take(TOTALS)
        asked.append((request.first_date.month, request.first_date.day, request.last_date.month, request.last_date.day))
        answer(rpc, purchases_service_pb2.ListControlTotalsResponse(control_totals=[row], next_page_token=token))

    assert call.result() == [
        DayTotals(first, 1, 4, 3, 9, 123456789012345),
        DayTotals(first, 2, 4, 3, 9, 123456789012345),
        DayTotals(last, 1, 4, 3, 9, 123456789012345),
    ]
    assert asked == [(1, 1, 1, 31), (1, 1, 1, 31), (2, 1, 2, 5)]


def test_control_totals_of_an_empty_chain_are_empty(service: Service) -> None:
    """When nothing is stored there are no business days, and nothing to list."""
    client = service.client()
    for call in (service.during(client.business_days), service.during(lambda: list(client.list_control_totals()))):
        _, rpc = service.take(TOTALS)
        answer(rpc, purchases_service_pb2.ListControlTotalsResponse(time_zone="Europe/Berlin"))
        assert call.result() in (BusinessDays(None, None, "Europe/Berlin"), [])


def test_customer_is_registered_under_one_id_whatever_happens(service: Service) -> None:
    """The id is made before the first attempt, so a retry cannot register a second customer."""
    create = CUSTOMERS.methods_by_name["CreateCustomer"]
    call = service.during(service.client().create_customer)
    first, rpc = service.take(create)
    refuse(rpc, StatusCode.UNAVAILABLE)
    second, rpc = service.take(create)
    customer = customers_service_pb2.Customer(customer_id=second.customer_id)
    answer(rpc, customers_service_pb2.CreateCustomerResponse(customer=customer))

    assert first.customer_id == second.customer_id == call.result().customer_id != ""


def test_customers_are_read_and_listed(service: Service) -> None:
    """One customer by id, all of them page by page; an unknown one is not found."""
    client = service.client()
    get, listing = (CUSTOMERS.methods_by_name[name] for name in ("GetCustomer", "ListCustomers"))
    one = service.during(lambda: client.get_customer("a"))
    _, rpc = service.take(get)
    answer(rpc, customers_service_pb2.GetCustomerResponse(customer=customers_service_pb2.Customer(customer_id="a")))
    assert one.result().customer_id == "a"

    unknown = service.during(lambda: client.get_customer("b"))
    _, rpc = service.take(get)
    refuse(rpc, StatusCode.NOT_FOUND, info("CUSTOMER_NOT_FOUND"))
    with pytest.raises(errors.NotFound):
        unknown.result()

    everyone = service.during(lambda: list(client.list_customers()))
    for name, token in (("a", "next"), ("b", "")):
        _, rpc = service.take(listing)
        customers = [customers_service_pb2.Customer(customer_id=name)]
        answer(rpc, customers_service_pb2.ListCustomersResponse(customers=customers, next_page_token=token))
    assert [customer.customer_id for customer in everyone.result()] == ["a", "b"]


def test_nobody_listening_is_a_passing_trouble() -> None:
    """A refused connection is retried and, in the end, an unknown outcome that says why."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pauses = []

    def pause(pause_s: float, _: PosError) -> None:
        pauses.append(pause_s)
        time.sleep(pause_s)

    with connect(f"127.0.0.1:{port}") as channel:
        client = PosClient(channel, total_timeout_s=0.5, pause=pause)
        with pytest.raises(errors.OutcomeUnknown, match="UNAVAILABLE"):
            client.create_purchase(a_sale())
    assert pauses
