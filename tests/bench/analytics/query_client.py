"""`python -m tests.bench.analytics.query_client ADDRESS METHOD CALLS_IN_FLIGHT SECONDS`: calls, as cheap as can be.

Requests are lines of base64 on stdin, and are sent again and again. Prints one line of JSON.
"""

import asyncio
import base64
import json
import sys
import time
from itertools import cycle

import grpc
import uvloop

from tests.bench.analytics.summaries import Load
from tests.bench.figures import percentile

WARM_UP_S = 1.0
CALL_TIMEOUT_S = 20.0


async def main(address: str, method: str, in_flight: int, measure_s: float) -> None:
    requests = cycle([base64.b64decode(line) for line in sys.stdin])
    took_s: list[float] = []
    stopped = False

    async def caller(call: "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]") -> None:
        while not stopped:
            started = time.perf_counter()
            await call(next(requests), timeout=CALL_TIMEOUT_S)  # raises unless it is OK
            took_s.append(time.perf_counter() - started)

    async with grpc.aio.insecure_channel(address) as channel, asyncio.TaskGroup() as callers:
        for _ in range(in_flight):
            callers.create_task(caller(channel.unary_unary(method)))
        await asyncio.sleep(WARM_UP_S)
        first, began = len(took_s), time.perf_counter()
        await asyncio.sleep(measure_s)
        last, ended = len(took_s), time.perf_counter()
        stopped = True
    measured = sorted(took_s[first:last])
    load = Load(len(measured) / (ended - began), percentile(measured, 50) * 1_000, percentile(measured, 99) * 1_000)
    print(json.dumps(load))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
