"""Reading purchases, customers and control totals back."""

import asyncio
import datetime
import itertools
import random
import uuid
from collections import defaultdict
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import grpc
import psycopg
import pytest
from google.protobuf import timestamp_pb2
from google.type import date_pb2

import purchases_svc.__main__ as purchases
from chassis import grpc_guard
from chassis.errors import PortTaken
from chassis.migrate import MigrationError
from purchases_svc.settings import MigrateSettings, ServeSettings
from retail.purchases.v1 import customers_service_pb2 as customers
from retail.purchases.v1 import purchases_service_pb2 as messages
from retail.purchases.v1.customers_service_pb2_grpc import CustomersServiceStub
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.conftest import eventually
from tests.integration.conftest import free_address, running
from tests.integration.sales import NOON, refusal, sale

DAY_S = 86_400
# A connection of its own, whose buffers do not grow.
SMALL_BUFFERS = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
EXPORTS_MAX = 4  # the default of PURCHASES_EXPORT_CONNECTIONS


@pytest.fixture
def tills(purchases_channel: grpc.aio.Channel) -> Any:
    return PurchasesServiceStub(purchases_channel)


def date(text: str) -> date_pb2.Date:
    day = datetime.date.fromisoformat(text)
    return date_pb2.Date(year=day.year, month=day.month, day=day.day)


async def pages(method: Any, request: Any, field: str) -> list[Any]:
    """All rows of a listing."""
    rows: list[Any] = []
    for _ in range(1_000):
        reply = await method(request)
        rows += getattr(reply, field)
        if not reply.next_page_token:
            return rows
        request.page_token = reply.next_page_token
    raise AssertionError("the listing does not end")


async def test_list_purchases_is_complete_and_ordered(tills: Any) -> None:
    """Every purchase once, the latest first, over months, equal times and any page size; filters hold."""
    chance = random.Random(5)
    customer = str(uuid.uuid4())
    sent = []
    for n in range(45):
        request = sale(
            ("1.00",),
            seconds=NOON - chance.choice([0, 1, 40 * DAY_S, 80 * DAY_S]),
            branch_id=chance.choice([1, 2]),
        )
        if n % 3 == 0:
            request.purchase.customer_id, request.register_customer = customer, True
        sent.append((await tills.CreatePurchase(request)).purchase)
    newest_first = sorted(sent, key=lambda p: (p.purchase_time.seconds, p.purchase_id), reverse=True)
    for size in (1, 7, 500):
        assert await pages(tills.ListPurchases, messages.ListPurchasesRequest(page_size=size), "purchases") == (
            newest_first
        )
    some = messages.ListPurchasesRequest(page_size=2, branch_id=2, customer_id=customer.upper())
    some.start_time.seconds, some.end_time.seconds = NOON - 80 * DAY_S, NOON
    assert await pages(tills.ListPurchases, some, "purchases") == [
        p
        for p in newest_first
        if p.branch_id == 2 and p.customer_id == customer and NOON - 80 * DAY_S <= p.purchase_time.seconds < NOON
    ]


async def test_pages_stay_correct_while_purchases_arrive(tills: Any) -> None:
    """What arrives during the paging neither repeats nor hides what was there."""
    before = [(await tills.CreatePurchase(sale(seconds=NOON + n))).purchase.purchase_id for n in range(10)]
    request, seen = messages.ListPurchasesRequest(page_size=3), []
    for n in itertools.count():
        reply = await tills.ListPurchases(request)
        seen += [p.purchase_id for p in reply.purchases]
        if not reply.next_page_token:
            break
        request.page_token = reply.next_page_token
        await tills.CreatePurchase(sale(seconds=NOON + 100 + n))  # newer than everything
        await tills.CreatePurchase(sale(seconds=NOON + 5))  # in the middle
    assert len(seen) == len(set(seen))
    assert set(before) <= set(seen)


async def test_page_tokens_are_bound_and_signed(tills: Any) -> None:
    """A token that was changed, or is used with other filters or another method, is refused."""
    for _ in range(3):
        await tills.CreatePurchase(sale())
    token = (await tills.ListPurchases(messages.ListPurchasesRequest(page_size=1))).next_page_token
    flipped = ("B" if token[0] != "B" else "C") + token[1:]
    tail = token[:-1] + ("A" if token[-1] != "A" else "E")
    for wrong in (
        messages.ListPurchasesRequest(page_token=flipped),
        messages.ListPurchasesRequest(page_token=tail),
        messages.ListPurchasesRequest(page_token=token, branch_id=1),
        messages.ListPurchasesRequest(page_token="x"),
        messages.ListPurchasesRequest(page_token="ü"),
    ):
        refused = await refusal(tills.ListPurchases(wrong))
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TOKEN")
    assert (await tills.ListPurchases(messages.ListPurchasesRequest(page_token=token, page_size=7))).purchases


async def test_missing_purchases(tills: Any) -> None:
    """Unknown ids of any kind are NOT_FOUND, texts that are no ids are refused."""
    for unknown in (str(uuid.uuid4()), str(uuid.UUID(int=0)), "f" * 8 + "-ffff-7fff-bfff-" + "f" * 12):
        refused = await refusal(tills.GetPurchase(messages.GetPurchaseRequest(purchase_id=unknown)))
        assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "PURCHASE_NOT_FOUND")
    for broken in ("", "x", uuid.uuid4().hex, "{" + str(uuid.uuid4()) + "}", str(uuid.uuid4()) + "\n"):
        refused = await refusal(tills.GetPurchase(messages.GetPurchaseRequest(purchase_id=broken)))
        assert refused.fields == ["purchase_id"]


async def test_bad_listings_name_every_violation(tills: Any) -> None:
    """All wrong filters are named at once."""
    request = messages.ListPurchasesRequest(page_size=-1, branch_id=0, customer_id="x")
    request.start_time.nanos = -1
    refused = await refusal(tills.ListPurchases(request))
    assert refused.fields == ["page_size", "branch_id", "customer_id", "start_time"]
    totals = messages.ListControlTotalsRequest(page_size=-1, last_date=date_pb2.Date(year=2026, month=2, day=30))
    totals.end_time.nanos = -1
    refused = await refusal(tills.ListControlTotals(totals))
    assert refused.fields == ["page_size", "first_date", "last_date", "end_time"]
    for first, last in (("2026-01-01", "2026-02-01"), ("2026-01-02", "2026-01-01")):
        totals = messages.ListControlTotalsRequest(first_date=date(first), last_date=date(last))
        assert (await refusal(tills.ListControlTotals(totals))).fields == ["last_date"]


async def test_control_totals_equal_what_was_sold(purchases_db: str) -> None:
    """Sums per business day and branch agree with an independent count, in a zone with a clock change, page by page."""
    zone = "Europe/Berlin"  # its clocks change on 2026-03-29
    with psycopg.connect(purchases_db) as connection:
        connection.execute("UPDATE chain_settings SET time_zone = %s", [zone])
    config = ServeSettings(purchases_db, zone, listen=free_address(), metrics_listen="127.0.0.1:0", backlog_months=0)
    async with running(lambda stop: purchases.serve(config, stop), config.listen) as channel:
        tills: Any = PurchasesServiceStub(channel)
        chance = random.Random(9)
        expected: defaultdict[tuple[str, int], list[Any]] = defaultdict(lambda: [0, 0, 0, Decimal(0)])
        sold: list[tuple[int, Decimal]] = []  # when, and the total
        start = int(datetime.datetime(2026, 3, 28, 21, tzinfo=datetime.UTC).timestamp())
        for _ in range(80):
            prices = tuple(f"{chance.randrange(10_000) / 100:.2f}" for _ in range(chance.randint(1, 4)))
            request = sale(prices, seconds=start + chance.randrange(0, 52 * 3_600, 900), branch_id=chance.randint(1, 3))
            if chance.random() < 0.5:
                request.purchase.customer_id, request.register_customer = str(uuid.uuid4()), True
            await tills.CreatePurchase(request)
            moment = datetime.datetime.fromtimestamp(request.purchase.purchase_time.seconds, ZoneInfo(zone))
            row = expected[moment.date().isoformat(), request.purchase.branch_id]
            row[0] += 1
            row[1] += request.purchase.HasField("customer_id")
            row[2] += len(prices)
            row[3] += sum(map(Decimal, prices))
            sold.append((request.purchase.purchase_time.seconds, sum(map(Decimal, prices), Decimal(0))))

        def totals(**changes: Any) -> messages.ListControlTotalsRequest:
            known = {"first_date": date("2026-03-20"), "last_date": date("2026-04-05"), "page_size": 4}
            return messages.ListControlTotalsRequest(**{**known, **changes})

        rows = await pages(tills.ListControlTotals, totals(), "control_totals")
        assert [
            (
                (f"{r.sales_date.year}-{r.sales_date.month:02}-{r.sales_date.day:02}", r.branch_id),
                [r.purchase_count, r.purchase_with_customer_count, r.item_count, Decimal(r.revenue.value)],
            )
            for r in rows
        ] == sorted(expected.items())
        some = await pages(
            tills.ListControlTotals,
            totals(branch_ids=[2, 9], first_date=date("2026-03-29"), last_date=date("2026-03-29")),
            "control_totals",
        )
        assert [r.branch_id for r in some] == [2]
        for end, _ in (*sold[:5], max(sold), min(sold)):  # what a day had sold by then: not what was sold just then
            so_far = totals(page_size=500, end_time=timestamp_pb2.Timestamp(seconds=end))
            by_then = (await tills.ListControlTotals(so_far)).control_totals
            assert sum(row.purchase_count for row in by_then) == sum(at < end for at, _ in sold)
            assert sum(Decimal(row.revenue.value) for row in by_then) == sum(it for at, it in sold if at < end)
        reply = await tills.ListControlTotals(totals())
        days = sorted(day for day, _ in expected)
        assert reply.time_zone == zone
        assert (reply.earliest_sales_date, reply.latest_sales_date) == (date(days[0]), date(days[-1]))
        assert abs(reply.read_time.ToDatetime(datetime.UTC) - datetime.datetime.now(datetime.UTC)).total_seconds() < 60
        assert not reply.HasField("complete_from_date")
        with psycopg.connect(purchases_db) as connection:
            connection.execute("UPDATE chain_settings SET dropped_before = '2026-03-01'")
        # The first of March began an hour before its month did in UTC: that hour is gone.
        assert (await tills.ListControlTotals(totals())).complete_from_date == date("2026-03-02")


async def test_customers(purchases_channel: grpc.aio.Channel) -> None:
    """Customers are registered once, found again and listed by id."""
    desk: Any = CustomersServiceStub(purchases_channel)
    given = str(uuid.uuid4())
    first = (await desk.CreateCustomer(customers.CreateCustomerRequest(customer_id=given.upper()))).customer
    again = (await desk.CreateCustomer(customers.CreateCustomerRequest(customer_id=given))).customer
    assert first == again
    made = (await desk.CreateCustomer(customers.CreateCustomerRequest())).customer
    assert (await desk.GetCustomer(customers.GetCustomerRequest(customer_id=made.customer_id))).customer == made
    listed = await pages(desk.ListCustomers, customers.ListCustomersRequest(page_size=1), "customers")
    assert listed == sorted([first, made], key=lambda c: c.customer_id)
    for length in range(1, 37):
        request = customers.ListCustomersRequest(page_size=1, customer_id_prefix=given[:length].upper())
        found = await pages(desk.ListCustomers, request, "customers")
        assert found == [it for it in listed if it.customer_id.startswith(given[:length])]
    for broken in ("x", given + "0", given[:8] + "_", "%"):
        refused = await refusal(desk.ListCustomers(customers.ListCustomersRequest(customer_id_prefix=broken)))
        assert refused.fields == ["customer_id_prefix"]
    refused = await refusal(desk.GetCustomer(customers.GetCustomerRequest(customer_id=str(uuid.uuid4()))))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "CUSTOMER_NOT_FOUND")
    assert (await refusal(desk.CreateCustomer(customers.CreateCustomerRequest(customer_id="x")))).fields == [
        "customer_id"
    ]


async def test_export_streams_each_day(tills: Any) -> None:
    """Every purchase of the days asked for, once, as stored, with the id of its event; nothing of other days."""
    sent = [
        (await tills.CreatePurchase(sale(seconds=NOON + day * DAY_S + second))).purchase
        for day in range(4)
        for second in range(5)
    ]
    request = messages.ExportPurchasesRequest(first_date=date("2026-03-02"), last_date=date("2026-03-03"))
    exported = [reply async for reply in tills.ExportPurchases(request)]
    assert [reply.purchase for reply in exported] == sent[5:15]
    assert len({reply.event_id for reply in exported}) == 10
    everything = messages.ExportPurchasesRequest(first_date=date("0001-01-01"), last_date=date("9999-12-31"))
    assert len([reply async for reply in tills.ExportPurchases(everything)]) == 20


async def test_export_of_some_customers(tills: Any) -> None:
    """With customers, it is their purchases only; what is no id is named."""
    ann, bob, eve = (str(uuid.uuid4()) for _ in range(3))
    sent = [
        (await tills.CreatePurchase(sale(seconds=NOON + n, customer_id=who, register_customer=True))).purchase
        for n, who in enumerate([ann, bob, ann, eve])
    ]
    day = date("2026-03-01")
    request = messages.ExportPurchasesRequest(first_date=day, last_date=day, customer_ids=[ann.upper(), eve])
    exported = [reply.purchase async for reply in tills.ExportPurchases(request)]
    assert exported == [sent[0], sent[2], sent[3]]
    request.customer_ids.append("x")
    assert (await refusal(_first(tills.ExportPurchases(request)))).fields == ["customer_ids[2]"]


async def test_cancelled_exports_free_their_connections(tills: Any) -> None:
    """Readers that go away in the middle hold up nobody, however many there are."""
    big = tuple("1.00" for _ in range(200))
    stored = await asyncio.gather(*(tills.CreatePurchase(sale(big, seconds=NOON + n)) for n in range(300)))
    request = messages.ExportPurchasesRequest(first_date=date("2026-03-01"), last_date=date("2026-03-01"))
    for _ in range(3):
        exports = [tills.ExportPurchases(request) for _ in range(EXPORTS_MAX)]
        for export in exports:
            assert (await export.read()).event_id
        for export in exports:
            export.cancel()
    wanted = messages.GetPurchaseRequest(purchase_id=stored[0].purchase.purchase_id)
    assert (await tills.GetPurchase(wanted, timeout=4)).purchase == stored[0].purchase


async def test_taken_port_is_named(purchases_db: str) -> None:
    """A second start on the same port ends with the address, not with a traceback."""
    first, second = (
        ServeSettings(purchases_db, listen=address, metrics_listen="127.0.0.1:0", backlog_months=0)
        for address in [free_address()] * 2
    )
    async with running(lambda stop: purchases.serve(first, stop), first.listen):
        with pytest.raises(PortTaken, match=second.listen):
            await purchases.serve(second, asyncio.Event())


async def test_export_refuses_a_range_that_is_none(tills: Any) -> None:
    """Both dates are required, in their order."""
    assert (await refusal(_first(tills.ExportPurchases(messages.ExportPurchasesRequest())))).fields == [
        "first_date",
        "last_date",
    ]


async def _first(stream: Any) -> Any:
    async for reply in stream:
        return reply


async def test_another_time_zone_is_refused(purchases_db: str) -> None:
    """Neither the migration nor the service works on a database that was set up with another zone."""
    with pytest.raises(MigrationError, match="BUSINESS_TIME_ZONE is Asia/Tokyo"):
        purchases.migrate_database(MigrateSettings(purchases_db, "Asia/Tokyo"))
    config = ServeSettings(
        purchases_db, "Asia/Tokyo", listen=free_address(), metrics_listen="127.0.0.1:0", backlog_months=0
    )
    with pytest.raises(MigrationError, match="BUSINESS_TIME_ZONE is Asia/Tokyo"):
        async with running(lambda stop: purchases.serve(config, stop), config.listen):
            pass


async def test_reader_that_stops_reading_is_cut(purchases_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export whose reader takes nothing for long frees its place; the reader is told why when it reads on."""
    monkeypatch.setattr(grpc_guard, "READER_TIMEOUT_S", 0.5)
    config = ServeSettings(
        database_url=purchases_db, listen=free_address(), metrics_listen="127.0.0.1:0", backlog_months=0
    )
    request = messages.ExportPurchasesRequest(first_date=date("2026-03-01"), last_date=date("2026-03-01"))
    big = tuple("1.00" for _ in range(200))
    async with (
        running(lambda stop: purchases.serve(config, stop), config.listen) as channel,
        grpc.aio.insecure_channel(config.listen, options=SMALL_BUFFERS) as slow_channel,
    ):
        tills: Any = PurchasesServiceStub(channel)
        await asyncio.gather(*(tills.CreatePurchase(sale(big, seconds=NOON + n)) for n in range(100)))
        slow_tills: Any = PurchasesServiceStub(slow_channel)
        stuck = [slow_tills.ExportPurchases(request) for _ in range(EXPORTS_MAX)]
        for export in stuck:
            assert await export.read()

        async def rest(export: Any) -> None:
            while await export.read() is not grpc.aio.EOF:
                pass

        async def exported() -> int:
            try:
                return len([row async for row in tills.ExportPurchases(request)])
            except grpc.aio.AioRpcError:
                return 0

        async def all_places_are_free() -> bool:
            return await asyncio.gather(*(exported() for _ in stuck)) == [100] * len(stuck)

        await eventually(all_places_are_free, "all exports that nobody reads are cut")
        for export in stuck:
            with pytest.raises(grpc.aio.AioRpcError, match="nothing of the answer was read") as raised:
                await rest(export)
            assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
