"""`python -m tests.bench.analytics.feeder URL EVENTS_PER_S`: counts sales of today like the consumer, until stdin ends.

Prints a line when it begins, and at its end how many it has counted in how many seconds.
"""

import asyncio
import datetime
import json
import random
import sys
import time
import uuid

import uuid_utils
import uvloop

from analytics_svc.ingest.apply import apply
from analytics_svc.purchase import Item, PurchaseCreated
from chassis import postgres
from tests.bench.analytics.years import BRANCHES

BATCHES_PER_S = 10
ITEMS = (3, 4, 5, 6)  # 4.5 on average
PRODUCTS, CUSTOMERS = 5_000, 100_000


def sale(chance: random.Random = random.Random()) -> PurchaseCreated:
    """Of this moment, by some customer in some branch."""
    now = datetime.datetime.now(datetime.UTC)
    products = chance.sample(range(1, PRODUCTS + 1), chance.choice(ITEMS))
    items = [Item(product_id, 1, chance.randrange(100, 5_000)) for product_id in products]
    customer_id = str(uuid.UUID(int=chance.randrange(CUSTOMERS))) if chance.random() < 0.5 else None
    total = sum(item.cents for item in items)
    branch_id = chance.randint(1, BRANCHES)
    return PurchaseCreated(str(uuid_utils.uuid7()), now.date(), now, branch_id, customer_id, total, items)


async def main(url: str, events_per_s: int) -> None:
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    counted = 0
    async with postgres.open_pool(
        url, role="analytics_consumer", application_name="feeder", size=1, statement_timeout_s=30
    ) as pool:
        await pool.wait()
        print("feeding", flush=True)
        began = due = time.perf_counter()
        while not ended.done():
            events = [sale() for _ in range(events_per_s // BATCHES_PER_S)]
            async with pool.connection() as connection, connection.pipeline(), connection.transaction():
                counted += (await apply(connection, events, [])).counted
            due += 1 / BATCHES_PER_S
            await asyncio.sleep(due - time.perf_counter())
        print(json.dumps([counted, time.perf_counter() - began]), flush=True)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2])))
