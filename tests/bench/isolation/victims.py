"""Tills that sell at a steady pace while somebody else attacks, in a process of their own: how soon, and whether, each
sale is answered. `python -m tests.bench.isolation.victims ADDRESS SECONDS` prints {"ms": [...], "failed": {code: n}}.
"""

import asyncio
import json
import sys
import time
from collections import Counter

import grpc

from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.bench.isolation import certificates
from tests.bench.load_client import sale

TILLS = 4
PAUSE_S = 0.05  # between a till's sales: 80 sales a second in all, as of a busy hour of some hundred tills
DEADLINE_S = 5.0  # of a till at rush hour


async def main(address: str, seconds: float) -> None:
    times_ms: list[float] = []
    failed: Counter[str] = Counter()
    end = time.monotonic() + seconds

    async def till(pos_id: str) -> None:
        async with certificates.channel(address, pos_id) as channel:
            stub = PurchasesServiceStub(channel)  # type: ignore[arg-type, unused-ignore]
            while time.monotonic() < end:
                request = sale(branches=certificates.BRANCH)
                request.purchase.pos_id = pos_id
                began = time.perf_counter()
                try:
                    await stub.CreatePurchase(request, timeout=DEADLINE_S)  # type: ignore[misc, unused-ignore]
                except grpc.aio.AioRpcError as error:
                    failed[error.code().name] += 1
                times_ms.append((time.perf_counter() - began) * 1_000)
                await asyncio.sleep(PAUSE_S)

    await asyncio.gather(*(till(certificates.pos_id(number)) for number in range(TILLS)))
    print(json.dumps({"ms": sorted(times_ms), "failed": failed}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))
