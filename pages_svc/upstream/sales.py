"""The chain's numbers, as the query server and the purchases service tell them. Amounts are whole cents."""

import asyncio
import datetime
import functools
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from chassis import wire, zones
from pages_svc.upstream.services import OfCell, Services
from pos.client import cents
from retail.analytics.v1 import analytics_service_pb2 as pb
from retail.analytics.v1 import audit_service_pb2 as audit_pb
from retail.purchases.v1 import purchases_service_pb2 as purchases_pb

ROWS_PER_PAGE = 1_000
# A long range is asked for in parts, some of them side by side: in one, each page waits for the one before.
PART_DAYS, PARTS_AT_ONCE = 100, 4
LOYAL_COUNT_MAX = 100_000  # where the query server stops counting


class Totals(NamedTuple):
    """Of some sales."""

    revenue_cents: int = 0
    item_count: int = 0
    purchase_count: int = 0
    with_customer_count: int = 0

    def __add__(self, other: "Totals") -> "Totals":  # type: ignore[override]
        return Totals(*(mine + yours for mine, yours in zip(self, other, strict=True)))


Rows = dict[tuple[datetime.date, int], Totals]  # by business day and branch


class Marks(NamedTuple):
    """How far the numbers go."""

    data_as_of: datetime.datetime | None = None
    complete_through: datetime.datetime | None = None
    quarantined_count: int = 0

    def and_those(self, other: "Marks") -> "Marks":
        """Of two answers that are shown together."""
        known = [marks.complete_through for marks in (self, other)]
        complete_through = None if None in known else min(filter(None, known))
        return self._replace(
            complete_through=complete_through, quarantined_count=max(self.quarantined_count, other.quarantined_count)
        )


class Daily(NamedTuple):
    """What each branch sold on each day, and how far that goes."""

    rows: Rows
    marks: Marks


class Product(NamedTuple):
    product_id: int
    quantity: int
    revenue_cents: int


class Products(NamedTuple):
    best: list[Product]
    truncated: bool  # there are more that sold as much as the last


class Customer(NamedTuple):
    customer_id: str
    purchase_count: int
    last_purchase: datetime.datetime


class Customers(NamedTuple):
    """Over all time."""

    most_loyal: list[Customer]
    loyal_count: int
    unique_count: int


class Audit(NamedTuple):
    """What the continuous audit knows."""

    verdict: str  # AGREED, PENDING, DIFFERENT, FOREIGN, UNPROVEN, or empty: nothing yet
    stale: bool
    wrong_count: int
    compared_through: datetime.datetime | None


class Calendar(NamedTuple):
    """Which business days have sales, and what cuts them."""

    zone: ZoneInfo
    first: datetime.date | None
    last: datetime.date | None


class Sales:
    """Asks. Every method may raise `Problem`."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def require_permitted(self, day: datetime.date, branch_id: int | None) -> None:
        """Raises Problem: whoever looks may not see the sales of the branch, or of the chain."""
        request = pb.ListDailySalesRequest(
            page_size=1,
            first_date=wire.date(day),
            last_date=wire.date(day),
            branch_ids=[branch_id] if branch_id else [],
        )
        await self._analytics(self._services.analytics.ListDailySales, request)

    async def calendar(self, branch_id: int | None) -> Calendar:
        any_day = wire.date(datetime.date(2000, 1, 1))  # the range is told whatever day is asked for
        request = purchases_pb.ListControlTotalsRequest(
            first_date=any_day, last_date=any_day, branch_ids=[branch_id] if branch_id else []
        )
        asked = self._services.of_cells(branch_id)
        replies = await asyncio.gather(*(self._control_totals(each, request) for each in asked))
        known = [reply for reply in replies if reply.HasField("earliest_sales_date")]
        return Calendar(
            zones.load(replies[0].time_zone),
            min((date_of(reply.earliest_sales_date) for reply in known), default=None),
            max((date_of(reply.latest_sales_date) for reply in known), default=None),
        )

    async def recorded_until(self, end: datetime.datetime, day: datetime.date, branch_id: int | None) -> Totals:
        """What was recorded of that business day with a time before `end`."""
        request = purchases_pb.ListControlTotalsRequest(
            page_size=ROWS_PER_PAGE,
            first_date=wire.date(day),
            last_date=wire.date(day),
            branch_ids=[branch_id] if branch_id else [],
            end_time=wire.timestamp(end),
        )

        async def of_cell(each: OfCell) -> Totals:
            totals, page = Totals(), purchases_pb.ListControlTotalsRequest()
            page.CopyFrom(request)
            while True:
                reply = await self._control_totals(each, page)
                for row in reply.control_totals:
                    if self._services.cells.has(each.cell.name, row.branch_id):
                        totals += totals_of(row)
                if not reply.next_page_token:
                    return totals
                page.page_token = reply.next_page_token

        every = await asyncio.gather(*(of_cell(each) for each in self._services.of_cells(branch_id)))
        return functools.reduce(Totals.__add__, every)

    async def daily(self, first: datetime.date, last: datetime.date, branch_id: int | None) -> Daily:
        at_once = asyncio.Semaphore(PARTS_AT_ONCE)

        async def part(begin: datetime.date) -> Daily:
            async with at_once:
                return await self._daily(begin, min(begin + datetime.timedelta(PART_DAYS - 1), last), branch_id)

        days = range(0, (last - first).days + 1, PART_DAYS)
        parts = await asyncio.gather(*(part(first + datetime.timedelta(day)) for day in days))
        return Daily(
            {key: totals for part in parts for key, totals in part.rows.items()},
            functools.reduce(Marks.and_those, (part.marks for part in parts)),
        )

    async def _daily(self, first: datetime.date, last: datetime.date, branch_id: int | None) -> Daily:
        rows: Rows = {}
        marks: Marks | None = None
        request = pb.ListDailySalesRequest(
            page_size=ROWS_PER_PAGE,
            first_date=wire.date(first),
            last_date=wire.date(last),
            branch_ids=[branch_id] if branch_id else [],
        )
        while True:
            reply = await self._analytics(self._services.analytics.ListDailySales, request)
            rows |= {(date_of(row.sales_date), row.branch_id): totals_of(row) for row in reply.daily_sales}
            marks = marks.and_those(marks_of(reply)) if marks else marks_of(reply)
            if not reply.next_page_token:
                return Daily(rows, marks)
            request.page_token = reply.next_page_token

    async def products(
        self, first: datetime.date, last: datetime.date, branch_id: int | None, *, limit: int, by_units: bool
    ) -> Products:
        """The best of these days, ties included."""
        request = pb.ListTopProductsRequest(
            limit=limit,
            branch_id=branch_id,
            first_date=wire.date(first),
            last_date=wire.date(last),
            order=pb.TOP_PRODUCTS_ORDER_QUANTITY if by_units else pb.TOP_PRODUCTS_ORDER_REVENUE,
            include_ties=True,
        )
        reply = await self._analytics(self._services.analytics.ListTopProducts, request)
        best = [Product(it.product_id, it.quantity, cents(it.revenue.value)) for it in reply.top_products]
        return Products(best, reply.truncated)

    async def customers(self, branch_id: int | None, *, limit: int) -> Customers:
        loyal = await self._analytics(
            self._services.analytics.ListLoyalCustomers,
            pb.ListLoyalCustomersRequest(page_size=limit, branch_id=branch_id, include_total_size=True),
        )
        ever = await self._analytics(
            self._services.analytics.GetSalesSummary, pb.GetSalesSummaryRequest(branch_id=branch_id)
        )
        listed = [
            Customer(it.customer_id, it.purchase_count, moment_of(it.last_purchase_time))
            for it in loyal.loyal_customers
        ]
        return Customers(listed, loyal.total_size, ever.unique_customer_count)

    async def audit(self) -> Audit:
        reply = await self._services.ask(
            "consumer",
            self._services.call(self._services.audit.GetAuditStatus, audit_pb.GetAuditStatusRequest()),
        )
        verdict = audit_pb.AuditVerdict.Name(reply.verdict).removeprefix("AUDIT_VERDICT_")
        return Audit(
            "" if verdict == "UNSPECIFIED" else verdict,
            reply.stale,
            reply.wrong_count + reply.foreign_event_count,
            moment_of(reply.compared_through_time) if reply.HasField("compared_through_time") else None,
        )

    async def _analytics(self, method: Any, request: Any) -> Any:
        return await self._services.ask("analytics", self._services.call(method, request))

    async def _control_totals(self, of: OfCell, request: Any) -> Any:
        call = self._services.call(of.purchases.ListControlTotals, request)
        return await self._services.ask("purchases", call, of.cell.purchases)


def totals_of(row: Any) -> Totals:
    return Totals(cents(row.revenue.value), row.item_count, row.purchase_count, row.purchase_with_customer_count)


def marks_of(reply: Any) -> Marks:
    return Marks(
        moment_of(reply.data_as_of_time) if reply.HasField("data_as_of_time") else None,
        moment_of(reply.complete_through_time) if reply.HasField("complete_through_time") else None,
        reply.quarantined_count,
    )


def date_of(value: Any) -> datetime.date:
    return datetime.date(value.year, value.month, value.day)


def moment_of(value: Any) -> datetime.datetime:
    moment: datetime.datetime = value.ToDatetime(datetime.UTC)
    return moment
