"""Behind a synchronous standby, whatever is acknowledged is on the standby: first answers, repeats, and refusals."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from zoneinfo import ZoneInfo

import grpc
import psycopg
import pytest
from pika.adapters.blocking_connection import BlockingChannel

import purchases_svc.__main__ as purchases
from analytics_svc.ingest.messages import Message
from analytics_svc.ingest.settling import Settler
from chassis import postgres
from purchases_svc.answers import Recorded
from purchases_svc.errors import CustomerUnknown
from purchases_svc.settings import ServeSettings
from relay_svc import committed
from relay_svc.publisher import Publisher
from relay_svc.relay import Relay
from retail.purchases.v1 import customers_service_pb2 as customers_pb
from retail.purchases.v1.customers_service_pb2_grpc import CustomersServiceStub
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.conftest import WAIT_S, eventually, pool
from tests.integration.conftest import free_address, running
from tests.integration.outbox_events import make_days, states, write
from tests.integration.purchase_events import query, sold
from tests.integration.purchases.test_flush_isolation import recording
from tests.integration.purchases.test_flush_isolation import sale as a_sale
from tests.integration.sales import Refusal, copy, refusal, sale
from tests.replication import Replicated

LONG_S = 2 * WAIT_S  # of calls that outlast what is done to the servers


@pytest.fixture
async def till(purchases_url: str) -> AsyncIterator[grpc.aio.Channel]:
    config = ServeSettings(
        purchases_url,
        listen=free_address(),
        metrics_listen="127.0.0.1:0",
        flush_timeout_s=4 * LONG_S,
        backlog_months=0,
    )
    async with running(lambda stop: purchases.serve(config, stop), config.listen) as channel:
        yield channel


async def waits(pair: Replicated, count: int = 1) -> None:
    """Until so many commits wait for the standby."""

    async def they_do() -> bool:
        return pair.waiting() >= count

    await eventually(they_do, f"{count} commits wait for the standby")


def held_keys(url: str) -> set[str]:
    return {key for (key,) in query(url, "SELECT idempotency_key::text FROM purchases")}


def call(stub: Any, request: Any) -> "asyncio.Task[Any]":
    async def answer() -> Any:
        try:
            return await stub.CreatePurchase(request, timeout=LONG_S)
        except grpc.aio.AioRpcError as error:
            return Refusal(error)

    return asyncio.create_task(answer())


async def test_restart_in_mid_wait(pair: Replicated, till: grpc.aio.Channel, purchases_url: str) -> None:
    """A fast restart ends the wait for the standby, and leaves the sale there for all to see. Neither its first
    caller, nor one who repeats it, nor one with its receipt number hears of it before the standby has it, too."""
    stub: Any = PurchasesServiceStub(till)  # type: ignore[arg-type, unused-ignore]
    await stub.CreatePurchase(sale(), timeout=LONG_S)
    pair.cut()
    request = sale()
    first = call(stub, request)
    await waits(pair)
    pair.restart()
    assert request.idempotency_key in held_keys(purchases_url)
    await waits(pair)  # the flush has found its own sale
    late = copy(request)
    late.purchase.purchase_time.seconds += 10**9  # out of range, so it is looked up apart
    others = [call(stub, copy(request)), call(stub, late)]
    await waits(pair, 2)
    others.append(call(stub, sale(receipt_id=request.purchase.receipt_id)))
    assert not any(task.done() for task in (first, *others))
    pair.mend()
    recorded = (await first).purchase
    replay, reused, taken = await asyncio.gather(*others)
    assert replay.replayed and replay.purchase == recorded
    assert (reused.reason, taken.reason) == ("IDEMPOTENCY_KEY_REUSED", "RECEIPT_EXISTS")
    pair.promote()
    assert request.idempotency_key in held_keys(pair.on_standby(purchases_url))


async def test_cancelled_wait(pair: Replicated, till: grpc.aio.Channel, purchases_url: str) -> None:
    """PostgreSQL calls it a success, and only warns. What was in doubt is found out, as durably as ever."""
    stub: Any = PurchasesServiceStub(till)  # type: ignore[arg-type, unused-ignore]
    await stub.CreatePurchase(sale(), timeout=LONG_S)
    pair.cut()
    request = sale()
    first = call(stub, request)
    for _ in range(2):  # the sale's own wait, then that of the look-up
        await waits(pair)
        assert pair.cancel_waits()
        assert request.idempotency_key in held_keys(purchases_url)
    await waits(pair)
    assert not first.done()
    pair.mend()
    assert (await first).purchase.receipt_id == request.purchase.receipt_id


async def test_no_acknowledged_sale_is_lost_in_a_failover(
    pair: Replicated, till: grpc.aio.Channel, purchases_url: str
) -> None:
    """Sales and repeats under a cut, a cancelled wait and a restart; then the primary dies, and the standby takes over.
    What it lacks, nobody was told to be stored."""
    stub: Any = PurchasesServiceStub(till)  # type: ignore[arg-type, unused-ignore]
    requests = [sale() for _ in range(60)]
    calls = [call(stub, request) for request in requests[:20]]
    await asyncio.gather(*calls)
    pair.cut()
    calls += [call(stub, request) for request in requests[20:40]]
    await waits(pair)
    pair.cancel_waits()
    calls += [call(stub, copy(request)) for request in requests[20:40]]
    await waits(pair)
    pair.restart()
    await waits(pair)
    calls += [call(stub, copy(request)) for request in requests[:40]]
    calls += [call(stub, request) for request in requests[40:]]
    await waits(pair)
    assert len(held_keys(purchases_url)) > 20
    pair.promote()
    answers = [answered for answered in await asyncio.gather(*calls) if not isinstance(answered, Refusal)]
    acknowledged = {answered.purchase.purchase_id for answered in answers}
    assert len(acknowledged) >= 20
    left = query(pair.on_standby(purchases_url), "SELECT purchase_id::text FROM purchases")
    assert acknowledged <= {purchase_id for (purchase_id,) in left}


async def test_repeat_that_registers(pair: Replicated, purchases_url: str) -> None:
    """A sale of an unknown customer, and the same one that registers them, while the first still waits: the refusal
    of the first is not the second's."""
    async with recording(purchases_url, flush_timeout_s=LONG_S) as recorder:
        customer_id = "7b0d3a52-56c4-4d0f-9d0e-3f1a2b4c5d6e"
        first = a_sale(customer_id=customer_id, register_customer=False)
        pair.cut()
        waiting = asyncio.create_task(recorder.record_all([a_sale(), first]))
        await waits(pair)
        repeat = asyncio.create_task(recorder.record(first._replace(register_customer=True)))
        await asyncio.sleep(0)  # it finds the first on its way
        pair.mend()
        recorded, refused = await waiting
        assert isinstance(recorded, Recorded) and isinstance(refused, CustomerUnknown)
        assert (await repeat).purchase.sale.customer_id == customer_id


async def test_known_customer(pair: Replicated, till: grpc.aio.Channel, purchases_url: str) -> None:
    """Registered, but not on the standby: whoever registers it again is not told before it is."""
    stub: Any = CustomersServiceStub(till)  # type: ignore[arg-type, unused-ignore]
    request = customers_pb.CreateCustomerRequest(customer_id="7b0d3a52-56c4-4d0f-9d0e-3f1a2b4c5d6e")
    pair.cut()
    first = asyncio.create_task(refusal(stub.CreateCustomer(request, timeout=LONG_S)))
    await waits(pair)
    pair.cancel_waits()
    assert (await first).code == grpc.StatusCode.UNAVAILABLE
    assert query(purchases_url, "SELECT count(*) FROM customers") == [(1,)]
    second = stub.CreateCustomer(request, timeout=LONG_S)
    await waits(pair)
    assert not second.done()
    pair.mend()
    assert (await second).customer.customer_id == request.customer_id


async def test_relay_publishes_what_will_last(
    pair: Replicated, purchases_url: str, amqp_url: str, channel: BlockingChannel
) -> None:
    """An event whose sale could still be lost is not published: the till would sell it again, as another event."""
    channel.queue_declare("purchases.created", durable=True, arguments={"x-queue-type": "quorum"})
    channel.queue_bind("purchases.created", "purchases", "purchases.created")
    make_days(purchases_url)
    pair.cut()
    writing = asyncio.create_task(asyncio.to_thread(write, purchases_url, 1))
    await waits(pair)
    pair.cancel_waits()
    (event_id,) = await writing
    publisher = Publisher(amqp_url, confirm_timeout_s=10)
    async with postgres.open_pool(
        purchases_url,
        role="purchases_relay",
        application_name="test",
        size=4,
        statement_timeout_s=30,
        settings={"synchronous_commit": "off"},  # as the relay has it: nothing else of it waits
    ) as opened:
        relay = Relay(opened, publisher, window=100, attempts_max=3, look_every_s=0.025)
        window = asyncio.create_task(relay.run_once(100))
        await waits(pair)
        assert channel.basic_get("purchases.created")[0] is None
        pair.mend()
        await window
        publisher.disconnect()
    assert states(purchases_url) == {event_id: ("SENT", 0)}


async def test_listing_that_is_not_remembered_is_not_given(pair: Replicated, purchases_url: str) -> None:
    async with pool(purchases_url, "purchases_relay") as opened, opened.connection() as connection:
        async with connection.transaction():
            position = await committed.position(connection)
        pair.cut()
        remembering = asyncio.create_task(committed.remember(connection, position))
        await waits(pair)
        pair.cancel_waits()
        with pytest.raises(psycopg.errors.TransactionResolutionUnknown):
            await remembering
        assert connection.closed


async def test_consumer_settles_what_will_last(pair: Replicated, analytics_url: str) -> None:
    """A batch is settled once the standby has it; also when it comes again, and all in it was counted before."""
    message = Message(sold("8.90").body(), {"message_id": "x", "headers": None})
    async with pool(analytics_url, "analytics_consumer") as opened:
        settler = Settler(opened, ZoneInfo("UTC"), 2)
        case = settler.read(message)
        pair.cut()
        first = asyncio.create_task(settler.settle([case]))
        await waits(pair)
        pair.cancel_waits()
        with pytest.raises(psycopg.errors.TransactionResolutionUnknown):
            await first
        logged = "SELECT count(*) FROM analytics_event_log"
        assert query(analytics_url, logged) + query(analytics_url, "SELECT count(*) FROM quarantined_events") in (
            [(1,), (0,)],
            [(0,), (1,)],
        )
        again = asyncio.create_task(settler.settle([case]))
        await waits(pair)
        assert not again.done()
        pair.mend()
        await again


async def test_cancelled_call_leaves_a_connection_that_works(pair: Replicated, purchases_url: str) -> None:
    """Who gives up cancels the wait, too. The pool's next user gets another connection, and hears nothing of it."""
    async with pool(purchases_url, "purchases_service", size=1) as opened:

        async def register() -> None:
            async with opened.connection() as connection:
                await connection.execute("INSERT INTO customers VALUES (gen_random_uuid())")

        pair.cut()
        waiting = asyncio.create_task(register())
        await waits(pair)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        pair.mend()
        async with opened.connection(WAIT_S) as connection:
            cursor = await connection.execute("SELECT count(*) FROM customers")
            assert await cursor.fetchall() == [(1,)]


async def test_backend_ended_in_mid_wait(pair: Replicated, purchases_url: str) -> None:
    async with pool(purchases_url, "purchases_service", size=1) as opened, opened.connection() as connection:
        pair.cut()
        inserting = asyncio.create_task(connection.execute("INSERT INTO customers VALUES (gen_random_uuid())"))
        await waits(pair)
        with pair.primary.connect() as operator:
            operator.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
        with pytest.raises(psycopg.OperationalError):
            await inserting
        pair.mend()


async def test_nothing_waits_where_nothing_is_synchronous(pair: Replicated, till: grpc.aio.Channel) -> None:
    """Without synchronous_standby_names, a repeat is answered as a first sale is: when this server has it."""
    stub: Any = PurchasesServiceStub(till)  # type: ignore[arg-type, unused-ignore]
    pair.cut()
    pair.require_standby("")
    request = sale()
    await stub.CreatePurchase(request, timeout=LONG_S)
    assert (await stub.CreatePurchase(request, timeout=LONG_S)).replayed
