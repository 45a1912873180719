"""A chain that sells, what the purchases service exports of it, and read models that are told of the sales by hand."""

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import date
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import grpc

from analytics_svc.ingest.apply import apply
from analytics_svc.purchase import PurchaseCreated
from analytics_svc.upstream.source import CellSource, Source
from chassis import postgres
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.integration.purchase_events import query
from tests.integration.sales import NOON, sale

FIRST = date(2026, 3, 1)  # of the days on which it sells
DAYS = 3
DAY_S = 86_400
UTC_ZONE = ZoneInfo("UTC")
TABLES = (
    "daily_sales_by_branch, daily_sales_of_chain, monthly_sales_by_branch, product_sales_daily, product_sales_totals,"
    " product_sales_of_chain_sums, product_sales_of_chain_notes, customer_loyalty, customer_loyalty_chain,"
    " sales_totals, analytics_event_log"
)


class Chain(NamedTuple):
    tills: Any
    source: Source
    pool: postgres.Pool
    url: str  # of the analytics database
    customers: list[str]

    async def sell(self, count: int, seed: int, days: int = DAYS) -> None:
        chance = random.Random(seed)
        requests = []
        for _ in range(count):
            prices = tuple(f"{chance.randrange(1, 9_999) / 100:.2f}" for _ in range(chance.randint(1, 4)))
            changes: dict[str, Any] = {"branch_id": chance.randint(1, 3)}
            if chance.random() < 0.7:
                changes |= {"customer_id": chance.choice(self.customers), "register_customer": True}
            requests.append(
                sale(prices, seconds=NOON + chance.randrange(days) * DAY_S + chance.randrange(40_000), **changes)
            )
        await asyncio.gather(*(self.tills.CreatePurchase(request) for request in requests))

    async def recorded(self) -> list[PurchaseCreated]:
        return [event async for chunk in self.source.export(FIRST, date(2026, 12, 31)) for event in chunk]

    async def apply(self, events: Sequence[PurchaseCreated]) -> None:
        while True:
            try:
                async with self.pool.connection() as connection, connection.pipeline(), connection.transaction():
                    await apply(connection, events, [])
                    return
            except postgres.CONFLICT:
                continue

    def ids(self) -> list[tuple[Any, ...]]:
        return query(self.url, "SELECT event_id::text, day FROM analytics_event_log ORDER BY 1")


def open_chain(channel: grpc.aio.Channel, pool: postgres.Pool, url: str) -> Chain:
    chance = random.Random(1)
    customers = [str(uuid.UUID(int=chance.getrandbits(128))) for _ in range(12)]
    return Chain(PurchasesServiceStub(channel), CellSource(channel, UTC_ZONE), pool, url, customers)


@asynccontextmanager
async def load(chain: Chain, seed: int) -> AsyncIterator[list[int]]:
    """Sales that are recorded, counted and counted again all the time; yields how many there were."""
    sold = [0]
    stop = asyncio.Event()

    async def sell() -> None:
        while not stop.is_set():
            await chain.sell(10, seed=seed + sold[0])
            await chain.apply((await chain.recorded())[-100:])
            sold[0] += 10
            await asyncio.sleep(0.05)  # leaves some of the one core to what is tested

    task = asyncio.create_task(sell())
    try:
        yield sold
    finally:
        stop.set()
        await task
    await chain.apply(await chain.recorded())


async def enough(sold: list[int], count: int) -> bool:
    return sold[0] >= count
