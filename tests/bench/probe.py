"""How soon a sale is seen by those who ask: sales in branches of their own, asked for until they are there."""

import asyncio
import datetime
import time
from collections.abc import Callable
from itertools import count

import grpc
from google.type.date_pb2 import Date

from retail.analytics.v1.analytics_service_pb2 import ListDailySalesRequest
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub
from retail.purchases.v1.purchases_service_pb2 import CreatePurchaseRequest
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub

SALES_PER_S = 25  # few beside the load, and many in its time
ASK_AGAIN_S = 0.002
VISIBLE_WITHIN_S = 30.0
CALL_TIMEOUT_S = 20.0

# A branch without sales has no row: a probe's sale is the first one in its branch. Counted over all jobs of a process.
_branches = count(1_000_000)


class Probe:
    """Sends sales at a steady rate and asks for each until it is seen."""

    def __init__(
        self, purchases: grpc.aio.Channel, analytics: grpc.aio.Channel, sale: Callable[[], CreatePurchaseRequest]
    ) -> None:
        self._purchases, self._analytics = PurchasesServiceStub(purchases), AnalyticsServiceStub(analytics)
        self._sale = sale
        self._stopped = asyncio.Event()
        self.visible_ms: list[float] = []
        self.lag_ms: list[float] = []

    async def run(self) -> None:
        """Until `stop`, and until the last sale is seen."""
        async with asyncio.TaskGroup() as probes:
            while not self._stopped.is_set():
                probes.create_task(self._measure_one())
                await asyncio.sleep(1 / SALES_PER_S)

    def stop(self) -> None:
        self._stopped.set()

    async def _measure_one(self) -> None:
        request = self._sale()
        request.purchase.branch_id = next(_branches)
        await self._purchases.CreatePurchase(request, timeout=CALL_TIMEOUT_S)
        answered = time.perf_counter()
        sold = datetime.datetime.now(datetime.UTC)
        first, last = sold - datetime.timedelta(days=1), sold  # midnight may have passed since
        question = ListDailySalesRequest(
            first_date=Date(year=first.year, month=first.month, day=first.day),
            last_date=Date(year=last.year, month=last.month, day=last.day),
            branch_ids=[request.purchase.branch_id],
        )
        while True:
            answer = await self._analytics.ListDailySales(question, timeout=CALL_TIMEOUT_S)
            took_s = time.perf_counter() - answered
            if answer.daily_sales:
                break
            if took_s > VISIBLE_WITHIN_S:
                raise RuntimeError(f"a sale was not visible within {VISIBLE_WITHIN_S:.0f} s")
            await asyncio.sleep(ASK_AGAIN_S)
        self.visible_ms.append(took_s * 1_000)
        if answer.HasField("complete_through_time"):
            complete = answer.complete_through_time.ToDatetime(datetime.UTC)
            self.lag_ms.append((datetime.datetime.now(datetime.UTC) - complete).total_seconds() * 1_000)
