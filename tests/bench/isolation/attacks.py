"""What one caller, one row or one connection may do to the others, each until its process is ended.

`python -m tests.bench.isolation.attacks NAME ADDRESS URL`: ADDRESS of the purchases service, URL of its
database as the owner has it. Everything is on this machine, and what is sent is bounded by what waits.
"""

import asyncio
import datetime
import os
import signal
import sys
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import psycopg
from google.type import date_pb2

from retail.purchases.v1.purchases_service_pb2 import (
    CreatePurchaseRequest,
    ListControlTotalsRequest,
    UploadPurchasesRequest,
)
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.bench.isolation import certificates
from tests.bench.load_client import sale

PATIENCE_S = 5.0  # of each call of an attacker
PAUSE_S = 0.05  # so that what is measured is the server, not who of us gets the two cores

Attack = Callable[[Any, str], Awaitable[None]]
ATTACKS: dict[str, Attack] = {}
KNOWN = {"flooding_till"}  # attacks by callers who are known, as by TLS


def attack(run: Attack) -> Attack:
    ATTACKS[run.__name__] = run
    return run


async def over_and_over(at_once: int, call: Callable[[], Awaitable[Any]], pause_s: float = PAUSE_S) -> None:
    async def one() -> None:
        while True:
            with suppress(grpc.aio.AioRpcError):  # refused, which is an answer, too
                await call()
            await asyncio.sleep(pause_s)

    await asyncio.gather(*(one() for _ in range(at_once)))


async def streamed(stub: Any, message: UploadPurchasesRequest) -> None:
    async for _ in stub.UploadPurchases(iter([message]), timeout=PATIENCE_S):
        pass


@attack
async def row_locked(stub: Any, url: str) -> None:
    """Somebody erases a customer and does not commit; a till sells to that customer again and again."""
    customer = str(uuid.uuid4())
    request = sale()
    request.purchase.customer_id, request.register_customer = customer, True
    await stub.CreatePurchase(request)
    with psycopg.connect(url) as connection:
        connection.execute("SELECT FROM customers WHERE customer_id = %s FOR UPDATE", [customer])

        def again() -> Awaitable[Any]:
            request = sale()
            request.purchase.customer_id = customer
            answered: Awaitable[Any] = stub.CreatePurchase(request, timeout=PATIENCE_S)
            return answered

        await over_and_over(2, again)


@attack
async def backend_frozen(stub: Any, url: str) -> None:
    """One of PostgreSQL's processes stands still, as on a disk that hangs."""
    with psycopg.connect(url, autocommit=True) as connection:
        query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'purchases write' ORDER BY pid LIMIT 1"
        row = connection.execute(query).fetchone()
    assert row
    os.kill(row[0], signal.SIGSTOP)
    try:
        await asyncio.Event().wait()
    finally:
        os.kill(row[0], signal.SIGCONT)


@attack
async def months_from_long_ago(stub: Any, url: str) -> None:
    """A clock that is wrong each time in another way, while somebody holds what making a month needs."""
    times = iter(range(1, 1_000_000))

    def odd() -> Awaitable[Any]:
        request = sale()
        day = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(days=31 * (next(times) % 300))
        request.purchase.purchase_time.FromDatetime(day)
        answered: Awaitable[Any] = stub.CreatePurchase(request, timeout=PATIENCE_S)
        return answered

    with psycopg.connect(url) as connection:
        connection.execute("LOCK TABLE purchases IN SHARE UPDATE EXCLUSIVE MODE")
        await over_and_over(4, odd)


@attack
async def uploads_of_one_peer(stub: Any, url: str) -> None:
    """Thirty streams of one connection, each with messages of 500 sales."""

    async def full() -> None:
        message = UploadPurchasesRequest()
        for number in range(500):
            message.uploads.add(sequence_number=number + 1, create_purchase=sale())
        await streamed(stub, message)

    await over_and_over(30, full, 1.0)


@attack
async def noise_of_a_megabyte(stub: Any, url: str) -> None:
    """Calls with a megabyte in a field that the server ignores."""
    request = sale()
    request.purchase.purchase_id = "x" * 900_000
    await over_and_over(20, lambda: stub.CreatePurchase(copy(request), timeout=PATIENCE_S), 0.5)


@attack
async def half_a_million_broken_items(stub: Any, url: str) -> None:
    message = UploadPurchasesRequest()
    broken = CreatePurchaseRequest()
    for _ in range(1_000):
        broken.purchase.items.add()
    while message.ByteSize() < 1_000_000:
        message.uploads.add(create_purchase=broken)
    await over_and_over(1, lambda: streamed(stub, message), 0.5)


@attack
async def control_totals_of_one_peer(stub: Any, url: str) -> None:
    """Two hundred expensive questions at once."""
    first, last = date_pb2.Date(year=2026, month=1, day=1), date_pb2.Date(year=2026, month=1, day=31)
    request = ListControlTotalsRequest(first_date=first, last_date=last)
    await over_and_over(200, lambda: stub.ListControlTotals(request, timeout=PATIENCE_S), 1.0)


@attack
async def one_refused_key(stub: Any, url: str) -> None:
    """A thousand tries at once of one sale that is refused."""
    request = sale()
    request.purchase.customer_id = str(uuid.uuid4())
    await over_and_over(1_000, lambda: stub.CreatePurchase(request, timeout=PATIENCE_S), 2.0)


@attack
async def flooding_till(stub: Any, url: str) -> None:
    """A till with a certificate makes three times as many calls as a caller may, CALLER_CALLS_PER_S."""

    def again() -> Awaitable[Any]:
        request = sale()
        request.purchase.branch_id, request.purchase.pos_id = certificates.BRANCH, certificates.ATTACKER
        answered: Awaitable[Any] = stub.CreatePurchase(request, timeout=PATIENCE_S)
        return answered

    await over_and_over(100, again)


def copy(request: CreatePurchaseRequest) -> CreatePurchaseRequest:
    twin = CreatePurchaseRequest()
    twin.CopyFrom(request)
    twin.idempotency_key, twin.purchase.receipt_id = str(uuid.uuid4()), sale().purchase.receipt_id
    return twin


def give_way() -> None:
    """Whoever attacks has machines of its own. Here it has what the others leave of the two cores, so that what is
    measured is the service, and not who of us gets a processor."""
    os.nice(19)
    with suppress(OSError):  # where the kernel shares the processors out among sessions first
        Path("/proc/self/autogroup").write_text("19")


async def main(name: str, address: str, url: str) -> None:
    give_way()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with certificates.channel(address, certificates.ATTACKER) as channel:
        attacking = asyncio.ensure_future(ATTACKS[name](PurchasesServiceStub(channel), url))  # type: ignore[arg-type, unused-ignore]
        await asyncio.wait({attacking, asyncio.ensure_future(stop.wait())}, return_when=asyncio.FIRST_COMPLETED)
        if attacking.done():
            attacking.result()
        attacking.cancel()
        await asyncio.gather(attacking, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
