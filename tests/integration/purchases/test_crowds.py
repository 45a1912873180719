"""Thousands of tills at one moment: each gets an answer of ours."""

import asyncio
import traceback
import uuid
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import psycopg
import pytest
from structlog.testing import capture_logs

from purchases_svc.sale import Sale
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.integration.purchases.test_create_purchase import stored_sale
from tests.integration.purchases.test_flush_isolation import recording
from tests.integration.sales import Refusal, sale

CALLS = 5_000
CONNECTIONS = 8
PATIENCE_S = 300.0


async def answer(call: Any) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.CANCELLED:
            return "CANCELLED"
        refused = Refusal(error)
        assert refused.reason != "OVERLOADED" or refused.retry.retry_delay.ToMilliseconds() > 0
        return str(refused.reason)
    return "OK"


async def test_nobody_in_a_crowd_is_thrown_away(purchases_channel: grpc.aio.Channel, purchases_address: str) -> None:
    """gRPC has limits of its own, which cancel calls before any of our code sees them: they lie above ours."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(purchases_address, options=options) for _ in range(CONNECTIONS)]
    stubs: list[Any] = [PurchasesServiceStub(channel) for channel in channels]
    calls = [stubs[n % CONNECTIONS].CreatePurchase(sale(("1.00",)), timeout=PATIENCE_S) for n in range(CALLS)]
    answers = Counter(await asyncio.gather(*map(answer, calls)))
    await asyncio.gather(*(channel.close() for channel in channels))
    assert answers.keys() <= {"OK", "OVERLOADED"}, answers
    assert answers["OK"] > 0


async def test_a_bug_that_hits_a_crowd_is_told_once(purchases_channel: grpc.aio.Channel, purchases_db: str) -> None:
    """500 sales in flight: each till is told INTERNAL with the id of one entry of the log."""
    tills: Any = PurchasesServiceStub(purchases_channel)
    await tills.CreatePurchase(sale())
    with psycopg.connect(purchases_db, autocommit=True) as connection:
        connection.execute("REVOKE INSERT ON outbox_events FROM purchases_service")
    with capture_logs() as logs:
        calls = [tills.CreatePurchase(sale(("1.00",)), timeout=PATIENCE_S) for _ in range(500)]
        answers = Counter(await asyncio.gather(*map(answer, calls)))
    assert answers == {"INTERNAL": 500}
    told = [each for each in logs if each["log_level"] != "debug"]
    assert len(told) < 50 and len([each for each in told if "exc_info" in each]) == 1, told


def sale_of_today(**changes: Any) -> Sale:
    return stored_sale(purchase_time=datetime.now(UTC), **changes)


ONE = sale_of_today(customer_id=str(uuid.uuid4()))


@pytest.mark.parametrize(
    ("broken", "sold"),
    [
        ("REVOKE INSERT ON outbox_events FROM purchases_service", sale_of_today),
        ("SELECT", lambda: ONE),  # refused, as nobody knows the customer: repeats share what becomes of the first
        (
            "REVOKE SELECT ON idempotency_keys FROM purchases_service",  # by which sales of another time are looked up
            lambda: stored_sale(purchase_time=datetime(1999, 1, 1, tzinfo=UTC)),
        ),
        (
            "REVOKE EXECUTE ON FUNCTION ensure_purchases_month FROM purchases_service",
            lambda: stored_sale(purchase_time=datetime.now(UTC) - timedelta(days=400)),
        ),
    ],
    ids=["flush", "repeats", "look-up", "partition"],
)
async def test_callers_of_one_flush_share_no_error(purchases_db: str, broken: str, sold: Callable[[], Sale]) -> None:
    """What one of them does to its error, such as raise it, happens to nobody else's."""
    async with recording(purchases_db) as recorder:
        await recorder.record(sale_of_today())
        with psycopg.connect(purchases_db, autocommit=True) as connection:
            connection.execute(broken)
        errors = await asyncio.gather(*(recorder.record(sold()) for _ in range(200)), return_exceptions=True)
    assert all(isinstance(error, Exception) for error in errors)
    assert len({id(error) for error in errors}) == 200
    assert len({(type(error), str(error)) for error in errors}) == 1
    origins = [traceback.extract_tb(error.__traceback__) for error in errors if isinstance(error, Exception)]
    assert max(map(len, origins)) < 30  # frames
