"""Every question of the analytics API, asked of a running server and answered against other means."""

import asyncio
import random
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import grpc
import psycopg
import pytest
from google.type import date_pb2

from analytics_svc.commands.serve import serve
from analytics_svc.ingest.apply import apply
from analytics_svc.ingest.events import decode
from analytics_svc.ingest.quarantine import QuarantinedEvent
from analytics_svc.ingest.summing import sum_up
from analytics_svc.settings import ServeSettings
from retail.analytics.v1 import analytics_service_pb2 as pb
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub
from tests.conftest import eventually, pool
from tests.integration.conftest import free_address, running
from tests.integration.purchase_events import NOON, Sold, query, sold, some_sales
from tests.integration.sales import refusal


async def record(url: str, sales: Iterable[Sold], unfit: Iterable[QuarantinedEvent] = ()) -> None:
    """Let the write half count the sales; of some of them, the chain's products are summed up."""
    events = [decode(sale.body(), ZoneInfo("UTC")) for sale in sales]
    some = len(events) // 2
    async with pool(url, "analytics_consumer") as opened, opened.connection() as connection, connection.transaction():
        await apply(connection, events[:some], [])
        await sum_up(connection)
        await apply(connection, events[some:], list(unfit))


@pytest.fixture
async def reports(analytics_db: str) -> AsyncIterator[Any]:
    """A client of a running server on an empty database."""
    config = ServeSettings(analytics_db, listen=free_address(), metrics_listen="127.0.0.1:0")
    async with running(lambda stop: serve(config, stop), config.listen) as channel:
        yield AnalyticsServiceStub(channel)


class Question(NamedTuple):
    """A filter, as a request has it and as a sale is tested for it."""

    first: date | None = None
    last: date | None = None
    branch_ids: tuple[int, ...] = ()
    product_ids: tuple[int, ...] = ()

    def fields(self) -> dict[str, Any]:
        days = {"first_date": self.first, "last_date": self.last}
        return {name: pb_date(day) for name, day in days.items() if day}

    def takes(self, sale: Sold) -> bool:
        day = sale.purchase_time.date()
        return (self.first or date.min) <= day <= (self.last or date.max) and (
            not self.branch_ids or sale.branch_id in self.branch_ids
        )


def pb_date(day: date) -> date_pb2.Date:
    return date_pb2.Date(year=day.year, month=day.month, day=day.day)


def day_of(row: Any) -> date:
    return date(row.sales_date.year, row.sales_date.month, row.sales_date.day)


async def pages(method: Any, request: Any, field: str) -> list[Any]:
    """All rows of a listing."""
    rows: list[Any] = []
    for _ in range(1_000):
        reply = await method(request)
        rows += getattr(reply, field)
        if not reply.next_page_token:
            return rows
        assert len(getattr(reply, field)) == request.page_size
        request.page_token = reply.next_page_token
    raise AssertionError("the listing does not end")


FIRST, SECOND = NOON.date(), NOON.date() + timedelta(days=1)
QUESTIONS = [
    Question(),
    Question(first=SECOND),
    Question(last=SECOND),
    Question(first=SECOND, last=SECOND),
    Question(first=date(1, 1, 1), last=date(9999, 12, 31), branch_ids=(2,)),
    Question(last=SECOND, branch_ids=(3, 1, 3)),
    Question(branch_ids=(99,)),
    Question(first=date(2030, 1, 1)),
    Question(last=date(1, 1, 1)),
]


async def test_daily_sales(reports: Any, analytics_db: str) -> None:
    """Per day and branch, in this order, for any range, filter and page size: the sums of exactly those sales."""
    sales = some_sales(300, seed=21)
    await record(analytics_db, sales)
    for question in QUESTIONS:
        sums: defaultdict[tuple[date, int], list[Any]] = defaultdict(lambda: [Decimal(), 0, 0, 0])
        for sale in filter(question.takes, sales):
            row = sums[sale.purchase_time.date(), sale.branch_id]
            row[0] += sale.total
            row[1] += sum(quantity for _, quantity, _ in sale.lines)
            row[2] += 1
            row[3] += sale.customer_id is not None
        for page_size in (1, 4, 1_000):
            request = pb.ListDailySalesRequest(page_size=page_size, branch_ids=question.branch_ids, **question.fields())
            rows = await pages(reports.ListDailySales, request, "daily_sales")
            assert [
                (
                    (day_of(row), row.branch_id),
                    [row.revenue.value, row.item_count, row.purchase_count, row.purchase_with_customer_count],
                )
                for row in rows
            ] == [(key, [f"{row[0]:.2f}", *row[1:]]) for key, row in sorted(sums.items())]


async def test_product_sales(reports: Any, analytics_db: str) -> None:
    """Per day, branch and product, in this order, for any range, filters and page size."""
    sales = some_sales(200, seed=22)
    await record(analytics_db, sales)
    questions = [q._replace(product_ids=ids) for q in QUESTIONS for ids in ((), (7,), (3, 40, 12, 3), (4_000,))]
    for question in questions:
        sums: defaultdict[tuple[date, int, int], list[Any]] = defaultdict(lambda: [0, Decimal()])
        for sale in filter(question.takes, sales):
            for product_id, quantity, price in sale.lines:
                if not question.product_ids or product_id in question.product_ids:
                    row = sums[sale.purchase_time.date(), sale.branch_id, product_id]
                    row[0] += quantity
                    row[1] += quantity * price
        for page_size in (7, 1_000):
            request = pb.ListProductSalesRequest(
                page_size=page_size,
                branch_ids=question.branch_ids,
                product_ids=question.product_ids,
                **question.fields(),
            )
            rows = await pages(reports.ListProductSales, request, "product_sales")
            assert [
                ((day_of(row), row.branch_id, row.product_id), [row.quantity, row.revenue.value]) for row in rows
            ] == [(key, [row[0], f"{row[1]:.2f}"]) for key, row in sorted(sums.items())]


def ranges_over_months(seed: int) -> list[Question]:
    """Ranges that cut months in all ways: at neither end, at one or both, within one month, far beyond the sales."""
    chance = random.Random(seed)
    ends = [date(2026, 3, 1) + timedelta(days=chance.randrange(-20, 140)) for _ in range(40)]
    some = [Question(first, last) for first, last in zip(ends[::2], ends[1::2], strict=True) if first <= last]
    whole = [
        Question(date(2026, 4, 1), date(2026, 5, 31)),
        Question(date(2026, 4, 2), date(2026, 4, 30)),
        Question(date(2026, 4, 1), date(2026, 4, 1)),
        Question(first=date(2026, 4, 20)),
        Question(last=date(2026, 4, 10)),
    ]
    return [q._replace(branch_ids=ids) for q in some + whole for ids in ((), (2,), (99,))]


@pytest.mark.parametrize("order", [pb.TOP_PRODUCTS_ORDER_UNSPECIFIED, 1, pb.TOP_PRODUCTS_ORDER_REVENUE])
async def test_top_products(reports: Any, analytics_db: str, order: Any) -> None:
    """The best by quantity or revenue, equal ones by id; with ties, all that sold as much as the last one."""
    sales = some_sales(50, seed=23) + some_sales(150, seed=28, days=120)
    await record(analytics_db, sales)
    for question in [q for q in QUESTIONS if len(q.branch_ids) < 2] + ranges_over_months(seed=29):
        quantities: Counter[int] = Counter()
        revenues: Counter[int] = Counter()
        for sale in filter(question.takes, sales):
            for product_id, quantity, price in sale.lines:
                quantities[product_id] += quantity
                revenues[product_id] += int(quantity * price * 100)
        measure = revenues if order == pb.TOP_PRODUCTS_ORDER_REVENUE else quantities
        ranking = sorted(measure, key=lambda product_id: (-measure[product_id], product_id))
        for limit in (0, 1, 39, 2**31 - 1):
            cut = limit or 10
            for include_ties in (False, True):
                reply = await reports.ListTopProducts(
                    pb.ListTopProductsRequest(
                        limit=limit,
                        order=order,
                        include_ties=include_ties,
                        branch_id=question.branch_ids[0] if question.branch_ids else None,
                        **question.fields(),
                    )
                )
                wanted = ranking[:cut]
                if include_ties and wanted:
                    wanted = [product_id for product_id in ranking if measure[product_id] >= measure[wanted[-1]]]
                assert not reply.truncated
                assert [(row.product_id, row.quantity, row.revenue.value) for row in reply.top_products] == [
                    (product_id, quantities[product_id], f"{Decimal(revenues[product_id]) / 100:.2f}")
                    for product_id in wanted
                ]


async def test_top_products_with_more_ties_than_fit(reports: Any, analytics_db: str) -> None:
    """1,000 products at most are listed, and it is said when ties were left out."""
    one_each = tuple((product_id, 1, Decimal(1)) for product_id in range(1, 1_001))
    await record(analytics_db, [sold(lines=one_each), sold(lines=((5_000, 2, Decimal(1)),))])
    for limit, include_ties, count, truncated in ((1, True, 1, False), (2, False, 2, False), (2, True, 1_000, True)):
        reply = await reports.ListTopProducts(pb.ListTopProductsRequest(limit=limit, include_ties=include_ties))
        assert (len(reply.top_products), reply.truncated) == (count, truncated)
        assert reply.top_products[0].product_id == 5_000


async def test_customer_is_loyal_to_the_chain(reports: Any, analytics_db: str) -> None:
    """Two purchases in one branch and one in another make a loyal customer of the chain, and of neither branch."""
    customer = str(uuid.uuid4())
    later = NOON + timedelta(days=40, microseconds=1)
    await record(
        analytics_db,
        [
            sold(customer_id=customer),
            sold(customer_id=customer.upper(), purchase_time=later),
            sold(customer_id=customer, branch_id=2),
            sold(),
        ],
    )
    reply = await reports.ListLoyalCustomers(pb.ListLoyalCustomersRequest())
    assert [(row.customer_id, row.purchase_count) for row in reply.loyal_customers] == [(customer, 3)]
    assert reply.loyal_customers[0].last_purchase_time.ToDatetime(UTC) == later
    for branch_id in (1, 2, 3):
        request = pb.ListLoyalCustomersRequest(branch_id=branch_id)
        assert not (await reports.ListLoyalCustomers(request)).loyal_customers
    one = await reports.GetCustomerLoyalty(pb.GetCustomerLoyaltyRequest(customer_id=customer.upper()))
    assert one.loyal_customer == reply.loyal_customers[0]
    assert [(b.branch_id, b.purchase_count, b.last_purchase_time.ToDatetime(UTC)) for b in one.branches] == [
        (1, 2, later),
        (2, 1, NOON),
    ]


@pytest.mark.parametrize("branch_id", [None, 1, 3, 99])
async def test_loyal_customers(reports: Any, analytics_db: str, branch_id: int | None) -> None:
    """Most purchases first, equal ones by id, from any minimum, over pages of any size."""
    sales = some_sales(400, seed=24)
    await record(analytics_db, sales)
    visits: defaultdict[str, list[datetime]] = defaultdict(list)
    for sale in sales:
        if sale.customer_id and branch_id in (None, sale.branch_id):
            visits[sale.customer_id].append(sale.purchase_time)
    ranking = sorted(visits, key=lambda customer_id: (-len(visits[customer_id]), customer_id))
    for least in (0, 1, 2, 5, 2**31 - 1):
        for page_size in (3, 500):
            request = pb.ListLoyalCustomersRequest(page_size=page_size, min_purchase_count=least, branch_id=branch_id)
            rows = await pages(reports.ListLoyalCustomers, request, "loyal_customers")
            assert [(row.customer_id, row.purchase_count, row.last_purchase_time.ToDatetime(UTC)) for row in rows] == [
                (customer_id, len(visits[customer_id]), max(visits[customer_id]))
                for customer_id in ranking
                if len(visits[customer_id]) >= (least or 3)
            ]
            request = pb.ListLoyalCustomersRequest(min_purchase_count=least, branch_id=branch_id)
            assert not (await reports.ListLoyalCustomers(request)).HasField("total_size")
            request.include_total_size = True
            assert (await reports.ListLoyalCustomers(request)).total_size == len(rows)


async def test_unknown_customer(reports: Any, analytics_db: str) -> None:
    """A customer without purchases is not found."""
    await record(analytics_db, [sold()])
    customer = str(uuid.uuid4())
    found = await refusal(reports.GetCustomerLoyalty(pb.GetCustomerLoyaltyRequest(customer_id=customer)))
    assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "CUSTOMER_NOT_FOUND")
    assert found.info.metadata["customer_id"] == customer
    assert found.info.metadata["data_as_of_time"] > "2026"  # how far "not found" can be trusted
    assert found.info.metadata["quarantined_count"] == "0"


@pytest.mark.parametrize("branch_id", [None, 2, 99])
async def test_sales_summary(reports: Any, analytics_db: str, branch_id: int | None) -> None:
    """Sums over the chain or a branch, of all time or some days; unique customers without dates only."""
    sales = some_sales(200, seed=25) + some_sales(200, seed=28, days=120)
    await record(analytics_db, sales[:100])
    await record(analytics_db, sales[100:])
    for question in QUESTIONS[:4] + QUESTIONS[-2:] + [q for q in ranges_over_months(seed=30) if not q.branch_ids]:
        taken = [s for s in filter(question.takes, sales) if branch_id in (None, s.branch_id)]
        reply = await reports.GetSalesSummary(pb.GetSalesSummaryRequest(branch_id=branch_id, **question.fields()))
        assert (reply.revenue.value, reply.item_count, reply.purchase_count) == (
            f"{sum((s.total for s in taken), Decimal()):.2f}",
            sum(quantity for s in taken for _, quantity, _ in s.lines),
            len(taken),
        )
        assert reply.HasField("unique_customer_count") == (question == Question())
        if question == Question():
            assert reply.unique_customer_count == len({s.customer_id for s in taken} - {None})


async def test_nothing_yet(reports: Any) -> None:
    """Before the first purchase every answer is empty and says so."""
    summary = await reports.GetSalesSummary(pb.GetSalesSummaryRequest())
    assert summary == pb.GetSalesSummaryResponse(revenue={"value": "0.00"}, unique_customer_count=0)
    assert await reports.ListDailySales(pb.ListDailySalesRequest()) == pb.ListDailySalesResponse()
    assert await reports.ListProductSales(pb.ListProductSalesRequest()) == pb.ListProductSalesResponse()
    assert await reports.ListTopProducts(pb.ListTopProductsRequest()) == pb.ListTopProductsResponse()
    assert await reports.ListLoyalCustomers(pb.ListLoyalCustomersRequest()) == pb.ListLoyalCustomersResponse()


async def test_every_answer_says_how_fresh_it_is(reports: Any, analytics_db: str) -> None:
    """The time of the newest batch and the number of quarantined events are in each answer."""
    customer = str(uuid.uuid4())
    poison = [QuarantinedEvent(None, "UNDECODABLE", "no JSON", b"%d" % n, {}) for n in range(3)]
    await record(analytics_db, [sold(customer_id=customer)], poison)
    ((applied_at,),) = query(analytics_db, "SELECT applied_at FROM freshness")
    for reply in [
        await reports.ListDailySales(pb.ListDailySalesRequest()),
        await reports.ListProductSales(pb.ListProductSalesRequest()),
        await reports.ListTopProducts(pb.ListTopProductsRequest()),
        await reports.ListLoyalCustomers(pb.ListLoyalCustomersRequest()),
        await reports.GetCustomerLoyalty(pb.GetCustomerLoyaltyRequest(customer_id=customer)),
        await reports.GetSalesSummary(pb.GetSalesSummaryRequest()),
    ]:
        assert reply.data_as_of_time.ToDatetime(UTC) == applied_at
        assert not reply.HasField("complete_through_time")
        assert reply.quarantined_count == 3


async def test_answers_and_freshness_are_of_one_moment(reports: Any, analytics_db: str) -> None:
    """While batches commit, no answer mixes two states: the number of purchases fits the number of quarantined."""
    done = asyncio.Event()

    async def ask() -> list[tuple[int, int]]:
        seen = []
        while not done.is_set():
            reply = await reports.GetSalesSummary(pb.GetSalesSummaryRequest())
            seen.append((reply.purchase_count, reply.quarantined_count))
        return seen

    asking = asyncio.gather(*[ask() for _ in range(4)])
    async with pool(analytics_db, "analytics_consumer") as opened:
        for n in range(100):
            events = [decode(sold("1.00").body(), ZoneInfo("UTC"))]
            poison = [QuarantinedEvent(None, "UNDECODABLE", "no JSON", b"%d" % n, {})]
            async with opened.connection() as connection, connection.transaction():
                await apply(connection, events, poison)
    done.set()
    seen = [pair for pairs in await asking for pair in pairs]
    assert all(purchases == quarantined for purchases, quarantined in seen)
    assert len(set(seen)) > 3


BAD_DATE = date_pb2.Date(year=2026, month=2, day=30)
YEAR_0 = date_pb2.Date(year=0, month=1, day=1)
HUGE_DATE = date_pb2.Date(year=2**31 - 1, month=2**31 - 1, day=-(2**31))
DAY = pb_date(FIRST)
DAY_BEFORE = pb_date(FIRST - timedelta(days=1))


WRONG: list[tuple[Any, list[str]]] = [
    (
        pb.ListDailySalesRequest(page_size=-1, first_date=BAD_DATE, last_date=YEAR_0, branch_ids=[1, 0, -5]),
        ["page_size", "first_date", "last_date", "branch_ids[1]", "branch_ids[2]"],
    ),
    (pb.ListDailySalesRequest(first_date=DAY, last_date=DAY_BEFORE), ["last_date"]),
    (pb.ListDailySalesRequest(first_date=HUGE_DATE), ["first_date"]),
    (pb.ListDailySalesRequest(first_date=date_pb2.Date()), ["first_date"]),
    (pb.ListDailySalesRequest(branch_ids=range(1, 1_002)), ["branch_ids"]),
    (pb.ListProductSalesRequest(branch_ids=[-1], product_ids=[0]), ["branch_ids[0]", "product_ids[0]"]),
    (pb.ListProductSalesRequest(product_ids=range(1, 1_002), last_date=BAD_DATE), ["last_date", "product_ids"]),
    (
        pb.ListTopProductsRequest(limit=-1, branch_id=0, first_date=BAD_DATE, order=7),  # type: ignore[arg-type]
        ["limit", "branch_id", "first_date", "order"],
    ),
    (
        pb.ListTopProductsRequest(first_date=DAY, last_date=DAY_BEFORE, branch_id=-(2**31)),
        ["branch_id", "last_date"],
    ),
    (
        pb.ListLoyalCustomersRequest(page_size=-1, min_purchase_count=-1, branch_id=0),
        ["page_size", "min_purchase_count", "branch_id"],
    ),
    (pb.GetCustomerLoyaltyRequest(), ["customer_id"]),
    (pb.GetCustomerLoyaltyRequest(customer_id="\0"), ["customer_id"]),
    (pb.GetCustomerLoyaltyRequest(customer_id="4f7c2d1e9b3a4c588e6f0a1b2c3d4e5f"), ["customer_id"]),
    (pb.GetCustomerLoyaltyRequest(customer_id="4f7c2d1e-9b3a-4c58-8e6f-0a1b2c3d4e5f\n"), ["customer_id"]),
    (
        pb.GetSalesSummaryRequest(branch_id=-1, first_date=BAD_DATE, last_date=YEAR_0),
        ["branch_id", "first_date", "last_date"],
    ),
    (pb.GetSalesSummaryRequest(first_date=DAY, last_date=DAY_BEFORE), ["last_date"]),
]


async def test_wrong_requests(reports: Any) -> None:
    """Whatever is wrong with a request is said at once, with the fields' paths."""
    for request, fields in WRONG:
        method = getattr(reports, type(request).__name__.removesuffix("Request"))
        found = await refusal(method(request))
        assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert (found.info.domain, found.fields) == ("analytics.retail.example", fields)


async def test_limits_are_met_not_refused(reports: Any, analytics_db: str) -> None:
    """Too large a page or limit is read as the largest, and 1,000 ids are taken."""
    await record(analytics_db, [sold(lines=tuple((n, 1, Decimal(1)) for n in range(1, 1_102)))])
    rows = await reports.ListProductSales(pb.ListProductSalesRequest(page_size=2**31 - 1))
    assert (len(rows.product_sales), bool(rows.next_page_token)) == (1_000, True)
    assert len((await reports.ListProductSales(pb.ListProductSalesRequest())).product_sales) == 500
    top = await reports.ListTopProducts(pb.ListTopProductsRequest(limit=2**31 - 1))
    assert (len(top.top_products), top.truncated) == (1_000, False)
    ids = range(1, 1_001)
    rows = await reports.ListProductSales(pb.ListProductSalesRequest(page_size=1_000, product_ids=ids, branch_ids=ids))
    assert (len(rows.product_sales), rows.next_page_token) == (1_000, "")


async def test_page_tokens_belong_to_their_listing(reports: Any, analytics_db: str) -> None:
    """A token that was made up, changed, or made for other filters is refused; the page size may change."""
    await record(analytics_db, some_sales(40, seed=26))
    token = (await reports.ListDailySales(pb.ListDailySalesRequest(page_size=2))).next_page_token
    assert (await reports.ListDailySales(pb.ListDailySalesRequest(page_size=1, page_token=token))).daily_sales
    for request in (
        pb.ListDailySalesRequest(page_token=token, branch_ids=[1]),
        pb.ListDailySalesRequest(page_token=token, first_date=DAY),
        pb.ListDailySalesRequest(page_token=token[:-2]),
        pb.ListDailySalesRequest(page_token="x" + token),
        pb.ListDailySalesRequest(page_token="ü\0"),
        pb.ListProductSalesRequest(page_token=token),
        pb.ListLoyalCustomersRequest(page_token=token),
    ):
        method = getattr(reports, type(request).__name__.removesuffix("Request"))
        found = await refusal(method(request))
        assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TOKEN")


async def test_pages_stay_correct_while_sales_arrive(reports: Any, analytics_db: str) -> None:
    """Rows that come in between shift no page: what was there at the start is listed once."""
    chance = random.Random(27)
    sales = some_sales(60, seed=27, days=9)
    await record(analytics_db, sales)
    before = await pages(reports.ListDailySales, pb.ListDailySalesRequest(page_size=1_000), "daily_sales")
    request, seen = pb.ListDailySalesRequest(page_size=2), []
    while True:
        reply = await reports.ListDailySales(request)
        seen += [(day_of(row), row.branch_id) for row in reply.daily_sales]
        if not reply.next_page_token:
            break
        request.page_token = reply.next_page_token
        moment = NOON + timedelta(days=chance.randint(-3, 12))
        await record(analytics_db, [sold(branch_id=chance.randint(4, 9), purchase_time=moment)])
    assert seen == sorted(set(seen))
    assert {(day_of(row), row.branch_id) for row in before} <= set(seen)


async def test_a_query_ends_with_its_callers_deadline(reports: Any, analytics_db: str) -> None:
    """A caller that waits half a second leaves no query behind in the database."""
    with psycopg.connect(analytics_db) as holder:
        holder.execute("LOCK TABLE daily_sales_by_branch")  # stands in for a query that takes too long
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reports.ListDailySales(pb.ListDailySalesRequest(), timeout=0.5)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(lambda: nothing_runs(analytics_db), "the query has ended", within_s=9)
    assert not (await reports.ListDailySales(pb.ListDailySalesRequest())).daily_sales


async def nothing_runs(url: str) -> bool:
    """Whether no query of the server is under way."""
    waiting = "application_name = 'analytics serve' AND state = 'active' AND datname = current_database()"
    return query(url, f"SELECT count(*) FROM pg_stat_activity WHERE {waiting}") == [(0,)]


async def test_database_outage_is_told_and_passes(reports: Any, analytics_db: str, postgres_url: str) -> None:
    """While the database is down calls are UNAVAILABLE, to be tried again; afterwards they are answered."""
    await record(analytics_db, [sold("1.00")])
    name = analytics_db.rpartition("/")[2]
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false'.encode())
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        found = await refusal(reports.GetSalesSummary(pb.GetSalesSummaryRequest(), timeout=10))
        assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
        assert found.retry.retry_delay.ToMilliseconds() > 0
        admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true'.encode())
    assert await eventually(lambda: revenue(reports), "it answers again") == "1.00"


async def revenue(reports: Any) -> str:
    """The revenue of all time; empty while the database is not available."""
    try:
        reply = await reports.GetSalesSummary(pb.GetSalesSummaryRequest(), timeout=10)
    except grpc.aio.AioRpcError as error:
        if error.code() == grpc.StatusCode.UNAVAILABLE:
            return ""
        raise
    return str(reply.revenue.value)
