"""The client library for till software.

    credentials = Credentials("till.pem", "till-key.pem", "ca.pem")
    with connect("purchases.example:50051", credentials) as channel:
        client = PosClient(channel)
        sale = Sale(receipt_id="4711", branch_id=1, cashier_id=17, pos_id="POS-3", items=[Item(1001, 890)])
        recorded = client.create_purchase(sale)

Amounts are whole cents (`int`): exact, and quick to handle. Ids of purchases and customers are UUIDs as text.
Times are aware datetimes. Calls retry by themselves and raise `pos.errors.PosError`.
"""

import datetime
import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from chassis import wire
from chassis.tls import Credentials
from pos import errors, values
from pos.calls import ATTEMPT_TIMEOUT_S, Calls, Pause, connect, sleep
from pos.cells import HOPS_MAX, MOVING, Cells, Reach, reaching
from pos.open_stream import OpenStream
from pos.sale import Item, Sale, create_request
from pos.service_config import TOTAL_TIMEOUT_S
from pos.upload import Uploader
from pos.values import (
    BusinessDays,
    Customer,
    DayTotals,
    Purchase,
    Recorded,
    Reported,
    TillReport,
    TillState,
    Uploaded,
    cents,
)
from retail.purchases.v1 import customers_service_pb2, purchases_service_pb2
from retail.purchases.v1.customers_service_pb2_grpc import CustomersServiceStub
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub

__all__ = [
    "BusinessDays",
    "Credentials",
    "Customer",
    "DayTotals",
    "Item",
    "OpenStream",
    "PosClient",
    "Purchase",
    "Recorded",
    "Reported",
    "Sale",
    "TillReport",
    "TillState",
    "Uploaded",
    "cents",
    "connect",
]

WINDOW_DAYS = 31  # ListControlTotals sums up at most this many days a call
TOTALS_PAGE_ROWS = 1_000  # the most that the service gives


class PosClient:
    """Calls the purchases service. Safe to share between threads."""

    def __init__(
        self,
        channel: grpc.Channel,
        *,
        attempt_timeout_s: float = ATTEMPT_TIMEOUT_S,
        total_timeout_s: float = TOTAL_TIMEOUT_S,
        pause: Pause = sleep,
        reach: Reach | None = None,
    ) -> None:
        """`pause(seconds, why)` waits between two attempts; what it raises ends the call. `reach` is for `at`."""
        self._cells = Cells(channel, reach)
        self._purchases = PurchasesServiceStub(channel)
        self._customers = CustomersServiceStub(channel)
        self._call = Calls(attempt_timeout_s=attempt_timeout_s, total_timeout_s=total_timeout_s, pause=pause)
        self._timeouts_s, self._pause = (attempt_timeout_s, total_timeout_s), pause

    @classmethod
    @contextmanager
    def at(cls, target: str, credentials: Credentials | None = None, **options: Any) -> Iterator["PosClient"]:
        """A client of the service at `host:port` which, where the chain has cells, goes on to the one that has a sale's
        branch, and remembers it. For the block; calls that are not about one branch go to `target`.
        """
        with reaching(credentials) as reach:
            yield cls(reach(target), reach=reach, **options)

    def create_purchase(self, sale: Sale, *, register_customer: bool = False) -> Recorded:
        """Send a sale; when this returns, it is stored for good. Sending it again changes nothing.

        `register_customer` registers the sale's customer with it, if it is a new one.

        Raises:
            SaleRefused: it is not stored and never will be as it is; the subclass tells why.
            OutcomeUnknown: no clear answer in time; send the same `Sale` again. ClockAhead, when its time is to come.
            CallFailed: the service does not let this client send sales.
        """
        request = create_request(sale, register_customer)
        reply = self._call(self._cells.create, request, errors.of_sale)
        with errors.reading(errors.OutcomeUnknown):
            return values.recorded(reply)

    def open_stream(self) -> OpenStream[Recorded]:
        """One stream for sales as they happen, for a till or all tills of a branch; to be closed, as by `with`.

        `record` on it does what `create_purchase` does, for a fraction of what that costs the service. The stream is
        opened when there is a sale, renewed by itself, and replaced by calls while it is broken or refused, and for the
        sales of branches that another cell has.
        """
        return OpenStream(
            self._purchases.UploadPurchases,
            self._cells,
            self._call,
            values.recorded,
            answer_timeout_s=self._timeouts_s[0],
        )

    def upload_purchases(
        self,
        sales: Iterable[Sale],
        *,
        register_customers: bool | Callable[[Sale], bool] = False,
        within_s: float = math.inf,
    ) -> Iterator[Uploaded]:
        """Send a backlog, such as that of a till that was offline: several times as fast as one by one.

        Yields each sale once it is stored for good, or refused, in any order; sales are taken from `sales` as they are
        needed, some thousand ahead. What breaks is sent again, as long as answers keep coming.
        `register_customers` registers the sales' customers with them, where they are new; it may tell for each sale.

        Raises:
            OutcomeUnknown: no answer for the total timeout, or not all of them `within_s`; send again what was not
                yielded.
            CallFailed: the service does not let this client send sales.
        """
        registers = register_customers if callable(register_customers) else lambda _: register_customers
        yield from self._upload(self._purchases, sales, registers, time.monotonic() + within_s, HOPS_MAX)

    def _upload(
        self,
        service: PurchasesServiceStub,
        sales: Iterable[Sale],
        registers: Callable[[Sale], bool],
        until: float,
        hops: int,
    ) -> Iterator[Uploaded]:
        uploader: Uploader[Sale, Recorded] = Uploader(
            service.UploadPurchases,
            lambda sale: create_request(sale, registers(sale)),
            values.recorded,
            answer_timeout_s=self._timeouts_s[0],
            total_timeout_s=self._timeouts_s[1],
            pause=self._pause,
        )
        elsewhere: dict[PurchasesServiceStub, list[Sale]] = {}  # kept until those of this cell are through
        for sale, outcome in uploader.send(sales, until - time.monotonic()):
            if not isinstance(outcome, errors.WrongCell) or not self._cells.learn(sale.branch_id, outcome.status):
                yield Uploaded(sale, outcome)
            elif hops > 1:
                elsewhere.setdefault(self._cells.of(sale.branch_id), []).append(sale)
            else:
                yield Uploaded(sale, errors.OutcomeUnknown(MOVING))
        for other, theirs in elsewhere.items():
            yield from self._upload(other, theirs, registers, until, hops - 1)

    def report_till(self, report: TillReport, *, within_s: float = math.inf) -> Reported:
        """Tell what a till's journal has given out, and learn what of it is stored; `pos.journal` does so by itself."""
        with errors.sending():
            request = purchases_service_pb2.ReportTillRequest(**report._asdict())
        reply = self._call(self._cells.report_till, request, within_s=within_s)
        with errors.reading(errors.CallFailed):
            return Reported(values.till_state(reply.state), values.moment(reply.server_time), reply.time_zone)

    def till_states(self, branch_id: int, pos_id: str) -> list[TillState]:
        """What is stored of a till's journals, that which reported last first."""
        with errors.sending():
            request = purchases_service_pb2.GetTillStateRequest(branch_id=branch_id, pos_id=pos_id)
        reply = self._call(self._cells.till_state, request)
        with errors.reading(errors.CallFailed):
            return [values.till_state(state) for state in reply.states]

    def get_purchase(self, purchase_id: str) -> Purchase:
        """Read one purchase.

        Raises:
            NotFound: there is none with this id.
        """
        with errors.sending():
            request = purchases_service_pb2.GetPurchaseRequest(purchase_id=purchase_id)
        reply = self._call(self._purchases.GetPurchase, request)
        with errors.reading(errors.CallFailed):
            return values.purchase(reply.purchase)

    def list_purchases(
        self,
        *,
        customer_id: str | None = None,
        branch_id: int | None = None,
        start_time: datetime.datetime | None = None,
        end_time: datetime.datetime | None = None,
    ) -> Iterator[Purchase]:
        """Purchases from `start_time` until before `end_time`, the latest first; fetched page by page."""
        with errors.sending():
            request = purchases_service_pb2.ListPurchasesRequest(
                customer_id=customer_id,
                branch_id=branch_id,
                start_time=wire.timestamp(start_time) if start_time is not None else None,
                end_time=wire.timestamp(end_time) if end_time is not None else None,
            )
        for page in self._call.pages(self._purchases.ListPurchases, request):
            with errors.reading(errors.CallFailed):
                purchases = [values.purchase(each) for each in page.purchases]
            yield from purchases

    def list_control_totals(
        self,
        first: datetime.date | None = None,
        last: datetime.date | None = None,
        *,
        branch_ids: Iterable[int] = (),
    ) -> Iterator[DayTotals]:
        """Sums by business day, then branch; of every day that has purchases unless told.

        Computed from the recorded purchases themselves: the truth that read models are checked against. Those of
        `branch_ids` that are known to be another cell's are asked for there, cell by cell.
        """
        if first is None or last is None:
            stored = self.business_days()
            first, last = first or stored.first, last or stored.last
            if first is None or last is None:
                return
        with errors.sending():
            asked: dict[PurchasesServiceStub, list[int]] = {}
            for branch_id in branch_ids:
                asked.setdefault(self._cells.of(branch_id), []).append(branch_id)
            requests = [
                (service, request)
                for service, branches in (asked or {self._purchases: []}).items()
                for request in _control_totals_requests(first, last, branches)
            ]
        for service, request in requests:
            for page in self._call.pages(service.ListControlTotals, request):
                with errors.reading(errors.CallFailed):
                    totals = [values.day_totals(row) for row in page.control_totals]
                yield from totals

    def business_days(self) -> BusinessDays:
        """The range of business days that have purchases, and the time zone that cuts them."""
        any_day = wire.date(datetime.date(2000, 1, 1))  # the range is told whatever day is asked for
        request = purchases_service_pb2.ListControlTotalsRequest(first_date=any_day, last_date=any_day)
        reply = self._call(self._purchases.ListControlTotals, request)
        with errors.reading(errors.CallFailed):
            return BusinessDays(
                values.date(reply.earliest_sales_date) if reply.HasField("earliest_sales_date") else None,
                values.date(reply.latest_sales_date) if reply.HasField("latest_sales_date") else None,
                reply.time_zone,
            )

    def create_customer(self, customer_id: str | None = None) -> Customer:
        """Register a customer; one that exists is returned as stored. Without an id, one is made here."""
        with errors.sending():
            request = customers_service_pb2.CreateCustomerRequest(customer_id=customer_id or str(uuid.uuid4()))
        reply = self._call(self._customers.CreateCustomer, request)
        with errors.reading(errors.CallFailed):
            return values.customer(reply.customer)

    def get_customer(self, customer_id: str) -> Customer:
        """Read one customer.

        Raises:
            NotFound: there is none with this id.
        """
        with errors.sending():
            request = customers_service_pb2.GetCustomerRequest(customer_id=customer_id)
        reply = self._call(self._customers.GetCustomer, request)
        with errors.reading(errors.CallFailed):
            return values.customer(reply.customer)

    def list_customers(self, beginning_with: str = "") -> Iterator[Customer]:
        """All customers by id, or those whose id begins so; fetched page by page."""
        with errors.sending():
            request = customers_service_pb2.ListCustomersRequest(customer_id_prefix=beginning_with)
        for page in self._call.pages(self._customers.ListCustomers, request):
            with errors.reading(errors.CallFailed):
                customers = [values.customer(each) for each in page.customers]
            yield from customers


def _control_totals_requests(
    first: datetime.date, last: datetime.date, branch_ids: list[int]
) -> list[purchases_service_pb2.ListControlTotalsRequest]:
    """One for each stretch of days that the service sums up in a call."""
    requests = []
    for skipped in range(0, (last - first).days + 1, WINDOW_DAYS):
        request = purchases_service_pb2.ListControlTotalsRequest(
            page_size=TOTALS_PAGE_ROWS,
            first_date=wire.date(first + datetime.timedelta(days=skipped)),
            last_date=wire.date(first + datetime.timedelta(days=min(skipped + WINDOW_DAYS - 1, (last - first).days))),
            branch_ids=branch_ids,
        )
        requests.append(request)
    return requests
