"""CreatePurchase over real gRPC on a real database."""

import asyncio
import datetime
import json
import random
import time
import types
import uuid
from decimal import Decimal
from typing import Any

import grpc
import psycopg
import pytest

from chassis import zones
from chassis.postgres import Pool
from purchases_svc import months, record
from purchases_svc.backlog import Backlog
from purchases_svc.errors import ClocksDiffer, IdempotencyKeyReused, PurchaseTimeAhead
from purchases_svc.insert import insert
from purchases_svc.partitions import Partitions
from purchases_svc.record import Recorder
from purchases_svc.sale import EARLIEST, Item, Purchase, Sale
from retail.purchases.v1.purchases_service_pb2 import CreatePurchaseRequest, GetPurchaseRequest
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.conftest import eventually, pool
from tests.contract.test_contracts import event_validator
from tests.integration.purchase_events import query
from tests.integration.sales import NOON, copy, refusal, sale


@pytest.fixture
def tills(purchases_channel: grpc.aio.Channel) -> Any:
    return PurchasesServiceStub(purchases_channel)


def count(url: str, table: str) -> int:
    with psycopg.connect(url) as connection:
        row = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
        assert row
        return int(row[0])


def assert_whole(url: str, purchases: int) -> None:
    """There are that many purchases, and nothing is there without its purchase, nor a purchase without its parts."""
    for table in ("purchases", "idempotency_keys", "receipts", "outbox_events"):
        assert count(url, table) == purchases, table
    with psycopg.connect(url) as connection:
        row = connection.execute(
            """
            SELECT count(*) FROM purchases p
            JOIN idempotency_keys k USING (idempotency_key, purchase_id, purchase_time, event_id)
            JOIN receipts r USING (branch_id, pos_id, receipt_id, purchase_id, purchase_time)
            JOIN outbox_events e ON e.event_id = p.event_id AND e.aggregate_id = p.purchase_id
            WHERE p.item_count = (SELECT count(*) FROM purchase_items i WHERE i.purchase_id = p.purchase_id)
              AND p.total_amount = (SELECT sum(line_total) FROM purchase_items i WHERE i.purchase_id = p.purchase_id)
            """
        ).fetchone()
    assert row == (purchases,)


async def test_answer_is_what_is_stored(tills: Any, purchases_db: str) -> None:
    """The answer, what is read back, and a replay are the same purchase; the token is the event that is sent for it."""
    request = sale(total="133.60")
    first = await tills.CreatePurchase(request)
    assert not first.replayed
    assert first.purchase.total_amount.value == "133.60"
    assert [i.line_total.value for i in first.purchase.items] == ["8.90", "124.70"]
    read = await tills.GetPurchase(GetPurchaseRequest(purchase_id=first.purchase.purchase_id.upper()))
    assert read.purchase == first.purchase
    again = await tills.CreatePurchase(request)
    assert again.replayed
    assert again.purchase == first.purchase
    ((event_id,),) = query(purchases_db, "SELECT event_id::text FROM outbox_events")
    assert again.consistency_token == first.consistency_token == event_id


@pytest.mark.parametrize("variant", ["price", "key", "order", "total", "line", "register", "customer", "nanos"])
async def test_same_content_in_other_words_is_replayed(tills: Any, purchases_db: str, variant: str) -> None:
    """Values are compared, not texts."""
    customer = "4f7c2d1e-9b3a-4c58-8e6f-0a1b2c3d4e5f"
    request = sale(("8.9", "124.70"), customer_id=customer, register_customer=True)
    first = await tills.CreatePurchase(request)
    twin = copy(request)
    if variant == "price":
        twin.purchase.items[0].unit_price.value = "008.90"
    elif variant == "key":
        twin.idempotency_key = request.idempotency_key.upper()
    elif variant == "order":
        items = list(reversed(request.purchase.items))
        del twin.purchase.items[:]
        twin.purchase.items.extend(items)
    elif variant == "total":
        twin.purchase.total_amount.value = "133.6"
    elif variant == "line":
        twin.purchase.items[1].line_total.value = "124.7"
    elif variant == "register":
        twin.register_customer = False
    elif variant == "customer":
        twin.purchase.customer_id = customer.upper()
    elif variant == "nanos":
        twin.purchase.purchase_time.nanos = 999
    again = await tills.CreatePurchase(twin)
    assert (again.replayed, again.purchase) == (True, first.purchase)
    assert_whole(purchases_db, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"receipt_id": "other"},
        {"branch_id": 2},
        {"cashier_id": 18},
        {"pos_id": "POS-4"},
        {"seconds": NOON + 1},
        {"customer_id": "4f7c2d1e-9b3a-4c58-8e6f-0a1b2c3d4e5f"},
    ],
)
async def test_same_key_with_other_content_is_refused(tills: Any, purchases_db: str, change: dict[str, Any]) -> None:
    """The refusal names the purchase that holds the key, to its own branch; and nothing changes."""
    request = sale()
    first = await tills.CreatePurchase(request)
    refused = await refusal(tills.CreatePurchase(sale(idempotency_key=request.idempotency_key, **change)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "IDEMPOTENCY_KEY_REUSED")
    told = first.purchase.purchase_id in str(refused.status)
    assert told == ("branch_id" not in change)
    assert_whole(purchases_db, 1)


async def test_receipt_number_is_taken_once(tills: Any, purchases_db: str) -> None:
    """A refused sale leaves nothing behind: neither key nor customer, and its retry is refused again."""
    first = await tills.CreatePurchase(sale(receipt_id="R-1"))
    twin = sale(receipt_id="R-1", customer_id=str(uuid.uuid4()), register_customer=True)
    for _ in range(2):
        refused = await refusal(tills.CreatePurchase(twin))
        assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "RECEIPT_EXISTS")
        assert refused.info.metadata["purchase_id"] == first.purchase.purchase_id
    assert_whole(purchases_db, 1)
    assert count(purchases_db, "customers") == 0
    await tills.CreatePurchase(sale(receipt_id="R-1", seconds=NOON + 86_400))  # another business day
    await tills.CreatePurchase(sale(receipt_id="R-1", pos_id="POS-4"))
    await tills.CreatePurchase(sale(receipt_id="R-1", branch_id=2))
    assert_whole(purchases_db, 4)


async def test_receipt_number_claimed_twice_at_once(tills: Any, purchases_db: str) -> None:
    """Of sales that claim one receipt number in the same batch one gets it; their neighbours are not affected."""
    rivals = [sale(receipt_id="R-1") for _ in range(5)]
    others = [sale() for _ in range(20)]
    outcomes = await asyncio.gather(*map(tills.CreatePurchase, [*rivals, *others]), return_exceptions=True)
    assert sum(not isinstance(o, BaseException) for o in outcomes[:5]) == 1
    assert all(not isinstance(o, BaseException) for o in outcomes[5:])
    assert_whole(purchases_db, 21)


async def test_one_key_at_once_from_everywhere(tills: Any, purchases_db: str) -> None:
    """Fifty calls with one key in flight together: one purchase, everybody gets it."""
    request = sale()
    replies = await asyncio.gather(*(tills.CreatePurchase(request) for _ in range(50)))
    assert len({r.purchase.purchase_id for r in replies}) == 1
    assert sum(not r.replayed for r in replies) == 1
    assert_whole(purchases_db, 1)


async def test_every_violation_is_named(tills: Any, purchases_db: str) -> None:
    """All that is wrong with a sale is said at once, with the field's path."""
    request = sale(("1.00", "2.00", "3.00"), idempotency_key="x", branch_id=0, cashier_id=-1, pos_id="", total="1e3")
    request.purchase.receipt_id = "a\0b"
    request.purchase.customer_id = "{4f7c2d1e-9b3a-4c58-8e6f-0a1b2c3d4e5f}"
    request.purchase.purchase_time.nanos = -1
    request.purchase.items[0].unit_price.value = "1.001"
    request.purchase.items[1].quantity = 2
    request.purchase.items[1].line_total.value = "4.00"
    request.purchase.items[2].product_id = request.purchase.items[1].product_id
    refused = await refusal(tills.CreatePurchase(request))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PURCHASE")
    assert sorted(refused.fields) == sorted(
        [
            "idempotency_key",
            "purchase.receipt_id",
            "purchase.branch_id",
            "purchase.cashier_id",
            "purchase.pos_id",
            "purchase.customer_id",
            "purchase.purchase_time",
            "purchase.total_amount",
            "purchase.items[0].unit_price",
            "purchase.items[1].quantity",
            "purchase.items[1].line_total",
            "purchase.items[2].product_id",
        ]
    )
    assert_whole(purchases_db, 0)


async def test_total_must_add_up(tills: Any) -> None:
    """A total that is not the sum of the items is refused, to the cent."""
    refused = await refusal(tills.CreatePurchase(sale(("8.90", "124.70"), total="133.61")))
    assert refused.fields == ["purchase.total_amount"]


async def test_2000_wrong_items_still_get_a_readable_answer(tills: Any) -> None:
    """However much is wrong, the answer fits into what clients accept."""
    refused = await refusal(tills.CreatePurchase(sale(("x",) * 2_000)))
    assert refused.code == grpc.StatusCode.INVALID_ARGUMENT
    assert refused.fields[0] == "purchase.items[0].unit_price"


async def test_customers_are_registered_or_refused(tills: Any, purchases_db: str) -> None:
    """An unknown customer is refused, unless the till registers it with the sale."""
    customer = str(uuid.uuid4())
    refused = await refusal(tills.CreatePurchase(sale(customer_id=customer)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CUSTOMER_NOT_FOUND")
    assert_whole(purchases_db, 0)
    await tills.CreatePurchase(sale(customer_id=customer, register_customer=True))
    await tills.CreatePurchase(sale(customer_id=customer))
    await tills.CreatePurchase(sale(customer_id=customer, register_customer=True))
    assert_whole(purchases_db, 3)
    assert count(purchases_db, "customers") == 1


@pytest.mark.parametrize("seconds", [946_684_799, -62_135_596_800])
async def test_times_out_of_range(tills: Any, seconds: int) -> None:
    """A sale before 2000 is refused, down to the edge of what a timestamp can say."""
    refused = await refusal(tills.CreatePurchase(sale(seconds=seconds)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.OUT_OF_RANGE, "PURCHASE_TIME_OUT_OF_RANGE")


@pytest.mark.parametrize(("ahead_s", "retry_s"), [(310, 11), (7_200, 60), (10**10, 60)])
async def test_a_time_to_come_is_put_off(tills: Any, ahead_s: int, retry_s: int, purchases_db: str) -> None:
    """It is no refusal: the till is told by how much its clock is ahead, and when to send the sale again."""
    before = time.time()
    early = sale(seconds=int(before) + ahead_s)
    refused = await refusal(tills.CreatePurchase(early))
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "PURCHASE_TIME_AHEAD")
    passed_s = time.time() - before
    assert ahead_s - passed_s - 1 <= float(refused.info.metadata["ahead_seconds"]) <= ahead_s
    assert 0 < refused.retry.retry_delay.seconds <= retry_s
    assert_whole(purchases_db, 0)


async def test_a_sale_that_was_put_off_is_stored_when_its_time_has_come(tills: Any, purchases_db: str) -> None:
    """The very same sale, sent again."""
    early = sale(seconds=int(time.time()) + 305)

    async def stored() -> bool:
        call = tills.CreatePurchase(early)
        code = await call.code()
        assert code in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
        return bool(code is grpc.StatusCode.OK)

    assert not await stored()
    await eventually(stored, "the sale is stored")
    assert_whole(purchases_db, 1)


async def test_no_sale_is_refused_for_good_by_a_clock_that_is_wrong(
    purchases_db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that is years ahead of its database would take good sales for too old, or find no partition."""

    class Ahead(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Ahead":
            moment = datetime.datetime.now(tz) + datetime.timedelta(days=1_000)
            return cls.combine(moment.date(), moment.timetz())

    now = datetime.datetime.now(datetime.UTC)
    for module in (record, months):
        monkeypatch.setattr(module, "datetime", types.SimpleNamespace(**vars(datetime) | {"datetime": Ahead}))
    async with pool(purchases_db, "purchases_service") as opened:
        recorder = make_recorder(opened, Partitions(opened), batch_max=10, retention_months=lambda: 12)
        for days in (0, 300):  # with such a clock, the older one is past its retention
            with pytest.raises(ClocksDiffer):
                await recorder.record(stored_sale(purchase_time=now - datetime.timedelta(days=days)))


@pytest.mark.parametrize("raw", [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x12\x02\x12\x05", b"\x0a\x02\xc3\x28"])
async def test_bytes_that_are_no_message(purchases_channel: grpc.aio.Channel, raw: bytes) -> None:
    """Garbage is refused as such."""
    call: Any = purchases_channel.unary_unary("/retail.purchases.v1.PurchasesService/CreatePurchase")
    refused = await refusal(call(raw))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")


async def test_outbox_holds_the_event_of_the_contract(tills: Any, purchases_db: str) -> None:
    """The event was committed with the purchase and says exactly the same."""
    reply = await tills.CreatePurchase(sale(("8.9", "124.70")))
    with psycopg.connect(purchases_db) as connection:
        row = connection.execute("SELECT event_id::text, payload_json::text FROM outbox_events").fetchone()
    assert row
    event = json.loads(row[1], parse_float=Decimal)
    event_validator().validate(event)
    assert event["event_id"] == row[0] == reply.consistency_token
    assert event["purchase"]["purchase_id"] == reply.purchase.purchase_id
    assert str(event["purchase"]["total_amount"]) == "133.60"


async def test_connection_lost_between_calls(tills: Any, purchases_db: str) -> None:
    """When the database ends our connections, the next sale is still taken."""
    await tills.CreatePurchase(sale())
    with psycopg.connect(purchases_db, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name LIKE 'purchases%' AND datname = current_database()"
        )
    await tills.CreatePurchase(sale())
    assert_whole(purchases_db, 2)


async def test_caller_that_gives_up_finds_its_sale(tills: Any, purchases_db: str) -> None:
    """Cancelled in flight, a sale is stored or not, and a retry with its key settles it."""
    requests = [sale() for _ in range(100)]
    calls = [tills.CreatePurchase(r) for r in requests]
    await asyncio.wait([asyncio.ensure_future(_answer(calls[-1]))], timeout=0.003)
    for call in calls:
        call.cancel()
    replies = await asyncio.gather(*map(tills.CreatePurchase, requests))
    assert len({r.purchase.purchase_id for r in replies}) == 100
    assert_whole(purchases_db, 100)


async def _answer(call: Any) -> None:
    try:
        await call
    except asyncio.CancelledError:
        if not call.cancelled():
            raise


def make_recorder(opened: Pool, partitions: Partitions, batch_max: int = 500, **more: Any) -> Recorder:
    backlog = more.pop("backlog", Backlog(opened, 0))
    limits = {"batch_max": batch_max, "waiting_max": 10_000, "waiting_items_max": 100_000, "flush_timeout_s": 10.0}
    return Recorder(opened, partitions, backlog, zone=zones.load("UTC"), **{**limits, **more})


def stored_sale(**changes: Any) -> Sale:
    """A sale past the checks of the API, which may break the database's own rules."""
    known = Sale(
        idempotency_key=str(uuid.uuid4()),
        receipt_id=uuid.uuid4().hex,
        branch_id=1,
        cashier_id=1,
        pos_id="POS-1",
        customer_id=None,
        purchase_time=EARLIEST.replace(year=2026),
        total_cents=100,
        items=(Item(1, 100),),
        register_customer=False,
    )
    return known._replace(**changes)


async def test_spoiled_sale_spares_its_neighbours(purchases_db: str) -> None:
    """Whatever one row breaks in the database, the others of its batch are stored."""
    async with pool(purchases_db, "purchases_service") as opened:
        recorder = make_recorder(opened, Partitions(opened))
        sales = [stored_sale() for _ in range(40)]
        sales[7], sales[23] = stored_sale(branch_id=-1), stored_sale(pos_id="\0")
        outcomes = await asyncio.gather(*map(recorder.record, sales), return_exceptions=True)
        assert [n for n, o in enumerate(outcomes) if isinstance(o, BaseException)] == [7, 23]
        await recorder.close()
    assert_whole(purchases_db, 38)


async def test_workers_with_the_same_sales_do_not_deadlock(purchases_db: str) -> None:
    """Three workers record the same sales in different orders: each sale once, and everybody is answered."""
    chance = random.Random(1)
    customers = [str(uuid.UUID(int=chance.getrandbits(128))) for _ in range(20)]
    sales = [stored_sale(customer_id=chance.choice(customers), register_customer=True) for _ in range(300)]
    async with pool(purchases_db, "purchases_service", size=6) as opened:
        workers = [make_recorder(opened, Partitions(opened), batch_max=40) for _ in range(3)]
        outcomes = await asyncio.gather(
            *(worker.record(s) for worker in workers for s in chance.sample(sales, len(sales)))
        )
    assert len({o.purchase.purchase_id for o in outcomes}) == 300
    assert sum(not o.replayed for o in outcomes) == 300
    assert_whole(purchases_db, 300)


async def test_known_key_is_answered_before_the_time_is_checked(purchases_db: str) -> None:
    """A sale that was in time when it was recorded is replayed even after the server's clock was set back."""
    future = EARLIEST.replace(year=2027, month=1)
    late = stored_sale(purchase_time=future)
    async with pool(purchases_db, "purchases_service") as opened:
        partitions = Partitions(opened)
        await partitions.ensure([future.date()], [EARLIEST.replace(year=2026).date()])
        created = EARLIEST.replace(year=2026)
        purchase = Purchase(record._id(future), record._id(created), created, future.date(), late)
        async with opened.connection() as connection:
            assert await insert(connection, [purchase]) == set()
        recorder = make_recorder(opened, partitions, batch_max=10)
        assert (await recorder.record(late)).purchase.purchase_id == purchase.purchase_id
        with pytest.raises(IdempotencyKeyReused):
            await recorder.record(late._replace(branch_id=2))
        with pytest.raises(PurchaseTimeAhead):
            await recorder.record(late._replace(idempotency_key=str(uuid.uuid4())))


async def test_partition_that_vanished_is_made_again(tills: Any, purchases_db: str) -> None:
    """A month that was dropped behind the service's back costs no sale."""
    await tills.CreatePurchase(sale())
    with psycopg.connect(purchases_db, autocommit=True) as connection:
        connection.execute("DROP TABLE purchase_items_2026_03, receipts_2026_03")
        connection.execute("ALTER TABLE purchases DETACH PARTITION purchases_2026_03")
        connection.execute("DROP TABLE purchases_2026_03")
        connection.execute("TRUNCATE idempotency_keys, outbox_events")
    await tills.CreatePurchase(sale())
    assert_whole(purchases_db, 1)


async def test_database_away_and_back(postgres_url: str, tills: Any, purchases_db: str) -> None:
    """Without the database sales get UNAVAILABLE with a pause to keep; when it is back, they are taken again."""
    name = purchases_db.rsplit("/", 1)[1]
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        refused = await refusal(tills.CreatePurchase(sale()))
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
        assert refused.retry.retry_delay.seconds == 1
        admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')

    async def taken() -> bool:
        try:
            return bool(await tills.CreatePurchase(sale()))
        except grpc.aio.AioRpcError:
            return False

    await eventually(taken, "sales are taken again")


async def test_request_without_a_purchase(tills: Any) -> None:
    """An empty request is refused with what it lacks."""
    refused = await refusal(tills.CreatePurchase(CreatePurchaseRequest()))
    assert refused.fields == ["idempotency_key", "purchase"]
