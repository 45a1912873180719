"""The figures of the owner's page, read through the analytics API; what shows them is elsewhere."""

import datetime
import json
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from google.type.date_pb2 import Date

from chassis import wire
from retail.analytics.v1 import analytics_service_pb2 as pb

CALL_TIMEOUT_S = 30.0
TOP = 10  # products, customers
ROWS_PER_PAGE = 1_000
DAY = datetime.timedelta(days=1)
EARLIEST = datetime.date(2000, 1, 1)  # no sale lies before it


class Sums(NamedTuple):
    """Of some sales."""

    revenue: Decimal
    items: int
    purchases: int


class Product(NamedTuple):
    product_id: int
    quantity: int
    revenue: Decimal


class Customer(NamedTuple):
    customer_id: str
    purchases: int
    last_purchase: datetime.datetime


class Report(NamedTuple):
    """What the owner asks for; of one branch, or of the chain when that is None."""

    branch_id: int | None
    all_time: Sums
    unique_customers: int
    days: list[datetime.date]  # without a gap; the last one is the latest with sales
    period: Sums  # of these days
    period_before: Sums  # of as many days before them
    revenue: dict[int, list[Decimal]]  # by branch, of each of the days
    top_products: list[Product]  # of these days, by revenue
    loyal_customers: list[Customer]  # of all time
    data_as_of: datetime.datetime | None  # None before the first sale
    complete_through: datetime.datetime | None  # None while it is not known
    quarantined: int
    furthest_behind: str  # the cell that complete_through waits for; empty where there is one


def gather(stub: Any, day_count: int, branch_id: int | None) -> Report:
    """Ask for everything.

    Raises:
        grpc.RpcError: the server did not answer, or refused.
    """

    def summary(first: datetime.date | None = None, last: datetime.date | None = None) -> pb.GetSalesSummaryResponse:
        request = pb.GetSalesSummaryRequest(branch_id=branch_id, **_dates(first, last))
        reply: pb.GetSalesSummaryResponse = stub.GetSalesSummary(request, timeout=CALL_TIMEOUT_S)
        return reply

    all_time = summary()
    latest = _latest_day(lambda first: summary(first).purchase_count > 0) if all_time.purchase_count else None
    days = [latest - number * DAY for number in reversed(range(day_count))] if latest else []
    products: list[Product] = []
    period = period_before = Sums(Decimal("0.00"), 0, 0)
    if days:
        first, last = days[0], days[-1]
        period = _sums(summary(first, last))
        period_before = _sums(summary(first - day_count * DAY, first - DAY))
        top = stub.ListTopProducts(
            pb.ListTopProductsRequest(
                limit=TOP, order=pb.TOP_PRODUCTS_ORDER_REVENUE, branch_id=branch_id, **_dates(first, last)
            ),
            timeout=CALL_TIMEOUT_S,
        )
        products = [Product(row.product_id, row.quantity, Decimal(row.revenue.value)) for row in top.top_products]
    loyal = stub.ListLoyalCustomers(
        pb.ListLoyalCustomersRequest(page_size=TOP, branch_id=branch_id), timeout=CALL_TIMEOUT_S
    )
    return Report(
        branch_id,
        _sums(all_time),
        all_time.unique_customer_count,
        days,
        period,
        period_before,
        _revenue(stub, days, branch_id),
        products,
        [Customer(row.customer_id, row.purchase_count, _time(row.last_purchase_time)) for row in loyal.loyal_customers],
        _time(loyal.data_as_of_time) if loyal.HasField("data_as_of_time") else None,
        _time(loyal.complete_through_time) if loyal.HasField("complete_through_time") else None,
        loyal.quarantined_count,
        loyal.furthest_behind_cell,
    )


def _latest_day(sold_since: Any) -> datetime.date:
    """The latest day with sales, by halving: a few summaries, however long the history is."""
    low, high = EARLIEST.toordinal(), datetime.date.max.toordinal()
    while low < high:
        middle = (low + high + 1) // 2
        if sold_since(datetime.date.fromordinal(middle)):
            low = middle
        else:
            high = middle - 1
    return datetime.date.fromordinal(low)


def _revenue(stub: Any, days: Sequence[datetime.date], branch_id: int | None) -> dict[int, list[Decimal]]:
    if not days:
        return {}
    places = {day: place for place, day in enumerate(days)}
    revenue: dict[int, list[Decimal]] = {}
    request = pb.ListDailySalesRequest(
        page_size=ROWS_PER_PAGE, branch_ids=[branch_id] if branch_id else [], **_dates(days[0], days[-1])
    )
    while True:
        reply = stub.ListDailySales(request, timeout=CALL_TIMEOUT_S)
        for row in reply.daily_sales:
            day = datetime.date(row.sales_date.year, row.sales_date.month, row.sales_date.day)
            revenue.setdefault(row.branch_id, [Decimal("0.00")] * len(days))[places[day]] = Decimal(row.revenue.value)
        if not reply.next_page_token:
            return dict(sorted(revenue.items()))
        request.page_token = reply.next_page_token


def _dates(first: datetime.date | None, last: datetime.date | None) -> dict[str, Date]:
    return {name: wire.date(day) for name, day in (("first_date", first), ("last_date", last)) if day}


def _sums(reply: pb.GetSalesSummaryResponse) -> Sums:
    return Sums(Decimal(reply.revenue.value), reply.item_count, reply.purchase_count)


def _time(value: Any) -> datetime.datetime:
    moment: datetime.datetime = value.ToDatetime(datetime.UTC)
    return moment


def as_json(report: Report) -> str:
    """One object; its names are those of `Report`."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            return plain(value._asdict())
        if isinstance(value, dict):
            return {str(name): plain(each) for name, each in value.items()}
        if isinstance(value, list):
            return [plain(each) for each in value]
        if isinstance(value, datetime.date):
            return value.isoformat()
        return str(value) if isinstance(value, Decimal) else value

    return json.dumps(plain(report), indent=2)
