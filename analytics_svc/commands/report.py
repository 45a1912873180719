"""`python -m analytics_svc report [--days N] [--branch ID] [--json | --png FILE]`: the owner's page.

Reads everything through the analytics API, so it works from anywhere that reaches the server.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from google.type.date_pb2 import Date
from rich.console import Console

from analytics_svc.commands import report_page
from analytics_svc.settings import ReportSettings
from chassis import wire
from retail.analytics.v1 import analytics_service_pb2 as pb
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub

CALL_TIMEOUT_S = 30.0
DAYS, DAYS_MAX = 28, 366  # by default, at most: beyond, a page is no page any more
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


def run(config: ReportSettings, arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    options = _parse(arguments)
    if options.png:
        try:
            from analytics_svc.commands.report_plots import draw
        except ImportError:
            message = "report: --png needs matplotlib: .venv/bin/pip install --require-hashes -r requirements-plots.txt"
            print(message, file=sys.stderr)
            return 1
    try:
        with grpc.insecure_channel(config.analytics_target) as channel:
            found = gather(AnalyticsServiceStub(channel), options.days, options.branch)
    except grpc.RpcError as error:
        print(f"report: {config.analytics_target}: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    if options.png:
        draw(found, options.png)
        print(options.png)
    elif options.json:
        print(as_json(found))
    else:
        report_page.show(found, Console(highlight=False))
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m analytics_svc report", description="The owner's page.")
    parser.add_argument("--days", type=_number(DAYS_MAX), default=DAYS, help=f"to look back ({DAYS})")
    parser.add_argument("--branch", type=_number(2**31 - 1), help="one branch only")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="for programs; amounts are texts, as they are exact")
    output.add_argument("--png", type=_file, metavar="FILE", help="a picture; needs matplotlib")
    return parser.parse_args(arguments)


def _number(most: int) -> Any:
    def number(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {most}")
        return int(text)

    return number


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError("must be a file in a directory that exists")
    return path


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
