"""Whatever one kind of question takes, others are answered; who waited in vain is told that it is others' turn."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from google.type import date_pb2

import purchases_svc.__main__ as purchases
from analytics_svc.commands.serve import serve
from analytics_svc.serve import server as analytics_server
from analytics_svc.settings import ServeSettings as AnalyticsSettings
from chassis import postgres
from chassis.errors import DatabaseUnavailable, Overloaded
from chassis.shares import Shares
from purchases_svc.settings import ServeSettings
from retail.analytics.v1 import analytics_service_pb2 as analytics_pb
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub
from retail.purchases.v1 import customers_service_pb2 as customers_pb
from retail.purchases.v1 import purchases_service_pb2 as purchases_pb
from retail.purchases.v1.customers_service_pb2_grpc import CustomersServiceStub
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.conftest import WAIT_S, eventually, pool
from tests.integration.conftest import free_address, running
from tests.integration.purchase_events import query
from tests.integration.purchases.test_limits import is_stuck, locked, outcome
from tests.integration.sales import Refusal, refusal, sale

CROWD = 25  # fewer than one connection to the purchases service may have on their way: more wait at the client
DAY = date_pb2.Date(year=2026, month=3, day=1)


def overloaded(found: Refusal | None) -> bool:
    return bool(found and found.reason == "OVERLOADED" and found.retry.retry_delay.ToMilliseconds() > 0)


async def test_a_crowd_with_heavy_questions_leaves_room_for_light_ones(
    analytics_db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analytics_server, "POOL_WAIT_S", 1.0)
    config = AnalyticsSettings(analytics_db, listen=free_address(), metrics_listen="127.0.0.1:0")
    async with running(lambda stop: serve(config, stop), config.listen) as channel:
        reports: Any = AnalyticsServiceStub(channel)
        heavy = analytics_pb.ListTopProductsRequest(first_date=DAY, last_date=DAY)
        with locked(analytics_db, "product_sales_of_chain_sums"):  # as if reading it took for ever
            crowd = [
                asyncio.ensure_future(outcome(reports.ListTopProducts(heavy, timeout=WAIT_S))) for _ in range(CROWD)
            ]
            await eventually(lambda: is_stuck(analytics_db, "product_sales_of_chain"), "heavy ones are being answered")
            for _ in range(10):
                await reports.GetSalesSummary(analytics_pb.GetSalesSummaryRequest(), timeout=WAIT_S)
            await eventually(_all_but(crowd, config.read_connections), "the others of the crowd are refused")
        found = [each for each in await asyncio.gather(*crowd) if each]
    assert len(found) >= CROWD - config.read_connections
    assert all(overloaded(each) for each in found)


def _all_but(calls: Sequence[asyncio.Future[Any]], most: int) -> Callable[[], Awaitable[bool]]:
    async def done() -> bool:
        return sum(call.done() for call in calls) >= len(calls) - most

    return done


async def test_a_crowd_that_lists_leaves_room_for_others(purchases_db: str) -> None:
    """A crowd asks for control totals; a purchase is read all the while, and purchases are listed."""
    config = ServeSettings(purchases_db, listen=free_address(), metrics_listen="127.0.0.1:0")
    async with running(lambda stop: purchases.serve(config, stop), config.listen) as channel:
        tills: Any = PurchasesServiceStub(channel)
        totals = purchases_pb.ListControlTotalsRequest(first_date=DAY, last_date=DAY)
        with locked(purchases_db, "chain_settings"):  # which of these calls only those for totals read
            crowd = [
                asyncio.ensure_future(outcome(tills.ListControlTotals(totals, timeout=WAIT_S))) for _ in range(CROWD)
            ]
            await eventually(lambda: is_stuck(purchases_db, "clock_timestamp"), "totals are being read")
            for _ in range(10):
                request = purchases_pb.GetPurchaseRequest(purchase_id=str(uuid.uuid4()))
                assert (await refusal(tills.GetPurchase(request, timeout=WAIT_S))).reason == "PURCHASE_NOT_FOUND"
                await tills.ListPurchases(purchases_pb.ListPurchasesRequest(), timeout=WAIT_S)
        assert await asyncio.gather(*crowd) == [None] * CROWD


async def test_short_reads_go_side_by_side_and_leave_room(purchases_db: str) -> None:
    """A crowd asks for a customer: as many are answered at once as there are connections, but for one."""
    config = ServeSettings(purchases_db, listen=free_address(), metrics_listen="127.0.0.1:0")
    async with running(lambda stop: purchases.serve(config, stop), config.listen) as channel:
        customers: Any = CustomersServiceStub(channel)
        tills: Any = PurchasesServiceStub(channel)
        with locked(purchases_db, "customers"):
            request = customers_pb.GetCustomerRequest(customer_id=str(uuid.uuid4()))
            crowd = [
                asyncio.ensure_future(refusal(customers.GetCustomer(request, timeout=WAIT_S))) for _ in range(CROWD)
            ]

            async def side_by_side() -> bool:
                waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'customers'::regclass"
                return query(purchases_db, waiting) == [(config.read_connections - 1,)]

            await eventually(side_by_side, "all connections but one are in use")
            await tills.ListPurchases(purchases_pb.ListPurchasesRequest(), timeout=WAIT_S)
        await asyncio.gather(*crowd)


async def test_an_export_is_kept_for_the_proof(purchases_db: str) -> None:
    config = ServeSettings(purchases_db, listen=free_address(), metrics_listen="127.0.0.1:0", export_connections=1)
    async with running(lambda stop: purchases.serve(config, stop), config.listen) as channel:
        tills: Any = PurchasesServiceStub(channel)
        await tills.CreatePurchase(sale(), timeout=WAIT_S)
        days = purchases_pb.ExportPurchasesRequest(
            first_date=date_pb2.Date(year=2000, month=1, day=1), last_date=date_pb2.Date(year=2100, month=1, day=1)
        )

        async def export(**options: Any) -> int:
            return len([reply async for reply in tills.ExportPurchases(days, timeout=WAIT_S, **options)])

        with locked(purchases_db, "purchases"):
            first = asyncio.ensure_future(export())
            await eventually(lambda: is_stuck(purchases_db, "max(business_day)"), "an export has begun")
            for _ in range(3):
                assert overloaded(await refusal(export()))
            proof = asyncio.ensure_future(export(metadata=[("retail-purpose", "proof")]))
            await asyncio.wait({proof}, timeout=2)  # longer than an export waits for its turn
            assert not proof.done()
        assert (await first, await proof) == (1, 1)


async def test_a_busy_pool_is_told_from_a_database_that_is_away(analytics_db: str) -> None:
    async with pool(analytics_db, "analytics_consumer", 2) as opened:
        shares = Shares(opened, 1)
        async with shares.connection("a", WAIT_S):
            for _ in range(3):
                with pytest.raises(postgres.PoolBusy) as caught:
                    async with shares.connection("a", 0.1):
                        raise AssertionError("one of its kind has the share already")
            assert isinstance(postgres.meaning(caught.value), Overloaded)
            async with shares.connection("b", WAIT_S):
                with pytest.raises(postgres.PoolBusy):
                    async with shares.connection("c", 0.1):
                        raise AssertionError("there is no third one")
        async with shares.connection("a", WAIT_S), shares.connection("b", WAIT_S):
            pass
    nowhere = "postgresql://nobody@127.0.0.1:9/none"
    async with postgres.open_pool(
        nowhere, role="analytics_server", application_name="test", size=2, statement_timeout_s=1
    ) as opened:
        shares = Shares(opened, 1)

        async def ask() -> None:
            async with shares.connection("a", 0.5):
                raise AssertionError("nobody is there")

        for error in await asyncio.gather(*(ask() for _ in range(5)), return_exceptions=True):
            assert isinstance(error, Exception) and isinstance(postgres.meaning(error), DatabaseUnavailable)
