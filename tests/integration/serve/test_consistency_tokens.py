"""Read-your-writes: a query with the token of a purchase waits until that purchase is included."""

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs
from uuid_utils import uuid7

from analytics_svc.commands.serve import serve
from analytics_svc.ingest.quarantine import QuarantinedEvent
from analytics_svc.serve import inclusion
from analytics_svc.settings import ServeSettings
from retail.analytics.v1 import analytics_service_pb2 as pb
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub
from tests.conftest import eventually
from tests.integration.conftest import free_address, is_serving, running
from tests.integration.purchase_events import query, sold
from tests.integration.sales import Refusal, refusal
from tests.integration.serve.test_analytics_queries import record

ANSWER_EACH_S = inclusion.ANSWER_EACH_S
CUSTOMER = "4f7c2d1e-9b3a-4c58-8e6f-0a1b2c3d4e5f"
END_LISTENER = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = current_database() AND query LIKE 'SELECT announced_count%'"
)


@pytest.fixture
async def channel(analytics_db: str) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a running server on an empty database."""
    config = ServeSettings(analytics_db, listen=free_address(), metrics_listen="127.0.0.1:0")
    async with running(lambda stop: serve(config, stop), config.listen) as opened:
        yield opened


@pytest.fixture
def reports(channel: grpc.aio.Channel) -> Any:
    return AnalyticsServiceStub(channel)


def summary(token: str) -> pb.GetSalesSummaryRequest:
    return pb.GetSalesSummaryRequest(consistency_token=token)


def quarantined(event_id: str) -> QuarantinedEvent:
    return QuarantinedEvent(event_id, "TOTAL_MISMATCH", "does not add up", b"{}", {})


async def test_every_query_waits_for_the_purchase(reports: Any, analytics_db: str) -> None:
    """Whatever is asked, before the purchase is counted or after: the answer includes it."""
    sale = sold("8.90", customer_id=CUSTOMER, event_id=str(uuid7()))
    token = sale.event_id.upper()  # an id, whatever its letters
    requests = [
        pb.ListDailySalesRequest(consistency_token=token),
        pb.ListProductSalesRequest(consistency_token=token),
        pb.ListTopProductsRequest(consistency_token=token),
        pb.ListLoyalCustomersRequest(consistency_token=token, min_purchase_count=1),
        pb.GetCustomerLoyaltyRequest(consistency_token=token, customer_id=CUSTOMER),
        pb.GetSalesSummaryRequest(consistency_token=token),
    ]

    def ask() -> list[asyncio.Task[Any]]:
        calls = [getattr(reports, type(r).__name__.removesuffix("Request"))(r, timeout=10) for r in requests]
        calls.append(reports.WatchDailySales(pb.WatchDailySalesRequest(consistency_token=token), timeout=10).read())
        return [asyncio.ensure_future(_reply(call)) for call in calls]

    early = ask()
    done, _ = await asyncio.wait(early, timeout=0.3)
    assert not done
    await record(analytics_db, [sale])
    for reply in await asyncio.gather(*early, *ask()):
        assert "8.90" in str(reply) or CUSTOMER in str(reply)


async def _reply(call: Any) -> Any:
    return await call


@pytest.mark.parametrize("timeout_s", [0.5, None])
async def test_in_time_or_told_in_time(reports: Any, monkeypatch: pytest.MonkeyPatch, timeout_s: float | None) -> None:
    """A purchase that does not come: the caller is told just before its deadline, or after the longest wait."""
    monkeypatch.setattr(inclusion, "WAIT_MAX_S", 0.7)
    for _ in range(5):  # on a busy machine, the last 50 ms may be too short; they are not always
        begin = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reports.GetSalesSummary(summary(str(uuid7())), timeout=timeout_s)
        assert time.monotonic() - begin > (timeout_s or 0.7) - 0.1
        if caught.value.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            break
    found = Refusal(caught.value)
    assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_YET_VISIBLE")
    assert found.retry.retry_delay.seconds == 1


def test_how_long_a_caller_waits() -> None:
    """Fifty milliseconds less than it has; half of what it has, if that is not much; ten seconds at most."""
    waits = {left: round(inclusion._patience_s(left, 0), 3) for left in (0.02, 0.1, 0.5, 10.0, 60.0, None)}
    assert waits == {0.02: 0.01, 0.1: 0.05, 0.5: 0.45, 10.0: 9.95, 60.0: 10, None: 10}
    assert [round(inclusion._patience_s(10.0, waiting), 3) for waiting in (0, 4, 2_000)] == [9.95, 9.94, 5.0]


async def test_quarantined_forgotten_and_wrong_tokens(reports: Any, analytics_db: str) -> None:
    """A quarantined purchase is named as such; one that the log has forgotten was counted; what is no id is refused."""
    token, waiting = str(uuid7()), str(uuid7())
    early = asyncio.ensure_future(refusal(reports.GetSalesSummary(summary(waiting), timeout=10)))
    await record(analytics_db, [], [quarantined(token), quarantined(waiting)])
    for found in (await refusal(reports.GetSalesSummary(summary(token), timeout=10)), await early):
        assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PURCHASE_QUARANTINED")
    sale = sold("1.00", event_id=str(uuid7()))
    await record(analytics_db, [sale], [quarantined(sale.event_id)])  # counted; only a bad copy of it is quarantined
    assert (await reports.GetSalesSummary(summary(sale.event_id), timeout=10)).purchase_count == 1
    query(analytics_db, "UPDATE freshness SET log_floor = '01900000-0000-7000-8000-000000000000'")
    old = "018fffff-ffff-7fff-bfff-ffffffffffff"
    assert (await reports.GetSalesSummary(summary(old), timeout=10)).purchase_count == 1
    for wrong in ("x", "0190", f"{old}\n", old.replace("f", "g"), f"{{{old}}}", "1" * 10_000):
        found = await refusal(reports.GetSalesSummary(summary(wrong), timeout=10))
        assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TOKEN")


async def test_many_waiters_are_cheap_and_bounded(
    reports: Any, channel: grpc.aio.Channel, analytics_db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All who wait are looked for together; one too many is refused; health answers all the while."""
    monkeypatch.setattr(inclusion, "WAITERS_MAX", 400)
    monkeypatch.setattr(inclusion, "WAIT_MAX_S", 60.0)
    looks = []
    look = inclusion.find_settled

    async def counted(connection: Any, ids: Any) -> Any:
        looks.append(len(ids))
        return await look(connection, ids)

    monkeypatch.setattr(inclusion, "find_settled", counted)
    counted_before = sold("1.00", event_id=str(uuid7()))
    await record(analytics_db, [counted_before])
    sales = [sold("1.00", event_id=str(uuid7())) for _ in range(400)]
    calls = [asyncio.ensure_future(_reply(reports.GetSalesSummary(summary(s.event_id), timeout=60))) for s in sales]

    async def all_wait() -> bool:
        return sum(looks) >= 400

    await eventually(all_wait, "all are looked for")
    found = await refusal(reports.GetSalesSummary(summary(str(uuid7())), timeout=20))
    assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert await is_serving(channel)
    # Who need not wait is answered, however many do.
    assert (await reports.GetSalesSummary(summary(counted_before.event_id), timeout=20)).purchase_count == 1
    looks.clear()
    await record(analytics_db, sales)
    assert [reply.purchase_count for reply in await asyncio.gather(*calls)] == [401] * 400
    assert len(looks) <= 3 and max(looks) == 400
    assert (await reports.GetSalesSummary(summary(sales[0].event_id), timeout=20)).purchase_count == 401


async def test_made_up_tokens_are_told_so(reports: Any, analytics_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is no id of ours, is of the future, or of a time that is complete: nobody waits for nothing."""
    now = time.time_ns()
    day = 86_400 * 10**9
    query(analytics_db, "UPDATE freshness SET complete_through_at = now()")
    for wrong in (
        str(uuid.uuid4()),
        "ffffffff-ffff-7fff-bfff-ffffffffffff",
        str(uuid7(nanoseconds=now + 2 * day)),
        str(uuid7(nanoseconds=now - 2 * day)),
    ):
        found = await refusal(reports.GetSalesSummary(summary(wrong), timeout=20))
        assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TOKEN")
        sale = sold("1.00", event_id=wrong)
        await record(analytics_db, [sale])  # whatever it looks like: what is counted is counted
        await reports.GetSalesSummary(summary(wrong), timeout=20)
    old = str(uuid7(nanoseconds=now - 2 * day))
    query(analytics_db, "UPDATE freshness SET complete_through_at = now() - '3 days'::interval")
    monkeypatch.setattr(inclusion, "WAIT_MAX_S", 0.5)
    found = await refusal(reports.GetSalesSummary(summary(old), timeout=20))
    assert found.reason == "NOT_YET_VISIBLE"  # it may come


async def test_a_crowd_with_one_deadline_is_told_before_it(reports: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as may wait: that their purchases are not visible yet, and not that the time is over.

    Here the server shares a processor with its callers, and perhaps with much else: where it is too slow, half of them
    are tried, with twice the time for each, and so on.
    """
    seen: list[Counter[str]] = []
    for slower in (1, 2, 4, 8):  # beyond, the last 50 ms may do for all
        monkeypatch.setattr(inclusion, "ANSWER_EACH_S", slower * ANSWER_EACH_S)
        deadline = time.monotonic() + inclusion.WAIT_MAX_S

        async def ask(request: Any, deadline: float = deadline) -> str:
            call = reports.GetSalesSummary(request, timeout=deadline - time.monotonic())
            try:
                await call
            except grpc.aio.AioRpcError as error:
                return Refusal(error).reason if error.trailing_metadata() else error.code().name
            return "OK"

        crowd = [summary(str(uuid7())) for _ in range(inclusion.WAITERS_MAX // slower)]
        with capture_logs():  # as cheap as a process that does not log each refusal in full
            seen.append(Counter(await asyncio.gather(*map(ask, crowd))))
        if seen[-1] == {"NOT_YET_VISIBLE": len(crowd)}:
            return
    pytest.fail(f"in none of these crowds was everybody told: {seen}")


async def test_a_lost_listener_leaves_nobody_behind(reports: Any, analytics_db: str) -> None:
    """The connection that hears of changes is cut, over and over; every purchase is still noticed."""
    for _ in range(5):
        sale = sold("1.00", event_id=str(uuid7()))
        call = asyncio.ensure_future(_reply(reports.GetSalesSummary(summary(sale.event_id), timeout=10)))
        await asyncio.sleep(0)
        query(analytics_db, END_LISTENER)
        await record(analytics_db, [sale])
        await call


async def test_who_waits_is_sent_elsewhere_by_a_server_that_stops(analytics_db: str) -> None:
    """At once: waiting goes on at another server."""
    config = ServeSettings(analytics_db, listen=free_address(), metrics_listen="127.0.0.1:0")
    async with running(lambda stop: serve(config, stop), config.listen) as opened:
        stub = AnalyticsServiceStub(opened)
        call = asyncio.ensure_future(refusal(stub.GetSalesSummary(summary(str(uuid7())), timeout=30)))
        watch = stub.WatchDailySales(pb.WatchDailySalesRequest())
        first: Any = await watch.read()
        assert not first.daily_sales
        stopped = time.monotonic()
    for found in (await call, await refusal(watch.read())):
        assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert time.monotonic() - stopped < 15  # not when all are past their deadlines
