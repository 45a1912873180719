"""What happens when the database does not keep up: limits, deadlines, and who is still answered."""

import asyncio
import functools
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
import psycopg
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import purchases_svc.__main__ as purchases
from chassis import grpc_server
from purchases_svc.sale import ITEMS_MAX
from purchases_svc.settings import ServeSettings
from retail.purchases.v1.purchases_service_pb2 import CreatePurchaseRequest, GetPurchaseRequest
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.conftest import eventually
from tests.integration.conftest import free_address, is_serving, running
from tests.integration.outbox_events import write
from tests.integration.purchases.test_create_purchase import assert_whole
from tests.integration.purchases.test_upload_purchases import message, upload
from tests.integration.sales import Refusal, refusal, sale

WAITING_MAX = 20
BATCH_MAX = 5
CALLS = 100
STUCK_S = 30.0  # how long a flush that cannot write would go on, and patient callers wait


@asynccontextmanager
async def service(url: str, **settings: Any) -> AsyncIterator[grpc.aio.Channel]:
    config = ServeSettings(
        url, backlog_months=0, **{"listen": free_address(), "metrics_listen": "127.0.0.1:0", **settings}
    )
    async with running(lambda stop: purchases.serve(config, stop), config.listen) as channel:
        tills: Any = PurchasesServiceStub(channel)
        first = sale()

        async def stored() -> bool:
            return await outcome(tills.CreatePurchase(first)) is None

        await eventually(stored, "a sale is stored")  # its partitions are there from now on
        yield channel


@contextmanager
def locked(url: str, table: str) -> Iterator[None]:
    """While the block runs, nobody gets at the table."""
    with psycopg.connect(url) as connection:
        connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        yield


async def is_stuck(url: str, statement: str) -> bool:
    """Whether somebody waits for a lock with a statement in which that occurs."""
    with psycopg.connect(url) as connection:
        found = connection.execute(
            "SELECT FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock' AND strpos(query, %s) > 0",
            [statement],
        )
        return bool(found.fetchall())


async def outcome(call: Any) -> Refusal | None:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return Refusal(error)
    return None


async def reflected(channel: grpc.aio.Channel) -> int:
    """How many services the server says that it has."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    return sum([len(reply.list_services_response.service) async for reply in stub.ServerReflectionInfo(requests)])


async def test_too_many_sales_are_refused_and_health_answers(purchases_db: str) -> None:
    """While writing is stuck, some sales wait, the rest is told when to come again, and all else goes on."""
    async with service(purchases_db, waiting_max=WAITING_MAX, batch_max=BATCH_MAX, flush_timeout_s=STUCK_S) as channel:
        tills: Any = PurchasesServiceStub(channel)
        with locked(purchases_db, "idempotency_keys"):
            calls = [
                asyncio.ensure_future(outcome(tills.CreatePurchase(sale(), timeout=STUCK_S))) for _ in range(CALLS)
            ]

            async def all_others_are_refused() -> bool:
                return sum(call.done() for call in calls) >= CALLS - WAITING_MAX - BATCH_MAX

            await eventually(all_others_are_refused, "all but those that wait and those on their way are refused")
            results = await upload(tills, [message(0, [sale() for _ in range(30)])])  # more than may wait
            assert {result.error.message.split()[-1] for result in results.values()} == {"later"}
            started = time.monotonic()
            assert await is_serving(channel)
            assert await reflected(channel) == 5
            missing = await refusal(
                tills.GetPurchase(GetPurchaseRequest(purchase_id=str(uuid.uuid4())), timeout=STUCK_S)
            )
            assert missing.reason == "PURCHASE_NOT_FOUND"
            assert time.monotonic() - started < STUCK_S / 2
        refused = [each for each in await asyncio.gather(*calls) if each]
        assert CALLS - WAITING_MAX - BATCH_MAX <= len(refused) <= CALLS - WAITING_MAX
        for each in refused:
            assert (each.code, each.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
            assert each.retry.retry_delay.ToMilliseconds() > 0
        assert_whole(purchases_db, 1 + CALLS - len(refused))


async def test_items_that_wait_are_limited_too(purchases_db: str) -> None:
    """The biggest sales fill the memory long before their number says anything; small ones still fit in between."""
    prices = ("1.00",) * ITEMS_MAX
    async with service(purchases_db, waiting_items_max=5 * ITEMS_MAX + 10, flush_timeout_s=STUCK_S) as channel:
        tills: Any = PurchasesServiceStub(channel)
        with locked(purchases_db, "idempotency_keys"):
            calls = [
                asyncio.ensure_future(outcome(tills.CreatePurchase(sale(prices), timeout=STUCK_S))) for _ in range(20)
            ]

            async def all_others_are_refused() -> bool:
                return sum(call.done() for call in calls) >= 20 - 5 - 2  # two are on their way to the database

            await eventually(all_others_are_refused, "all but those that wait and those on their way are refused")
            small = asyncio.ensure_future(outcome(tills.CreatePurchase(sale(), timeout=STUCK_S)))
        refused = [each for each in await asyncio.gather(*calls) if each]
        assert 20 - 5 - 2 <= len(refused) <= 20 - 5
        for each in refused:
            assert (each.code, each.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
            assert each.retry.retry_delay.ToMilliseconds() > 0
        assert await small is None
        again = await asyncio.gather(*(outcome(tills.CreatePurchase(sale(prices), timeout=STUCK_S)) for _ in range(4)))
        assert again == [None] * 4  # what was stored makes room
        assert_whole(purchases_db, 1 + 20 - len(refused) + 1 + 4)


async def test_wrong_clocks_leave_others_alone(purchases_db: str) -> None:
    """Sales out of time, whose keys are looked up, do not take the connection that stores everybody's sales."""
    async with service(purchases_db) as channel:
        tills: Any = PurchasesServiceStub(channel)
        with locked(purchases_db, "idempotency_keys"):
            calls = [tills.CreatePurchase(sale(seconds=0), timeout=30) for _ in range(20)]
            early = [asyncio.ensure_future(outcome(call)) for call in calls]
            await eventually(lambda: is_stuck(purchases_db, "WHERE idempotency_key = ANY"), "keys are looked up")
            good = asyncio.ensure_future(outcome(tills.CreatePurchase(sale(), timeout=30)))
            await eventually(lambda: is_stuck(purchases_db, "WITH input AS"), "the sale is on its way")
        assert await good is None
        refused = {each.reason for each in await asyncio.gather(*early) if each}
        assert refused <= {"PURCHASE_TIME_OUT_OF_RANGE", "TRANSACTION_CONFLICT"}  # the latter: looked up under the lock
    assert_whole(purchases_db, 2)


async def test_backlog_is_seen_while_readers_hold_all_connections(purchases_db: str) -> None:
    """Readers that wait for the database do not keep the outbox from being full."""
    async with service(purchases_db, outbox_max=3, read_connections=1) as channel:
        tills: Any = PurchasesServiceStub(channel)
        with locked(purchases_db, "purchases"):
            request = GetPurchaseRequest(purchase_id=str(uuid.uuid4()))
            reader = asyncio.ensure_future(tills.GetPurchase(request))
            await eventually(lambda: is_stuck(purchases_db, "FROM purchases"), "a reader holds the only connection")
            write(purchases_db, 5)

            async def full() -> bool:
                try:
                    await tills.CreatePurchase(sale(), timeout=2)
                except grpc.aio.AioRpcError as error:
                    return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                return False

            await eventually(full, "the outbox is full")
            assert not reader.done()  # it has the connection still
            reader.cancel()


async def test_end_does_not_wait_for_retention(purchases_db: str) -> None:
    """Told to stop while retention is at its work, which may take minutes, a service stops within its bound."""
    async with service(purchases_db):
        pass  # the partitions are there
    config = ServeSettings(purchases_db, listen=free_address(), metrics_listen="127.0.0.1:0")
    with psycopg.connect(purchases_db) as connection:
        connection.execute("UPDATE chain_settings SET keep_months = 3")
    with locked(purchases_db, "outbox_events"):
        async with running(lambda stop: purchases.serve(config, stop), config.listen):
            await eventually(lambda: is_stuck(purchases_db, "purchases_months()"), "retention looks at the months")


async def test_flush_has_a_time_of_its_own(purchases_db: str) -> None:
    """A flush that is stuck ends by its own timeout, however patient its callers are; a retry finds everything well."""
    request = sale()
    async with service(purchases_db, flush_timeout_s=1.0) as channel:
        tills: Any = PurchasesServiceStub(channel)
        with locked(purchases_db, "idempotency_keys"):
            refused = await refusal(tills.CreatePurchase(request, timeout=STUCK_S))
        assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "TRANSACTION_CONFLICT")
        assert not (await tills.CreatePurchase(request, timeout=STUCK_S)).replayed
    assert_whole(purchases_db, 2)


async def test_callers_deadline_does_not_end_the_flush(purchases_db: str) -> None:
    """Who waits no longer leaves the flush alone: the sale is stored, for him and for his patient neighbour."""
    impatient, patient = sale(), sale()
    async with service(purchases_db) as channel:
        tills: Any = PurchasesServiceStub(channel)
        with locked(purchases_db, "idempotency_keys"):
            calls = [
                asyncio.ensure_future(_code(tills, impatient, 0.4)),
                asyncio.ensure_future(_code(tills, patient, STUCK_S)),
            ]
            assert await calls[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await calls[1] is grpc.StatusCode.OK
        assert (await tills.CreatePurchase(impatient)).purchase.purchase_id
    assert_whole(purchases_db, 3)


async def _code(tills: Any, request: CreatePurchaseRequest, timeout_s: float) -> grpc.StatusCode:
    try:
        await tills.CreatePurchase(request, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_call_without_a_deadline_gets_one(purchases_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's cap ends calls of clients that would wait for ever, for an hour, or for just longer than the cap."""
    monkeypatch.setattr(grpc_server, "Service", functools.partial(grpc_server.Service, timeout_s=1.0))
    async with service(purchases_db, flush_timeout_s=STUCK_S) as channel:
        tills: Any = PurchasesServiceStub(channel)
        with locked(purchases_db, "idempotency_keys"):
            for timeout_s in (None, 3_600, STUCK_S):
                refused = await asyncio.wait_for(refusal(tills.CreatePurchase(sale(), timeout=timeout_s)), STUCK_S / 2)
                assert (refused.code, refused.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
                assert refused.status.message == "the call took longer than the server allows"  # not: the flush


async def test_reads_end_with_their_callers(purchases_db: str) -> None:
    """A query ends in PostgreSQL when its caller's deadline passes: it is given to it as statement_timeout."""
    async with service(purchases_db) as channel:
        tills: Any = PurchasesServiceStub(channel)
        purchase_id = (await tills.CreatePurchase(sale())).purchase.purchase_id

        async def nobody_waits() -> bool:
            with psycopg.connect(purchases_db) as connection:
                row = connection.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                    " AND application_name = 'purchases read' AND wait_event_type = 'Lock'"
                ).fetchone()
            return row == (0,)

        with locked(purchases_db, "purchases"):
            with pytest.raises(grpc.aio.AioRpcError):
                await tills.GetPurchase(GetPurchaseRequest(purchase_id=purchase_id), timeout=0.5)
            await eventually(nobody_waits, "the query is ended", within_s=STUCK_S / 2)
        assert (await tills.GetPurchase(GetPurchaseRequest(purchase_id=purchase_id))).purchase
