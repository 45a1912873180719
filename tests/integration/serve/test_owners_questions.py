"""The analytics server beside the owner's own books: every question, in every way, on real sales and made-up ones."""

import os
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from analytics_svc.commands.serve import serve
from analytics_svc.ingest.apply import apply
from analytics_svc.ingest.events import decode
from analytics_svc.settings import ServeSettings
from retail.analytics.v1 import analytics_service_pb2 as pb
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub
from tests.conftest import pool
from tests.integration.conftest import free_address, running
from tests.integration.owners_books import Books, Entry, day_in, online_retail
from tests.integration.purchase_events import Sold, query
from tests.integration.serve.test_analytics_queries import day_of, pages, pb_date

REAL_FILE = os.environ.get("ONLINE_RETAIL_FILE")
BATCH = 500
DAY = timedelta(days=1)
BRANCHES = (None, 1, 2, 3, 99)
LEAST = (1, 3, 7)

Range = tuple[date | None, date | None]


@asynccontextmanager
async def serving(url: str, zone: str, books: Books, address: str | None = None) -> AsyncIterator[Any]:
    """A client of a running server whose write half has counted the sales."""
    async with pool(url, "analytics_consumer") as opened:
        for start in range(0, len(books.entries), BATCH):
            events = [decode(body_of(entry), ZoneInfo(zone)) for entry in books.entries[start : start + BATCH]]
            async with opened.connection() as connection, connection.pipeline(), connection.transaction():
                await apply(connection, events, [])
    listen = address or free_address()
    config = ServeSettings(url, business_time_zone=zone, listen=listen, metrics_listen="127.0.0.1:0")
    async with running(lambda stop: serve(config, stop), config.listen) as channel:
        yield AnalyticsServiceStub(channel)


def body_of(entry: Entry) -> bytes:
    lines = tuple((product, units, amount / units) for product, units, amount in entry.lines)
    return Sold(lines, entry.branch, entry.customer, entry.time, entry.event_id).body()


def dates(days: Range) -> dict[str, Any]:
    return {name: pb_date(day) for name, day in zip(("first_date", "last_date"), days, strict=True) if day}


def some_ranges(books: Books, count: int, seed: int) -> list[Range]:
    """All time, ranges open at one end, whole months, and any ranges: a day, parts of months, parts of years."""
    days = [entry.day for entry in books.entries]
    first, last = min(days), max(days)
    month = (first + 45 * DAY).replace(day=1)
    chance = random.Random(seed)
    ends = [sorted(first + chance.randrange(-5, (last - first).days + 5) * DAY for _ in "12") for _ in range(count)]
    return [
        (None, None),
        (None, month + 3 * DAY),
        (month - 3 * DAY, None),
        (month, (month + 70 * DAY).replace(day=1) - DAY),
        (last, last),
        *((start, end) for start, end in ends),
    ]


async def check_summaries(client: Any, books: Books, ranges: Sequence[Range]) -> None:
    for days in ranges:
        for branch in BRANCHES:
            chosen = books.of(*days, *([branch] if branch else []))
            reply = await client.GetSalesSummary(pb.GetSalesSummaryRequest(branch_id=branch, **dates(days)))
            assert (reply.revenue.value, reply.item_count, reply.purchase_count) == chosen.summary(), (days, branch)
            assert reply.HasField("unique_customer_count") == (days == (None, None))
            if days == (None, None):
                assert reply.unique_customer_count == len({entry.customer for entry in chosen.entries} - {None})


async def check_daily_sales(client: Any, books: Books, ranges: Sequence[Range]) -> None:
    for days in ranges:
        for branches in ((), (2,), (3, 1), (99,)):
            request = pb.ListDailySalesRequest(page_size=1_000, branch_ids=branches, **dates(days))
            rows = await pages(client.ListDailySales, request, "daily_sales")
            assert [
                (
                    day_of(row),
                    row.branch_id,
                    row.revenue.value,
                    row.item_count,
                    row.purchase_count,
                    row.purchase_with_customer_count,
                )
                for row in rows
            ] == books.of(*days, *branches).daily_sales()


async def check_product_sales(client: Any, books: Books, ranges: Sequence[Range], products: Sequence[int]) -> None:
    filters: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        ((), tuple(products)),
        ((), (products[0],)),
        ((2,), tuple(products)),
        ((3, 1), (products[0], 999_999)),
        ((99,), ()),
    ]
    for days in ranges:
        short = days[0] and days[1] and days[1] - days[0] < 40 * DAY
        for branches, chosen in [*filters, *([((), ()), ((1,), ())] if short else [])]:
            request = pb.ListProductSalesRequest(
                page_size=1_000, branch_ids=branches, product_ids=chosen, **dates(days)
            )
            rows = await pages(client.ListProductSales, request, "product_sales")
            assert [
                (day_of(row), row.branch_id, row.product_id, row.quantity, row.revenue.value) for row in rows
            ] == books.of(*days, *branches).product_sales(*chosen)


async def check_top_products(client: Any, books: Books, ranges: Sequence[Range]) -> None:
    for days in ranges:
        for branch in BRANCHES:
            chosen = books.of(*days, *([branch] if branch else []))
            for limit, by_revenue, ties in ((5, False, False), (40, False, True), (12, True, True), (900, True, False)):
                reply = await client.ListTopProducts(
                    pb.ListTopProductsRequest(
                        limit=limit,
                        order=pb.TOP_PRODUCTS_ORDER_REVENUE if by_revenue else pb.TOP_PRODUCTS_ORDER_QUANTITY,
                        include_ties=ties,
                        branch_id=branch,
                        **dates(days),
                    )
                )
                wanted = chosen.top_products(limit, by_revenue=by_revenue, ties=ties)
                listed = [(row.product_id, row.quantity, row.revenue.value) for row in reply.top_products]
                assert (listed, reply.truncated) == (wanted[:1_000], len(wanted) > 1_000), (days, branch)


async def check_loyalty(client: Any, books: Books) -> None:
    for branch in BRANCHES:
        for least in LEAST:
            request = pb.ListLoyalCustomersRequest(page_size=500, min_purchase_count=least, branch_id=branch)
            rows = await pages(client.ListLoyalCustomers, request, "loyal_customers")
            assert [(row.customer_id, row.purchase_count, row.last_purchase_time.ToDatetime(UTC)) for row in rows] == (
                books.of(None, None, *([branch] if branch else [])).loyal_customers(least)
            )


async def check_customer_cards(client: Any, books: Books) -> None:
    """Of customers who shop in several branches, and of some who do not."""
    visits: dict[str, dict[int, list[datetime]]] = {}
    for entry in books.entries:
        if entry.customer:
            visits.setdefault(entry.customer, {}).setdefault(entry.branch, []).append(entry.time)
    faithful = [who for who in sorted(visits) if len(visits[who]) == 1][:50]
    roaming = [who for who in sorted(visits) if len(visits[who]) > 1][:150]
    assert roaming and faithful
    for who in faithful + roaming:
        reply = await client.GetCustomerLoyalty(pb.GetCustomerLoyaltyRequest(customer_id=who))
        times = [time for branch in visits[who].values() for time in branch]
        assert reply.loyal_customer.purchase_count == len(times)
        assert reply.loyal_customer.last_purchase_time.ToDatetime(UTC) == max(times)
        assert [
            (row.branch_id, row.purchase_count, row.last_purchase_time.ToDatetime(UTC)) for row in reply.branches
        ] == [(branch, len(times), max(times)) for branch, times in sorted(visits[who].items())]


async def check_everything(client: Any, books: Books, ranges: int, seed: int) -> None:
    days = some_ranges(books, ranges, seed)
    best = [product for product, _, _ in books.top_products(12, by_revenue=False, ties=False)]
    await check_summaries(client, books, days)
    await check_daily_sales(client, books, days[:8])
    await check_product_sales(client, books, days[:10], best)
    await check_top_products(client, books, days)
    await check_loyalty(client, books)
    await check_customer_cards(client, books)


@pytest.mark.skipif(
    not REAL_FILE,
    reason="ONLINE_RETAIL_FILE does not name the UCI Online Retail file, which is not part of the project",
)
@pytest.mark.timeout(600)
async def test_a_real_shops_year(analytics_db: str) -> None:
    """Three branches of a real retailer, 2010-12-01 to 2011-12-09: 519,598 lines."""
    assert REAL_FILE
    books = online_retail(Path(REAL_FILE))
    assert books.summary() == ("2027195.43", 519_598, 19_959)
    async with serving(analytics_db, "UTC", books) as client:
        await check_everything(client, books, ranges=6, seed=61)


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Pacific/Apia"])
async def test_a_chain_by_its_own_clock(analytics_db: str, zone: str) -> None:
    """Sales around the midnights of a zone, most of them on days that the clock makes shorter, longer, or skips.

    Lord Howe's clock changes by half an hour; in Apia, 2011-12-30 never was.
    """
    query(analytics_db, f"UPDATE analytics_settings SET time_zone = '{zone}'")
    books = chain_with_night_shifts(zone, sales=1_500, seed=62)
    async with serving(analytics_db, zone, books) as client:
        await check_everything(client, books, ranges=8, seed=63)


def chain_with_night_shifts(zone: str, sales: int, seed: int) -> Books:
    chance = random.Random(seed)
    changes = clock_changes(zone, date(2011, 9, 1), date(2012, 4, 30))
    assert len(changes) >= 2
    customers = [str(uuid.UUID(int=chance.getrandbits(128))) for _ in range(sales // 6)]
    entries = []
    for _ in range(sales):
        if chance.random() < 0.6:
            hours = chance.uniform(-40, 40)
            time = chance.choice(changes) + timedelta(hours=hours, microseconds=chance.randrange(10**6))
        else:
            time = datetime(2011, 9, 1, tzinfo=UTC) + timedelta(seconds=chance.randrange(240 * 86_400))
        prices = (
            (product, chance.choice((1, 1, 2, 5))) for product in chance.sample(range(1, 60), chance.randint(1, 6))
        )
        lines = tuple((product, units, units * Decimal(chance.randrange(1, 3_000)) / 100) for product, units in prices)
        entries.append(
            Entry(
                str(uuid.UUID(int=chance.getrandbits(128))),
                day_in(zone, time),
                time,
                chance.randint(1, 3),
                chance.choice(customers) if chance.random() < 0.7 else None,
                tuple((product, units, amount.quantize(Decimal("0.01"))) for product, units, amount in lines),
            )
        )
    return Books(entries)


def clock_changes(zone: str, first: date, last: date) -> list[datetime]:
    """The hours in which the zone's offset changes."""
    hour = datetime(first.year, first.month, first.day, tzinfo=UTC)
    found = []
    while hour.date() <= last:
        after = hour + timedelta(hours=1)
        if hour.astimezone(ZoneInfo(zone)).utcoffset() != after.astimezone(ZoneInfo(zone)).utcoffset():
            found.append(hour)
        hour = after
    return found
