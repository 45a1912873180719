"""What clients in any language and tools rely on: reflection, and that every refusal of ours is a rich one."""

from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from grpc_reflection.v1alpha import reflection_pb2 as pb

import purchases_svc.__main__
import purchases_svc.settings
from chassis import grpc_server
from purchases_svc.messages import SALE_BYTES_MAX
from purchases_svc.server import UPLOAD_BYTES_MAX
from retail.analytics.v1.analytics_service_pb2 import ListProductSalesRequest
from retail.analytics.v1.quarantine_service_pb2 import RedriveEventsRequest
from retail.purchases.v1.customers_service_pb2 import GetCustomerRequest
from retail.purchases.v1.customers_service_pb2_grpc import CustomersServiceStub
from retail.purchases.v1.purchases_service_pb2 import UploadPurchasesRequest
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from retail.relay.v1.outbox_service_pb2 import RequeueEventsRequest
from tests.integration.conftest import free_address, running
from tests.integration.sales import Refusal, refusal, sale

SERVICE = "retail.purchases.v1.PurchasesService"
REFLECTION = ["grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"]


async def reflected(channel: grpc.aio.Channel, name: str, request: pb.ServerReflectionRequest) -> Any:
    """The answer to a request of reflection, of which both versions have the same messages."""
    method = channel.stream_stream(
        f"/{name}/ServerReflectionInfo",
        request_serializer=pb.ServerReflectionRequest.SerializeToString,
        response_deserializer=pb.ServerReflectionResponse.FromString,
    )
    return await anext(aiter(method(iter([request]), timeout=10)))


@pytest.mark.parametrize("name", REFLECTION)
async def test_reflection_finds_methods(purchases_channel: grpc.aio.Channel, name: str) -> None:
    """By v1 and v1alpha alike: services, their methods, and messages lead to their file; what is not there, to none."""
    for symbol in (SERVICE, f"{SERVICE}.CreatePurchase", "retail.purchases.v1.Purchase", REFLECTION[0], REFLECTION[1]):
        reply = await reflected(purchases_channel, name, pb.ServerReflectionRequest(file_containing_symbol=symbol))
        files = map(descriptor_pb2.FileDescriptorProto.FromString, reply.file_descriptor_response.file_descriptor_proto)
        assert symbol.rpartition(".v1")[0] in " ".join(file.package for file in files)
    for symbol in (f"{SERVICE}.Create", f"{SERVICE}.", "retail.Nothing", "CreatePurchase", ""):
        reply = await reflected(purchases_channel, name, pb.ServerReflectionRequest(file_containing_symbol=symbol))
        assert reply.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


@pytest.mark.parametrize("name", REFLECTION)
async def test_reflection_describes_every_service_that_it_lists(purchases_channel: grpc.aio.Channel, name: str) -> None:
    """A tool that lists the services asks for the description of each."""
    reply = await reflected(purchases_channel, name, pb.ServerReflectionRequest(list_services=""))
    services = {service.name for service in reply.list_services_response.service}
    assert {SERVICE, "retail.purchases.v1.CustomersService", "grpc.health.v1.Health", *REFLECTION} == services
    for service in services:
        reply = await reflected(purchases_channel, name, pb.ServerReflectionRequest(file_containing_symbol=service))
        assert reply.HasField("file_descriptor_response"), service


async def test_reflection_tells_who_may_call_a_method(purchases_channel: grpc.aio.Channel) -> None:
    """As `grpcurl describe` shows it: the rule is read with nothing but what the server sends."""
    known, wanted = descriptor_pool.DescriptorPool(), {f"{SERVICE}.CreatePurchase", "retail.access.v1.rule"}
    files: dict[str, descriptor_pb2.FileDescriptorProto] = {}
    for symbol in wanted:
        reply = await reflected(
            purchases_channel, REFLECTION[0], pb.ServerReflectionRequest(file_containing_symbol=symbol)
        )
        for raw in reply.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(raw)
            files[file.name] = file

    def add(name: str) -> None:
        for dependency in files[name].dependency:
            add(dependency)
        known.Add(files[name])

    add("retail/purchases/v1/purchases_service.proto")
    method = known.FindServiceByName(SERVICE).methods_by_name["CreatePurchase"]
    classes = message_factory.GetMessageClassesForFiles(["google/protobuf/descriptor.proto"], known)
    options = classes["google.protobuf.MethodOptions"].FromString(method.GetOptions().SerializeToString())
    extensions: Any = options.Extensions
    rule = extensions[known.FindExtensionByName("retail.access.v1.rule")]
    assert text_format.MessageToString(rule, as_one_line=True) == "roles: ROLE_TILL binding: BINDING_NAMES_OWN_TILL"


async def test_reflection_can_be_off(purchases_db: str) -> None:
    config = purchases_svc.settings.ServeSettings(
        database_url=purchases_db, listen=free_address(), metrics_listen="127.0.0.1:0", reflection=False
    )
    async with running(lambda stop: purchases_svc.__main__.serve(config, stop), config.listen) as channel:
        for name in REFLECTION:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await reflected(channel, name, pb.ServerReflectionRequest(list_services=""))
            assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_unknown_method_is_refused_with_a_reason(purchases_channel: grpc.aio.Channel) -> None:
    """Of a known service or not, unary or streaming: UNIMPLEMENTED, an ErrorInfo, and the method's name."""
    for method in (f"/{SERVICE}/DeletePurchase", "/retail.sales.v9.SalesService/Sell", f"/{SERVICE}/{'x' * 3_000}"):
        unary: Any = purchases_channel.unary_unary(method)
        refused = await refusal(unary(b"", timeout=10))
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNIMPLEMENTED, "UNKNOWN_METHOD")
        assert (refused.info.domain, refused.info.metadata["method"]) == ("purchases.retail.example", method[:200])
        streaming: Any = purchases_channel.stream_stream(method)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(streaming(iter([b""]), timeout=10)))
        assert Refusal(caught.value).reason == "UNKNOWN_METHOD"


async def test_message_that_is_too_large_is_refused_for_good(purchases_channel: grpc.aio.Channel) -> None:
    """Each service has its limits; beyond them, unary or in a stream, the code is one that no client tries again."""
    tills: Any = PurchasesServiceStub(purchases_channel)
    customers: Any = CustomersServiceStub(purchases_channel)
    for limit in (SALE_BYTES_MAX, 3 * UPLOAD_BYTES_MAX):
        refused = await refusal(tills.CreatePurchase(sale(receipt_id="x" * limit), timeout=10))
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MESSAGE_TOO_LARGE")
        assert refused.info.metadata["bytes_max"] == "131072"
        assert "131,072" in refused.status.message
    for limit in (SALE_BYTES_MAX, UPLOAD_BYTES_MAX):  # of a sale; of the message that it is in
        upload = UploadPurchasesRequest()
        upload.uploads.add(create_purchase=sale(receipt_id="x" * limit))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(tills.UploadPurchases(iter([upload]), timeout=10)))
        found = Refusal(caught.value)
        assert (found.reason, found.info.metadata["bytes_max"]) == ("MESSAGE_TOO_LARGE", str(limit))

    largest = GetCustomerRequest(customer_id="x" * (grpc_server.MESSAGE_BYTES_MAX - 4))
    assert largest.ByteSize() == grpc_server.MESSAGE_BYTES_MAX
    assert (await refusal(customers.GetCustomer(largest, timeout=10))).reason == "INVALID_REQUEST"
    largest.customer_id += "x"
    assert (await refusal(customers.GetCustomer(largest, timeout=10))).reason == "MESSAGE_TOO_LARGE"


def test_largest_legal_requests_fit() -> None:
    """What the contracts allow, at its largest, fits the limit of services that set none."""
    uuids = ["4f7c2d1e-9b3a-4c58-8e6f-0a1b2c3d4e5f"] * 1_000
    filters = ListProductSalesRequest(
        branch_ids=[2**31 - 1] * 1_000,
        product_ids=[2**63 - 1] * 1_000,
        page_token="x" * 500,
        consistency_token=uuids[0],
    )
    for largest in (RedriveEventsRequest(quarantine_ids=uuids), RequeueEventsRequest(event_ids=uuids), filters):
        assert largest.ByteSize() <= grpc_server.MESSAGE_BYTES_MAX
