"""A collector of traces for one developer: takes them by OTLP, and prints each as a tree when nothing more comes to it.

`python -m deploy.local.collector` listens where OpenTelemetry sends traces unless it is told otherwise, 127.0.0.1:4317.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Sent

ADDRESS = "127.0.0.1:4317"
QUIET_S = 6.0  # processes send what they have each five seconds
SHOWN = {  # attributes in a tree, and their short names
    "rpc.response.status_code": "",
    "error.type": "",
    "db.operation.batch.size": "of ",
    "messaging.batch.message_count": "of ",
}


@dataclass(frozen=True)
class Span:
    service: str
    name: str
    kind: str
    id: str
    parent_id: str
    began_ns: int
    ended_ns: int
    attributes: dict[str, str]
    links: list[str]


@dataclass
class Trace:
    id: str
    spans: list[Span] = field(default_factory=list)
    heard_at: float = 0.0


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._traces: dict[str, Trace] = {}

    def Export(self, request: pb.ExportTraceServiceRequest, context: object) -> pb.ExportTraceServiceResponse:  # noqa: N802
        with self._lock:
            for resource in request.resource_spans:
                service = _values(resource.resource.attributes).get("service.name", "")
                for sent in (span for scope in resource.scope_spans for span in scope.spans):
                    trace = self._traces.setdefault(sent.trace_id.hex(), Trace(sent.trace_id.hex()))
                    trace.spans.append(_span(service, sent))
                    trace.heard_at = time.monotonic()
        return pb.ExportTraceServiceResponse()

    def traces(self) -> list[Trace]:
        """What has come so far."""
        with self._lock:
            return [Trace(trace.id, list(trace.spans), trace.heard_at) for trace in self._traces.values()]

    def forget(self, trace: Trace) -> None:
        with self._lock:
            self._traces.pop(trace.id, None)


def _span(service: str, sent: Sent) -> Span:
    return Span(
        service,
        sent.name,
        Sent.SpanKind.Name(sent.kind).removeprefix("SPAN_KIND_"),
        sent.span_id.hex(),
        sent.parent_span_id.hex(),
        sent.start_time_unix_nano,
        sent.end_time_unix_nano,
        _values(sent.attributes),
        [link.span_id.hex() for link in sent.links],
    )


def _values(attributes: Sequence[KeyValue]) -> dict[str, str]:
    return {each.key: str(getattr(each.value, each.value.WhichOneof("value") or "string_value")) for each in attributes}


def tree(trace: Trace) -> str:
    """A line a span: when it began and how long it took, in milliseconds; which process; what, below its parent."""
    ids = {span.id for span in trace.spans}
    spans = sorted(trace.spans, key=lambda span: span.began_ns)
    first_ns = spans[0].began_ns
    lines = [f"trace {trace.id}"]

    def show(span: Span, depth: int) -> None:
        said = ", ".join(f"{short}{span.attributes[name]}" for name, short in SHOWN.items() if name in span.attributes)
        at_ms, took_ms = ((ns / 1e6) for ns in (span.began_ns - first_ns, span.ended_ns - span.began_ns))
        what = f"{'  ' * depth}{span.name}  {span.kind}{f' ({said})' if said else ''}"
        lines.append(f"{at_ms:8.1f} {took_ms:+8.1f} ms  {span.service:12}{what}")
        for child in spans:
            if child.parent_id == span.id:
                show(child, depth + 1)

    for span in spans:
        if span.parent_id not in ids:
            show(span, 0)
    return "\n".join(lines)


@contextmanager
def collecting(address: str = ADDRESS) -> Iterator[Collector]:
    """Take traces while the block lasts.

    Raises:
        RuntimeError: the address is taken.
    """
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(address)
    server.start()
    try:
        yield collector
    finally:
        server.stop(0).wait()


def show_all(collector: Collector, say: Callable[[str], object]) -> None:
    """Say each trace, once nothing has come to it for a while; for ever."""
    while True:
        time.sleep(0.5)
        for trace in collector.traces():
            if time.monotonic() - trace.heard_at > QUIET_S:
                say(tree(trace) + "\n")
                collector.forget(trace)


def main() -> int:
    try:
        with collecting() as collector:
            print(f"Taking traces at {ADDRESS}; Ctrl-C ends it.", flush=True)
            show_all(collector, lambda text: print(text, flush=True))
    except RuntimeError:
        print(f"{ADDRESS} is taken: another collector listens there", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
