"""proto/service_config.json: every method has its policy, gRPC takes it, and it does what it says."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import resources
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool

import pos.calls
from chassis import grpc_client, grpc_server
from chassis.errors import MalformedMessage, ServiceError, ShuttingDown
from pos.errors import Unavailable
from retail.purchases.v1 import customers_service_pb2 as pb
from retail.purchases.v1 import customers_service_pb2_grpc as pb_grpc
from tests.conftest import eventually
from tests.contract.test_contracts import SERVICES
from tests.contract.test_error_reasons import RETRYABLE
from tests.integration.conftest import free_address

CONFIG = (resources.files("retail") / "service_config.json").read_text()
POLICIES = json.loads(CONFIG)["methodConfig"]
STREAMS = {"UploadPurchases", "ExportPurchases", "WatchDailySales", "ListCommittedEventIds"}


def policy(service: str, method: str) -> dict[str, Any]:
    """As gRPC looks it up: the method's own, or that of its service."""
    by_name: dict[Any, dict[str, Any]] = {
        (name["service"], name.get("method")): each for each in POLICIES for name in each["name"]
    }
    return by_name.get((service, method)) or by_name[service, None]


def test_every_method_has_its_policy() -> None:
    """Unary calls have a deadline and are repeated; streams, which may be long, have neither. All names exist."""
    for service in SERVICES:
        for method in descriptor_pool.Default().FindServiceByName(service).methods:
            found = policy(service, method.name)
            streams = method.client_streaming or method.server_streaming
            assert streams == (method.name in STREAMS)
            assert ("timeout" in found, "retryPolicy" in found) == (not streams, not streams), method.full_name
    names = [name for each in POLICIES for name in each["name"]]
    for name in names:
        methods = descriptor_pool.Default().FindServiceByName(name["service"]).methods_by_name
        assert "method" not in name or name["method"] in methods


def test_retries_are_for_passing_troubles_only() -> None:
    """Tried again is what the catalogue of errors says "Retry" of, but for a deadline: that is the whole call's."""
    for each in POLICIES:
        if retry := each.get("retryPolicy"):
            assert set(retry["retryableStatusCodes"]) == RETRYABLE - {"DEADLINE_EXCEEDED"}


class Customers:
    """Refuses with each of `refusals` in turn before it answers."""

    def __init__(self, *refusals: ServiceError) -> None:
        self._refusals = list(refusals)
        self.calls = 0

    async def GetCustomer(self, request: Any, context: Any) -> pb.GetCustomerResponse:  # noqa: N802
        self.calls += 1
        if self._refusals:
            raise self._refusals.pop(0)
        return pb.GetCustomerResponse()

    CreateCustomer = ListCustomers = ListNewCustomers = GetCustomer


@asynccontextmanager
async def serving(servicer: Customers, address: str) -> AsyncIterator[grpc_server.Server]:
    host = grpc_server.Server("purchases.retail.example")
    service = grpc_server.Service(
        pb_grpc.add_CustomersServiceServicer_to_server, servicer, "retail.purchases.v1.CustomersService"
    )
    async with host.listening(address, [service]):
        await host.set_serving(True)
        yield host


async def test_grpc_itself_retries_as_it_says() -> None:
    """A passing trouble is tried again, after the pause that the server asks for; a refusal for good is not."""
    servicer, address = Customers(*[ShuttingDown("busy") for _ in range(3)], MalformedMessage("no")), free_address()
    async with serving(servicer, address), grpc_client.connect(address, CONFIG) as channel:
        stub: Any = pb_grpc.CustomersServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetCustomer(pb.GetCustomerRequest())
        assert (caught.value.code(), servicer.calls) == (grpc.StatusCode.INVALID_ARGUMENT, 4)
        await stub.GetCustomer(pb.GetCustomerRequest())


async def test_calls_go_round_and_pass_by_a_server_that_is_not_well() -> None:
    """Every address gets its share; one whose health is NOT_SERVING gets none, though it is connected."""
    async with AsyncExitStack() as stack:
        servicers, addresses = [Customers(), Customers()], [free_address(), free_address()]
        hosts = [await stack.enter_async_context(serving(*each)) for each in zip(servicers, addresses, strict=True)]
        target = f"ipv4:///{','.join(addresses)}"
        channel = await stack.enter_async_context(grpc_client.connect(target, CONFIG))
        stub: Any = pb_grpc.CustomersServiceStub(channel)

        async def both_are_asked() -> bool:
            await stub.GetCustomer(pb.GetCustomerRequest())
            return all(servicer.calls for servicer in servicers)

        await eventually(both_are_asked, "both servers get calls")
        await hosts[0].set_serving(False)

        async def first_is_passed_by() -> bool:
            before = servicers[0].calls
            for _ in range(4):
                await stub.GetCustomer(pb.GetCustomerRequest())
            return servicers[0].calls == before

        await eventually(first_is_passed_by, "the first server gets none")


async def test_tills_take_the_same_file() -> None:
    """The till's client asks no server that is not well, either, and tells that nobody can be asked."""
    servicer, address = Customers(), free_address()
    async with serving(servicer, address) as host:
        with pos.calls.connect(address) as channel:
            stub: Any = pb_grpc.CustomersServiceStub(channel)
            call = pos.calls.Calls(total_timeout_s=0.5)
            await host.set_serving(False)
            with pytest.raises(Unavailable):
                await asyncio.to_thread(call, stub.GetCustomer, pb.GetCustomerRequest())
            assert servicer.calls == 0
