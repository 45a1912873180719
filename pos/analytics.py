"""Reads the owner's answers from the analytics service."""

import datetime
from typing import NamedTuple

import grpc

from pos.calls import ATTEMPT_TIMEOUT_S, Calls, Pause, sleep
from pos.service_config import TOTAL_TIMEOUT_S
from pos.values import DayTotals, cents, day_totals
from retail.analytics.v1 import analytics_service_pb2
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub

_DAYS_PAGE_ROWS = 1_000  # the most that the service gives a page
_CUSTOMERS_PAGE_ROWS = 500


class Summary(NamedTuple):
    """Sales of the whole chain, over all time, and how fresh the figures are."""

    revenue_cents: int
    item_count: int
    purchase_count: int
    unique_customer_count: int
    data_as_of: datetime.datetime | None  # None before the first event
    quarantined_count: int  # events that are missing from the figures, since they could not be understood


class TopProduct(NamedTuple):
    product_id: int
    quantity: int
    revenue_cents: int


class AnalyticsClient:
    """Calls the analytics service. Every method may raise `pos.errors.PosError`."""

    def __init__(
        self,
        channel: grpc.Channel,
        *,
        attempt_timeout_s: float = ATTEMPT_TIMEOUT_S,
        total_timeout_s: float = TOTAL_TIMEOUT_S,
        pause: Pause = sleep,
    ) -> None:
        """`pause(seconds, why)` waits between two attempts; what it raises ends the call."""
        self._stub = AnalyticsServiceStub(channel)
        self._call = Calls(attempt_timeout_s=attempt_timeout_s, total_timeout_s=total_timeout_s, pause=pause)

    def daily_sales(self) -> list[DayTotals]:
        """What each branch sold on each business day, by day, then branch."""
        request = analytics_service_pb2.ListDailySalesRequest(page_size=_DAYS_PAGE_ROWS)
        pages = self._call.pages(self._stub.ListDailySales, request)
        return [day_totals(row) for page in pages for row in page.daily_sales]

    def summary(self) -> Summary:
        reply = self._call(self._stub.GetSalesSummary, analytics_service_pb2.GetSalesSummaryRequest())
        as_of = reply.data_as_of_time
        return Summary(
            cents(reply.revenue.value),
            reply.item_count,
            reply.purchase_count,
            reply.unique_customer_count,
            as_of.ToDatetime(datetime.UTC) if reply.HasField("data_as_of_time") else None,
            reply.quarantined_count,
        )

    def count_loyal_customers(self, min_purchase_count: int) -> int:
        """Customers with at least so many purchases, counted over the whole chain."""
        request = analytics_service_pb2.ListLoyalCustomersRequest(
            page_size=_CUSTOMERS_PAGE_ROWS, min_purchase_count=min_purchase_count
        )
        pages = self._call.pages(self._stub.ListLoyalCustomers, request)
        return sum(len(page.loyal_customers) for page in pages)

    def top_products(self, limit: int) -> list[TopProduct]:
        """The products that sold the most units, and those that sold as many as the last of them."""
        request = analytics_service_pb2.ListTopProductsRequest(
            limit=limit,
            order=analytics_service_pb2.TOP_PRODUCTS_ORDER_QUANTITY,
            include_ties=True,
        )
        reply = self._call(self._stub.ListTopProducts, request)
        return [TopProduct(p.product_id, p.quantity, cents(p.revenue.value)) for p in reply.top_products]
