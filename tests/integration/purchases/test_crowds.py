"""Thousands of tills at one moment: each gets an answer of ours."""

import asyncio
from collections import Counter
from typing import Any

import grpc
import psycopg
from structlog.testing import capture_logs

from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
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
