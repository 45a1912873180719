"""What all our servers do with the calls of one connection, whatever the service."""

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any

import grpc

from chassis import grpc_server
from chassis.errors import InvalidRequest, Violation
from chassis.grpc_guard import HANDLED
from retail.purchases.v1.purchases_service_pb2 import (
    CreatePurchaseRequest,
    CreatePurchaseResponse,
    GetPurchaseRequest,
    ListPurchasesRequest,
)
from retail.purchases.v1.purchases_service_pb2_grpc import (
    PurchasesServiceServicer,
    PurchasesServiceStub,
    add_PurchasesServiceServicer_to_server,
)
from tests.conftest import eventually
from tests.integration.conftest import free_address

NAME = "retail.purchases.v1.PurchasesService"
AT_ONCE = 20


class Servicer(PurchasesServiceServicer):
    def __init__(self) -> None:
        self.at_once = self.most = self.listed = 0

    async def CreatePurchase(self, request: CreatePurchaseRequest, context: Any) -> CreatePurchaseResponse:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await asyncio.sleep(0.005)
        finally:
            self.at_once -= 1
        return CreatePurchaseResponse()

    async def ListPurchases(self, request: Any, context: Any) -> Any:
        self.listed += 1
        await asyncio.Event().wait()

    async def GetPurchase(self, request: Any, context: Any) -> Any:
        raise InvalidRequest([Violation("purchase_id", "is wrong", "WRONG")])


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Any, Servicer]]:
    servicer = Servicer()  # type: ignore[abstract]  # no more methods are called
    host, address = grpc_server.Server("test.example"), free_address()
    services = [grpc_server.Service(add_PurchasesServiceServicer_to_server, servicer, NAME)]
    async with (
        host.listening(address, services, calls_of_connection_max=AT_ONCE),
        grpc.aio.insecure_channel(address) as channel,
    ):
        yield PurchasesServiceStub(channel), servicer  # type: ignore[arg-type, unused-ignore]


async def outcome(call: Any) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


async def test_calls_of_a_connection_wait_at_the_client() -> None:
    """gRPC takes calls in as they come: who sends a thousand at once must not be taken in before all others."""
    async with serving() as (stub, servicer):
        outcomes = Counter(
            await asyncio.gather(*(outcome(stub.CreatePurchase(CreatePurchaseRequest())) for _ in range(10 * AT_ONCE)))
        )
    assert outcomes == {"OK": 10 * AT_ONCE}
    assert servicer.most <= AT_ONCE


async def test_who_gives_up_many_calls_is_served_on() -> None:
    """The server still counts what was given up when the next calls come: it must not refuse them for that."""
    async with serving() as (stub, _):
        outcomes: Counter[str] = Counter()
        for _ in range(20):
            given_up = [stub.CreatePurchase(CreatePurchaseRequest()) for _ in range(3 * AT_ONCE)]
            await asyncio.sleep(0.003)
            for call in given_up:
                call.cancel()
            calls = (outcome(stub.CreatePurchase(CreatePurchaseRequest())) for _ in range(3 * AT_ONCE))
            outcomes += Counter(await asyncio.gather(*calls))
    assert outcomes == {"OK": 20 * 3 * AT_ONCE}


async def test_calls_that_nobody_waits_for_any_more_are_counted() -> None:
    """Tills give up before a database that is away does: an alarm would hear nothing of their calls."""

    def counted(code: str) -> float:
        return float(HANDLED.labels("unary", NAME, "ListPurchases", code)._value.get())

    async with serving() as (stub, servicer):
        late, cancelled = counted("DEADLINE_EXCEEDED"), counted("CANCELLED")
        assert await outcome(stub.ListPurchases(ListPurchasesRequest(), timeout=0.3)) == "DEADLINE_EXCEEDED"
        call = stub.ListPurchases(ListPurchasesRequest(), timeout=30)

        async def there() -> bool:
            return servicer.listed == 2

        await eventually(there, "the second call has come")
        call.cancel()

        async def both() -> bool:
            return (counted("DEADLINE_EXCEEDED"), counted("CANCELLED")) == (late + 1, cancelled + 1)

        await eventually(both, "both calls are counted")


async def test_a_refused_call_leaves_nothing_to_collect() -> None:
    """Rings of errors and frames would be taken apart by collections, during which everybody waits."""
    async with serving() as (stub, _):
        assert await outcome(stub.GetPurchase(GetPurchaseRequest())) == "INVALID_ARGUMENT"
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for _ in range(20):
                await outcome(stub.GetPurchase(GetPurchaseRequest()))
            gc.collect()
            frames = Counter(each.f_code.co_name for each in gc.garbage if isinstance(each, FrameType))
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    assert not {name: number for name, number in frames.items() if number >= 20}, frames
