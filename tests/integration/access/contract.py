"""Every method there is, by the contract, and a request for it that is about one till of one branch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from chassis import reflection
from retail.access.v1 import access_pb2
from retail.analytics.v1 import analytics_service_pb2, audit_service_pb2, quarantine_service_pb2
from retail.purchases.v1 import customers_service_pb2, purchases_service_pb2
from retail.relay.v1 import outbox_service_pb2

BRANCH, POS = 1, "POS-3"
DEPTH_MAX = 6
TIMEOUT_S = 60.0

# Which process serves what. A file of the contract that is missing here is missing in no test: see `test_matrix`.
SERVED = {
    "purchases": (purchases_service_pb2, customers_service_pb2),
    "relay": (outbox_service_pb2,),
    "consumer": (audit_service_pb2, quarantine_service_pb2),
    "analytics": (analytics_service_pb2,),
}


@dataclass(frozen=True)
class Method:
    """One that a process serves; the rule is None for those that gRPC brings."""

    process: str
    descriptor: MethodDescriptor
    path: str
    roles: frozenset[str]
    binding: int
    services: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.process} {self.path}"

    def request(self, branch_id: int = BRANCH, pos_id: str = POS) -> Any:
        request = message_factory.GetMessageClass(self.descriptor.input_type)()
        _fill(request, branch_id, pos_id)
        return request

    def call(self, channel: grpc.Channel, *requests: Any, metadata: Any = ()) -> "Outcome":
        """The first answer, or the refusal. Of a stream that goes on no more is read."""
        takes, gives = self.descriptor.client_streaming, self.descriptor.server_streaming
        kind = f"{'stream' if takes else 'unary'}_{'stream' if gives else 'unary'}"
        call = getattr(channel, kind)(
            self.path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(self.descriptor.output_type).FromString,
        )
        try:
            reply = call(iter(requests) if takes else requests[0], timeout=TIMEOUT_S, metadata=metadata)
            if gives:
                next(reply, None)
                reply.cancel()
        except grpc.RpcError as error:
            return Outcome.of(error)
        return Outcome(grpc.StatusCode.OK)


@dataclass(frozen=True)
class Outcome:
    """What came of a call; the reason is empty when no server of ours gave the answer."""

    code: grpc.StatusCode
    text: str = ""
    reason: str = ""
    details: int = 0

    @classmethod
    def of(cls, error: Any) -> "Outcome":
        trailers = dict(error.trailing_metadata() or ())
        status = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))
        info = error_details_pb2.ErrorInfo()
        if status.details:
            status.details[0].Unpack(info)
        return cls(error.code(), error.details() or "", info.reason, len(status.details))


def methods() -> list[Method]:
    """All of them, health and reflection of every process included."""
    found = []
    for process, files in SERVED.items():
        for file in files:
            for service in file.DESCRIPTOR.services_by_name.values():
                found += [_ours(process, method) for method in service.methods]
        everybody = frozenset({"till", "manager", "reader", "operator", "service"})
        health = health_pb2.DESCRIPTOR.services_by_name["Health"]
        found += [_others(process, method, everybody) for method in health.methods]
        for name in (reflection.V1, reflection.V1ALPHA):
            (method,) = reflection_pb2.DESCRIPTOR.pool.FindServiceByName(name).methods
            found.append(_others(process, method, frozenset({"operator"})))
    return found


def _ours(process: str, method: MethodDescriptor) -> Method:
    options = descriptor_pb2.MethodOptions.FromString(method.GetOptions().SerializeToString())
    rule = options.Extensions[access_pb2.rule]
    roles = frozenset(access_pb2.Role.Name(role)[len("ROLE_") :].lower() for role in rule.roles)
    return Method(process, method, _path(method), roles, rule.binding, frozenset(rule.services))


def _others(process: str, method: Any, roles: frozenset[str]) -> Method:
    return Method(process, method, _path(method), roles, access_pb2.BINDING_ANY)


def _path(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def _fill(message: Any, branch_id: int, pos_id: str, depth: int = 0) -> None:
    """Name the branch and the till wherever a message can name one; lists get one element."""
    for name, value in (("branch_id", branch_id), ("pos_id", pos_id)):
        if name in message.DESCRIPTOR.fields_by_name:
            setattr(message, name, value)
    if "branch_ids" in message.DESCRIPTOR.fields_by_name:
        message.branch_ids.append(branch_id)
    for field in _messages(message.DESCRIPTOR):
        if depth < DEPTH_MAX and names_a_branch(field.message_type):
            inner = getattr(message, field.name)
            _fill(inner.add() if field.is_repeated else inner, branch_id, pos_id, depth + 1)


def names_a_branch(kind: Descriptor, depth: int = 0) -> bool:
    names = {"branch_id", "branch_ids", "pos_id"}
    return depth < DEPTH_MAX and (
        not names.isdisjoint(kind.fields_by_name)
        or any(names_a_branch(field.message_type, depth + 1) for field in _messages(kind))
    )


def _messages(kind: Descriptor) -> Iterator[Any]:
    return (field for field in kind.fields if field.message_type is not None)
