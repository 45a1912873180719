"""Server reflection as its specification has it, for tools that learn the contracts from a running server.

The package of gRPC for Python lacks two things: it answers by the protocol's old name only, v1alpha, whose messages are
the same on the wire; and it does not find a method, `<package>.<service>.<method>`, though the protocol names methods.
"""

from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from google.protobuf.descriptor import FileDescriptor
from grpc_reflection.v1alpha import reflection, reflection_pb2

V1ALPHA = reflection.SERVICE_NAME
V1 = "grpc.reflection.v1.ServerReflection"


class _Pool:
    """The default pool, in which methods are found, too."""

    def __init__(self) -> None:
        self._pool = descriptor_pool.Default()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:  # noqa: N802 -- the pool's own name
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service, _, method = symbol.rpartition(".")
            found = self._pool.FindServiceByName(service)
            if method not in found.methods_by_name:
                raise
            return found.file


def add_to_server(services: list[str], server: Any) -> None:
    """Answer for these services and for reflection itself, by both names."""
    servicer = reflection.aio.ReflectionServicer([*services, V1, V1ALPHA], pool=_Pool())
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for name in (V1, V1ALPHA):
        server.add_registered_method_handlers(name, {"ServerReflectionInfo": handler})


def _describe_v1() -> None:
    """A tool that lists services asks for the description of each."""
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    v1 = text_format.Parse(str(file).replace("v1alpha", "v1"), descriptor_pb2.FileDescriptorProto())
    descriptor_pool.Default().AddSerializedFile(v1.SerializeToString())


_describe_v1()
