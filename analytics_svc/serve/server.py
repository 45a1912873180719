"""The gRPC face: requests to questions, rows to responses. Errors are raised; `chassis.grpc_server` maps them."""

import asyncio
import datetime
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import lru_cache
from typing import Any

from analytics_svc.errors import CustomerNotFound, WatcherTooSlow
from analytics_svc.purchase import PRODUCT_ID_MAX
from analytics_svc.serve import queries
from analytics_svc.serve.inclusion import Inclusion
from analytics_svc.serve.queries import ALL_DAYS, Days, Freshness
from analytics_svc.serve.watch import Watchers
from chassis import wire
from chassis.errors import DatabaseUnavailable, FieldReason, InvalidRequest, InvalidToken, Violation
from chassis.postgres import POOL_WAIT_S, Connection, Pool
from chassis.shares import Shares
from retail.analytics.v1 import analytics_service_pb2 as pb
from retail.analytics.v1 import analytics_service_pb2_grpc

SALES_PER_PAGE = (500, 1_000)  # by default, at most
CUSTOMERS_PER_PAGE = (50, 500)
TOP_PRODUCTS = 10
LOYAL_PURCHASES_MIN = 3
IDS_MAX = 1_000  # in one filter
SLOW_WATCHER_S = 10.0  # without reading anything: then a watcher is cut off, rather than kept for ever

UUID_RULE = "must be a UUID, such as 4f7c2d1e-9b3a-4c58-8e6f-0a1b2c3d4e5f"
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


class AnalyticsServicer(analytics_service_pb2_grpc.AnalyticsServiceServicer):
    """`retail.analytics.v1.AnalyticsService`."""

    def __init__(self, pool: Pool, heavy_pool: Pool, inclusion: Inclusion, watchers: Watchers) -> None:
        """`heavy_pool` is for questions that may take seconds: however many are asked, others are answered."""
        self._light = Shares(pool, max(pool.max_size - 1, 1))
        self._heavy = Shares(heavy_pool, max(heavy_pool.max_size // 2, 1))  # of which there are two kinds
        self._inclusion, self._watchers = inclusion, watchers
        self.tokens: wire.PageTokens | None = None  # comes when the database is up and proven to be ours

    async def ListDailySales(self, request: pb.ListDailySalesRequest, context: Any) -> pb.ListDailySalesResponse:
        violations: list[Violation] = []
        limit = wire.page_size(request.page_size, *SALES_PER_PAGE, violations)
        days = _days(request, violations) or ALL_DAYS
        _check_ids("branch_ids", request.branch_ids, violations)
        tokens = self._admit(request, violations)
        position = tokens.read(request)
        after = (datetime.date.fromisoformat(position[0]), position[1]) if position else None
        async with self._reading(request, context) as connection:
            rows, freshness = await queries.daily_sales(
                connection, days, request.branch_ids, after=after, limit=limit + 1
            )
        page = rows[:limit]
        return pb.ListDailySalesResponse(
            daily_sales=[_daily_sales(row) for row in page],
            next_page_token=tokens.issue(request, [str(page[-1][0]), page[-1][1]]) if len(rows) > limit else "",
            **_marks(freshness),
        )

    async def ListProductSales(self, request: pb.ListProductSalesRequest, context: Any) -> pb.ListProductSalesResponse:
        violations: list[Violation] = []
        limit = wire.page_size(request.page_size, *SALES_PER_PAGE, violations)
        days = _days(request, violations) or ALL_DAYS
        _check_ids("branch_ids", request.branch_ids, violations)
        _check_ids("product_ids", request.product_ids, violations, PRODUCT_ID_MAX)
        tokens = self._admit(request, violations)
        position = tokens.read(request)
        after = (datetime.date.fromisoformat(position[0]), position[1], position[2]) if position else None
        # Of many rows, those of a few products are searched for; without, or with one alone, they lie side by side.
        heavy = len(request.product_ids) > 1 or bool(request.product_ids and request.branch_ids)
        async with self._reading(request, context, heavy=heavy) as connection:
            rows, freshness = await queries.product_sales(
                connection, days, request.branch_ids, request.product_ids, after=after, limit=limit + 1
            )
        page = rows[:limit]
        return pb.ListProductSalesResponse(
            product_sales=[
                pb.ProductSales(
                    sales_date=wire.date(day),
                    branch_id=branch_id,
                    product_id=product_id,
                    quantity=quantity,
                    revenue=wire.decimal(revenue),
                )
                for day, branch_id, product_id, quantity, revenue in page
            ],
            next_page_token=tokens.issue(request, [str(page[-1][0]), *page[-1][1:3]]) if len(rows) > limit else "",
            **_marks(freshness),
        )

    async def ListTopProducts(self, request: pb.ListTopProductsRequest, context: Any) -> pb.ListTopProductsResponse:
        violations: list[Violation] = []
        if request.limit < 0:
            violations.append(Violation("limit", "must not be negative", FieldReason.NEGATIVE))
        limit = min(request.limit or TOP_PRODUCTS, queries.TOP_PRODUCTS_MAX)
        branch_id = _branch_id(request, violations)
        days = _days(request, violations)
        if request.order not in pb.TopProductsOrder.values():
            violations.append(Violation("order", "must be one of TopProductsOrder", FieldReason.UNKNOWN_VALUE))
        self._admit(request, violations)
        async with self._reading(request, context, heavy=days is not None) as connection:
            rows, freshness = await queries.top_products(
                connection,
                days,
                branch_id,
                limit=limit,
                by_revenue=request.order == pb.TOP_PRODUCTS_ORDER_REVENUE,
                include_ties=request.include_ties,
            )
        return pb.ListTopProductsResponse(
            top_products=[
                pb.TopProduct(product_id=product_id, quantity=quantity, revenue=wire.decimal(revenue))
                for product_id, quantity, revenue, _ in rows[: queries.TOP_PRODUCTS_MAX]
            ],
            truncated=len(rows) > queries.TOP_PRODUCTS_MAX,
            **_marks(freshness),
        )

    async def ListLoyalCustomers(
        self, request: pb.ListLoyalCustomersRequest, context: Any
    ) -> pb.ListLoyalCustomersResponse:
        violations: list[Violation] = []
        limit = wire.page_size(request.page_size, *CUSTOMERS_PER_PAGE, violations)
        if request.min_purchase_count < 0:
            violations.append(Violation("min_purchase_count", "must not be negative", FieldReason.NEGATIVE))
        branch_id = _branch_id(request, violations)
        tokens = self._admit(request, violations)
        position = tokens.read(request)
        async with self._reading(request, context) as connection:
            rows, freshness = await queries.loyal_customers(
                connection,
                request.min_purchase_count or LOYAL_PURCHASES_MIN,
                branch_id,
                after=(position[0], position[1]) if position else None,
                limit=limit + 1,
                with_total=request.include_total_size,
            )
        page = rows[:limit]
        total = (rows[0][3] if rows else 0) if request.include_total_size else None
        return pb.ListLoyalCustomersResponse(
            loyal_customers=[
                pb.LoyalCustomer(
                    customer_id=customer_id, purchase_count=purchases, last_purchase_time=wire.timestamp(last_at)
                )
                for customer_id, purchases, last_at, *_ in page
            ],
            next_page_token=tokens.issue(request, [page[-1][1], page[-1][0]]) if len(rows) > limit else "",
            total_size=total,
            **_marks(freshness),
        )

    async def GetCustomerLoyalty(
        self, request: pb.GetCustomerLoyaltyRequest, context: Any
    ) -> pb.GetCustomerLoyaltyResponse:
        known_form = _UUID.fullmatch(request.customer_id)
        self._admit(request, [] if known_form else [Violation("customer_id", UUID_RULE, FieldReason.NOT_A_UUID)])
        customer_id = request.customer_id.lower()
        async with self._reading(request, context) as connection:
            rows, freshness = await queries.customer_loyalty(connection, customer_id)
        if not rows:
            raise CustomerNotFound(
                f"no purchase of the customer {customer_id} is counted",
                metadata={"customer_id": customer_id, **_marks_metadata(freshness)},
            )
        return pb.GetCustomerLoyaltyResponse(
            loyal_customer=pb.LoyalCustomer(
                customer_id=customer_id,
                purchase_count=sum(purchases for _, purchases, _ in rows),
                last_purchase_time=wire.timestamp(max(last_at for _, _, last_at in rows)),
            ),
            branches=[
                pb.BranchLoyalty(
                    branch_id=branch_id, purchase_count=purchases, last_purchase_time=wire.timestamp(last_at)
                )
                for branch_id, purchases, last_at in rows
            ],
            **_marks(freshness),
        )

    async def GetSalesSummary(self, request: pb.GetSalesSummaryRequest, context: Any) -> pb.GetSalesSummaryResponse:
        violations: list[Violation] = []
        branch_id = _branch_id(request, violations)
        days = _days(request, violations)
        self._admit(request, violations)
        async with self._reading(request, context) as connection:
            ((revenue, items, purchases, customers),), freshness = await queries.sales_summary(
                connection, days, branch_id
            )
        return pb.GetSalesSummaryResponse(
            revenue=wire.decimal(revenue),
            item_count=items,
            purchase_count=purchases,
            unique_customer_count=customers,
            **_marks(freshness),
        )

    async def WatchDailySales(  # type: ignore[override] # gRPC takes a coroutine as well
        self, request: pb.WatchDailySalesRequest, context: Any
    ) -> None:
        """Writes to the context itself, as it knows best how long to wait for a reader."""
        violations: list[Violation] = []
        days = _days(request, violations) or ALL_DAYS
        _check_ids("branch_ids", request.branch_ids, violations)
        self._admit(request, violations)
        await self._included(request, context)
        await context.send_initial_metadata(())  # apart: with a first message that nobody reads, the call could not end
        async with aclosing(self._watchers.watch(days, request.branch_ids)) as updates:
            async for rows, freshness in updates:
                try:
                    async with asyncio.timeout(SLOW_WATCHER_S):
                        await context.write(
                            pb.WatchDailySalesResponse(
                                daily_sales=[_daily_sales(row) for row in rows], **_marks(freshness)
                            )
                        )
                except TimeoutError:
                    raise WatcherTooSlow(f"nothing that was sent was read for {SLOW_WATCHER_S:g} s") from None

    def _admit(self, request: Any, violations: list[Violation]) -> wire.PageTokens:
        """Refuse a request that is wrong, or comes too early; returns what reads and makes its page tokens."""
        if violations:
            raise InvalidRequest(violations)
        if request.consistency_token and not _UUID.fullmatch(request.consistency_token):
            raise InvalidToken("consistency_token was not made by this system")
        if self.tokens is None:
            raise DatabaseUnavailable("the database is not available")
        return self.tokens

    async def _included(self, request: Any, context: Any) -> None:
        """Wait until the purchase of the request's token is included; a snapshot that is taken from now on has it."""
        if request.consistency_token:
            await self._inclusion.wait(request.consistency_token.lower(), context.time_remaining())

    @asynccontextmanager
    async def _reading(self, request: Any, context: Any, *, heavy: bool = False) -> AsyncIterator[Connection]:
        """A connection, once the purchase of the request's token is included. A call whose time is over is cancelled,
        and its query with it."""
        await self._included(request, context)
        remaining = context.time_remaining()
        timeout_s = POOL_WAIT_S if remaining is None else min(max(remaining, 0.001), POOL_WAIT_S)
        shares = self._heavy if heavy else self._light
        async with shares.connection(type(request).__name__, timeout_s) as connection:
            yield connection


@lru_cache(20_000)  # most watchers watch the same rows
def _daily_sales(row: tuple[Any, ...]) -> pb.DailySales:
    day, branch_id, revenue, items, purchases, with_customer = row
    return pb.DailySales(
        sales_date=wire.date(day),
        branch_id=branch_id,
        revenue=wire.decimal(revenue),
        item_count=items,
        purchase_count=purchases,
        purchase_with_customer_count=with_customer,
    )


def _marks(freshness: Freshness) -> dict[str, Any]:
    """What every response says about itself."""
    return {
        "data_as_of_time": freshness.applied_at and wire.timestamp(freshness.applied_at),
        "complete_through_time": freshness.complete_through_at and wire.timestamp(freshness.complete_through_at),
        "quarantined_count": freshness.quarantined_count,
        "furthest_behind_cell": freshness.furthest_behind,
    }


def _marks_metadata(freshness: Freshness) -> dict[str, str]:
    """The same for an answer that is an error: how far it can be trusted."""
    times = {"data_as_of_time": freshness.applied_at, "complete_through_time": freshness.complete_through_at}
    return {name: wire.timestamp(time).ToJsonString() for name, time in times.items() if time} | {
        "quarantined_count": str(freshness.quarantined_count)
    }


def _days(request: Any, violations: list[Violation]) -> Days | None:
    """The range asked for; None when neither end is given."""
    found = len(violations)
    first = wire.parse_date(request, "first_date", violations) or ALL_DAYS.first
    last = wire.parse_date(request, "last_date", violations) or ALL_DAYS.last
    if len(violations) == found and last < first:
        violations.append(Violation("last_date", "must not be before first_date", FieldReason.BAD_RANGE))
    return Days(first, last) if request.HasField("first_date") or request.HasField("last_date") else None


def _branch_id(request: Any, violations: list[Violation]) -> int | None:
    if not request.HasField("branch_id"):
        return None
    wire.check_id("branch_id", request.branch_id, violations)
    return int(request.branch_id)


def _check_ids(field: str, ids: Sequence[int], violations: list[Violation], most: int = wire.ID_MAX) -> None:
    if len(ids) > IDS_MAX:
        violations.append(Violation(field, f"must have at most {IDS_MAX:,} ids", FieldReason.TOO_MANY))
        return  # nobody is told what is wrong with the ids of a list that is too long
    for index, number in enumerate(ids):
        wire.check_id(f"{field}[{index}]", number, violations, most)
