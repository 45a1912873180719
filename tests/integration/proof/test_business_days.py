"""Every part of the system has each sale on the same day, at the odd hours of every time zone that exists.

ZONES=1000 has all of them, which takes an hour; in CI there are the oddest.
"""

import itertools
import json
import random
import uuid
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import grpc
import pytest

import purchases_svc.__main__ as purchases
from analytics_svc.commands.serve import serve
from analytics_svc.ingest.apply import apply
from analytics_svc.ingest.events import decode
from analytics_svc.proof import audit, rebuild
from analytics_svc.proof.day import prove_day
from analytics_svc.proof.verdicts import Verdict
from analytics_svc.settings import ServeSettings as AnalyticsSettings
from analytics_svc.upstream.source import CellSource, Source
from chassis import wire, zones
from chassis.postgres import Pool
from purchases_svc.answers import Recorded
from purchases_svc.backlog import Backlog
from purchases_svc.flush import CONNECTIONS
from purchases_svc.messages import parse_sale
from purchases_svc.partitions import Partitions
from purchases_svc.record import Recorder
from purchases_svc.settings import ServeSettings
from retail.analytics.v1 import analytics_service_pb2
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub
from retail.purchases.v1 import purchases_service_pb2 as pb
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.conftest import pool
from tests.integration.conftest import free_address, running
from tests.integration.purchase_events import query
from tests.integration.sales import refusal, sale
from tests.sizes import how_many

ODD = [
    "Africa/Cairo",  # midnight is skipped, and comes twice
    "America/Havana",  # 01:00 becomes 00:00
    "America/Sao_Paulo",  # clocks were set back at midnight, to 23:00
    "America/St_Johns",  # clocks were set back at 00:01, so that the day before came once more
    "Antarctica/Casey",  # the same with three hours
    "Asia/Kathmandu",  # a quarter of an hour; nothing else
    "Atlantic/Azores",  # 01:00 becomes 00:00
    "Pacific/Apia",  # a day was skipped
]
ZONES = [*ODD, *sorted(set(zones.names()) - {*ODD})][: how_many("ZONES")]
DAY, HOUR, MINUTE = timedelta(days=1), timedelta(hours=1), timedelta(minutes=1)
FIRST, LAST = datetime(2000, 1, 2, tzinfo=UTC), datetime.now(UTC) - 3 * DAY
YEAR_AGO = LAST - 365 * DAY
CUSTOMERS = [str(uuid.UUID(int=n, version=4)) for n in range(1, 5)]


def label(moment: datetime, zone: ZoneInfo) -> date:
    """The day that a clock shows which is set by hand at each transition."""
    offset = zone.utcoffset(moment.astimezone(zone))
    assert offset is not None
    return (moment + offset).replace(tzinfo=None).date()


def transitions(zone: ZoneInfo) -> list[datetime]:
    """When the zone's offset from UTC changed."""

    def offset(moment: datetime) -> Any:
        return moment.astimezone(zone).utcoffset()

    found = []
    step, before = 5 * DAY, FIRST
    while before < LAST:
        low, high = before, min(before + step, LAST)
        before = high
        if offset(low) != offset(high):
            while high - low > timedelta(seconds=1):
                middle = low + (high - low) / 2
                low, high = (middle, high) if offset(middle) == offset(low) else (low, middle)
            found.append(high.replace(microsecond=0))
    return found


def oddest_transitions(zone: ZoneInfo) -> list[datetime]:
    """Two where clocks were set back, one where they were set forward: the closest to midnight, and then the latest."""

    def clock(moment: datetime) -> timedelta:
        shown = moment.astimezone(zone)
        return timedelta(hours=shown.hour, minutes=shown.minute, seconds=shown.second)

    def oddness(moment: datetime) -> tuple[timedelta, datetime]:
        shown = clock(moment), clock(moment - timedelta(seconds=1))
        return -min(min(each, DAY - each) for each in shown), moment

    def is_back(moment: datetime) -> bool:
        before, after = (moment.astimezone(zone).replace(tzinfo=None) for moment in (moment - HOUR / 2, moment))
        return after - before < HOUR / 2

    found = sorted(transitions(zone), key=oddness)
    back = [moment for moment in found if is_back(moment)]
    return back[-2:] + [moment for moment in found if moment not in back][-1:]


def odd_moments(zone: ZoneInfo) -> list[datetime]:
    """Around the oddest transitions, and the midnights beside them."""
    steps = [n * HOUR / 2 for n in range(-4, 5)]
    moments = set()
    for transition in oddest_transitions(zone) or [datetime(2026, 3, 1, 12, tzinfo=UTC)]:
        near = [transition + step for step in steps] + [
            transition + MINUTE,
            transition - 26 * HOUR,
            transition + 26 * HOUR,
        ]
        midnight = next(
            moment
            for moment in (transition + n * 15 * MINUTE for n in itertools.count(1))
            if label(moment, zone) != label(moment - 15 * MINUTE, zone)
        )
        moments |= {*near, *(moment - timedelta.resolution for moment in (transition, midnight)), midnight}
    return sorted(moments)


class Sale(NamedTuple):
    request: pb.CreatePurchaseRequest
    event_id: str
    day: date
    branch_id: int
    cents: int
    customer_id: str


def test_names_that_sql_takes_for_abbreviations(postgres_url: str) -> None:
    """Those that we refuse are those that mean something else in SQL."""
    both = query(postgres_url, "SELECT abbrev FROM pg_timezone_abbrevs")
    moments = [datetime(2026, month, 1, tzinfo=UTC) for month in (1, 7)]

    def differs(name: str) -> bool:
        shown = query(
            postgres_url, " UNION ALL ".join(f"SELECT '{at}'::timestamptz AT TIME ZONE '{name}'" for at in moments)
        )
        return shown != [(moment.astimezone(zones.load(name)).replace(tzinfo=None),) for moment in moments]

    assert {name for (name,) in both if name in zones.names() and differs(name)} == set(zones.ABBREVIATIONS)


def some_zones(count: int) -> list[str]:
    """About so many, others each time, and the oddest always."""
    names = sorted(zones.names())
    step = max(len(names) // count, 1)
    return sorted({*ODD, *names[random.randrange(step) :: step]})


async def test_labels_of_zones_side_by_side(
    purchases_channel: grpc.aio.Channel, purchases_db: str, analytics_db: str
) -> None:
    """What was labelled is never labelled anew: sales of many zones, in one pair of databases, agree sale by sale."""
    names = some_zones(how_many("ZONES_SIDE_BY_SIDE"))
    print(*names)
    tills: Any = PurchasesServiceStub(purchases_channel)
    async with pool(purchases_db, "purchases_service", size=CONNECTIONS) as opened:
        sales = [each for name in names for each in await record(opened, name, recent_moments(zones.load(name)))]
    await check_control_totals(tills, sales, page_sizes=(7, 1_000))
    await check_exports(tills, sales)
    await count(purchases_db, analytics_db)
    await check_answers(analytics_db, "UTC", sales)
    await check_proofs(analytics_db, CellSource(purchases_channel, zones.load("UTC")), sales, rebuilt=5)
    await check_answers(analytics_db, "UTC", sales)


async def test_the_first_sale_need_not_be_on_the_first_day(
    purchases_channel: grpc.aio.Channel, purchases_db: str
) -> None:
    """Where clocks were set back after midnight, the days from that of the first sale to that of the last lack one."""
    back = datetime(2010, 11, 7, 2, 31, tzinfo=UTC)  # 00:01 became 23:01
    async with pool(purchases_db, "purchases_service", size=CONNECTIONS) as opened:
        sales = await record(opened, "America/St_Johns", [back - MINUTE / 2, back + HOUR / 2])
    assert [each.day for each in sales] == [date(2010, 11, 7), date(2010, 11, 6)]
    await check_control_totals(PurchasesServiceStub(purchases_channel), sales)
    await check_exports(PurchasesServiceStub(purchases_channel), sales)


@pytest.mark.parametrize("zone", ZONES)
async def test_all_have_a_sale_on_one_day(purchases_db: str, analytics_db: str, zone: str) -> None:
    """Control totals of any page size, exports, the owner's answers, audit and repairs agree, sale by sale."""
    query(purchases_db, f"UPDATE chain_settings SET time_zone = '{zone}'")
    query(analytics_db, f"UPDATE analytics_settings SET time_zone = '{zone}'")
    config = ServeSettings(purchases_db, zone, listen=free_address(), metrics_listen="127.0.0.1:0", backlog_months=0)
    async with running(lambda stop: purchases.serve(config, stop), config.listen) as channel:
        tills: Any = PurchasesServiceStub(channel)
        sales = await sell(tills, zones.load(zone))
        await check_control_totals(tills, sales)
        await check_exports(tills, sales)
        await count(purchases_db, analytics_db)
        await check_answers(analytics_db, zone, sales)
        await check_proofs(analytics_db, CellSource(channel, zones.load(zone)), sales)
        await check_answers(analytics_db, zone, sales)
        await check_receipts(tills, sales)


async def sell(tills: Any, zone: ZoneInfo) -> list[Sale]:
    """At each odd moment an anonymous sale and one to a customer."""
    sales: list[Sale] = []
    for number, moment in enumerate(odd_moments(zone)):
        for customer_id in ("", CUSTOMERS[number % len(CUSTOMERS)]):
            cents = 100 + len(sales)
            request = sale((f"{cents / 100:.2f}",), branch_id=1 + number % 3)
            request.purchase.purchase_time.FromDatetime(moment)
            if customer_id:
                request.purchase.customer_id, request.register_customer = customer_id, True
            reply = await tills.CreatePurchase(request)
            day = wire_day(reply.purchase.business_day)
            assert day == label(moment, zone), (moment, zone)
            sales.append(Sale(request, reply.consistency_token, day, 1 + number % 3, cents, customer_id))
    return sales


def recent_moments(zone: ZoneInfo) -> list[datetime]:
    """Around the transitions of the last year."""
    recent = [moment for moment in transitions(zone) if moment > YEAR_AGO] or [datetime(2026, 3, 1, tzinfo=UTC)]
    return [moment + step for moment in recent for step in (-HOUR, -timedelta.resolution, HOUR / 2, HOUR)]


async def record(opened: Pool, name: str, moments: Sequence[datetime]) -> list[Sale]:
    """As a service of that zone does it."""
    zone = zones.load(name)
    limits: Any = {"batch_max": 500, "waiting_max": 1_000, "waiting_items_max": 1_000, "flush_timeout_s": 60}
    recorder = Recorder(opened, Partitions(opened), Backlog(opened, 0), zone=zone, **limits)
    number = sorted(zones.names()).index(name)
    requests = []
    for moment in moments:
        requests.append(sale((f"{100 + number / 100:.2f}",), branch_id=1 + number % 50))
        requests[-1].purchase.purchase_time.FromDatetime(moment)
    outcomes = await recorder.record_all([parse_sale(request) for request in requests])
    await recorder.close()
    sales = []
    for request, moment, outcome in zip(requests, moments, outcomes, strict=True):
        assert isinstance(outcome, Recorded), outcome
        stored = outcome.purchase
        assert stored.business_day == label(moment, zone)
        sales.append(Sale(request, stored.event_id, stored.business_day, 1 + number % 50, 10_000 + number, ""))
    return sales


def wire_day(value: Any) -> date:
    return date(value.year, value.month, value.day)


def sums(sales: Sequence[Sale]) -> dict[tuple[date, int], tuple[int, int, int]]:
    """Purchases, those with a customer, and cents; by day and branch."""
    rows: defaultdict[tuple[date, int], Counter[str]] = defaultdict(Counter)
    for each in sales:
        rows[each.day, each.branch_id].update(purchases=1, customers=bool(each.customer_id), cents=each.cents)
    return {key: (row["purchases"], row["customers"], row["cents"]) for key, row in rows.items()}


def windows(sales: Sequence[Sale]) -> list[tuple[date, date]]:
    """The days with sales, and those before and after."""
    days = sorted({each.day for each in sales})
    found: list[tuple[date, date]] = []
    for day in days:
        if found and day - found[-1][1] <= 4 * DAY and day - found[-1][0] <= 28 * DAY:
            found[-1] = found[-1][0], day + 2 * DAY
        else:
            found.append((day - 2 * DAY, day + 2 * DAY))
    return found


def each_day(first: date, last: date) -> list[date]:
    return [first + n * DAY for n in range((last - first).days + 1)]


async def listed(ask: Any, request: Any, field: str) -> list[Any]:
    rows = []
    while True:
        reply = await ask(request)
        rows += getattr(reply, field)
        if not reply.next_page_token:
            return rows
        request.page_token = reply.next_page_token


async def check_control_totals(tills: Any, sales: Sequence[Sale], page_sizes: Sequence[int] = (1, 2, 1_000)) -> None:
    expected = sums(sales)
    for first, last in windows(sales):
        ranges = [(first, last, size) for size in page_sizes] + [(day, day, 2) for day in each_day(first, last)]
        for start, end, size in ranges:
            request = pb.ListControlTotalsRequest(first_date=wire.date(start), last_date=wire.date(end), page_size=size)
            rows = await listed(tills.ListControlTotals, request, "control_totals")
            assert [
                ((wire_day(row.sales_date), row.branch_id), (
                    row.purchase_count, row.purchase_with_customer_count, cents(row.revenue.value)
                ))
                for row in rows
            ] == sorted((key, row) for key, row in expected.items() if start <= key[0] <= end)  # fmt: skip
    reply = await tills.ListControlTotals(request)
    days = [each.day for each in sales]
    assert (wire_day(reply.earliest_sales_date), wire_day(reply.latest_sales_date)) == (min(days), max(days))


def cents(amount: str) -> int:
    return int(amount.replace(".", ""))


async def check_exports(tills: Any, sales: Sequence[Sale]) -> None:
    for first, last in windows(sales):
        for day in each_day(first, last):
            request = pb.ExportPurchasesRequest(first_date=wire.date(day), last_date=wire.date(day))
            exported = [
                (reply.event_id, wire_day(reply.purchase.business_day))
                async for reply in tills.ExportPurchases(request)
            ]
            assert sorted(exported) == sorted((each.event_id, day) for each in sales if each.day == day)


async def check_receipts(tills: Any, sales: Sequence[Sale]) -> None:
    """A receipt number is free again on the next business day, and not before."""
    for first, second in itertools.pairwise(sales[::2]):
        request = sale(("1.00",), branch_id=first.branch_id, receipt_id=first.request.purchase.receipt_id)
        request.purchase.purchase_time.CopyFrom(second.request.purchase.purchase_time)
        if second.day == first.day:
            assert (await refusal(tills.CreatePurchase(request))).info.reason == "RECEIPT_EXISTS"
        else:
            await tills.CreatePurchase(request)


async def count(purchases_url: str, analytics_url: str) -> None:
    """What the relay and the consumer do, without the broker; and the keeper."""
    bodies = query(purchases_url, "SELECT payload_json::text FROM outbox_events ORDER BY event_id")
    events = [decode(body.encode(), zones.load("UTC")) for (body,) in bodies]  # the label decides, whatever the zone
    assert all("business_day" in json.loads(body)["purchase"] for (body,) in bodies)
    async with (
        pool(analytics_url, "analytics_consumer") as opened,
        opened.connection() as connection,
        connection.pipeline(),
        connection.transaction(),
    ):
        await apply(connection, events, [])
    query(analytics_url, "UPDATE freshness SET complete_through_at = clock_timestamp()")


async def check_answers(url: str, zone: str, sales: Sequence[Sale]) -> None:
    config = AnalyticsSettings(url, business_time_zone=zone, listen=free_address(), metrics_listen="127.0.0.1:0")
    async with running(lambda stop: serve(config, stop), config.listen) as channel:
        owner: Any = AnalyticsServiceStub(channel)
        rows = await listed(owner.ListDailySales, analytics_service_pb2.ListDailySalesRequest(), "daily_sales")
        assert {
            (wire_day(row.sales_date), row.branch_id): (
                row.purchase_count, row.purchase_with_customer_count, cents(row.revenue.value)
            )
            for row in rows
        } == sums(sales)  # fmt: skip


async def check_proofs(url: str, source: Source, sales: Sequence[Sale], rebuilt: int | None = None) -> None:
    async with pool(url, "analytics_consumer", size=3) as opened:
        for first, last in windows(sales):
            compared = await audit.compare(opened, source, first, last, wait_s=0)
            assert compared.verdict is Verdict.AGREED, compared.rows
            for day in each_day(first, last):
                proven = (await prove_day(opened, source, day)).comparison
                assert (proven.verdict, proven.findings, proven.foreign_ids) == (Verdict.AGREED, [], [])
        for day, _ in Counter(each.day for each in sales).most_common(rebuilt):
            done = await rebuild.rebuild_day(url, source, day)
            assert (done.repaired.total(), done.added, len(done.foreign)) == (0, 0, 0)
