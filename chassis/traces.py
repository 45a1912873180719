"""Traces: where a sale spends its time, over all processes. The only file that knows OpenTelemetry.

A trace is of one sale, or of one call of another kind. What is done for many sales at once, a flush, say, is a span in
the trace of each of them that is recorded, and those of one batch are linked: so every trace is whole by itself. It is
decided before a span is made whether a sale is recorded, and what is not costs next to nothing.

Off, unless the standard variables name an exporter: then `tracer` is None, and OpenTelemetry is not even imported. A
till uses this too, so it imports nothing else of ours but settings.
"""

import random
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from chassis.settings import SettingsError, choice, collector_url, number, setting, text

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import SpanContext, Tracer

TRACEPARENT = "traceparent"  # W3C's name, in metadata of calls and in headers of messages
ENDPOINT = "http://127.0.0.1:4317"  # of a collector, by the standard
LINKS_MAX = 100  # of the first span of a batch; OpenTelemetry cuts them at 128
SHUTDOWN_S = 3.0  # for what is not exported yet when a process stops
# Of a server; with others it is the caller who did something wrong.
FAULTS = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")

_SCOPE = "retail-backbone"
_PARENT_BASED = "parentbased_"
_SAMPLERS = ("always_on", "always_off", "traceidratio")

Kind = Literal["SERVER", "CLIENT", "PRODUCER", "CONSUMER"]
Attributes = Mapping[str, str | int | bool]


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """OpenTelemetry's own variables. It reads more of them by itself: of queues, limits and exporters."""

    traces_exporter: str = setting(
        "OTEL_TRACES_EXPORTER",
        choice("none", "otlp", "console"),
        "name",
        "where traces go: nowhere, to a collector, to standard output; not set: to a collector if there is an endpoint",
        default="",
    )
    traces_endpoint: str = setting(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        collector_url,
        "URL",
        f"of the collector; {ENDPOINT} if it is not set",
        default="",
    )
    traces_protocol: str = setting(
        "OTEL_EXPORTER_OTLP_PROTOCOL", choice("grpc"), "name", "that the collector takes", default="grpc"
    )
    traces_sampler: str = setting(
        "OTEL_TRACES_SAMPLER",
        choice(*(f"{prefix}{name}" for prefix in (_PARENT_BASED, "") for name in _SAMPLERS)),
        "name",
        "what is traced: all, nothing, or a part; parentbased_…: but what a caller traces, or does not, as the caller",
        default=f"{_PARENT_BASED}always_on",
    )
    traces_part: float = setting(
        "OTEL_TRACES_SAMPLER_ARG", number(0, 1), "0 to 1", "the part, for …traceidratio: 0.01 is 1 %", default=1.0
    )
    traces_service: str = setting(
        "OTEL_SERVICE_NAME", text, "name", "of this process in traces; if it is not set, the command's", default=""
    )
    traces_disabled: str = setting(
        "OTEL_SDK_DISABLED", choice("true", "false"), "true or false", "true: no traces at all", default="false"
    )


class Span:
    """A span that is recorded. Whatever is logged within its block has its ids."""

    __slots__ = ("_token", "otel")

    def __init__(self, otel: "OtelSpan") -> None:
        self.otel = otel

    @property
    def ids(self) -> dict[str, str]:
        """For lines of the log, and exemplars of metrics."""
        context = self.otel.get_span_context()
        return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}

    @property
    def traceparent(self) -> str:
        """What another process needs for a child of this span."""
        context = self.otel.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"

    def note(self, attributes: Attributes) -> None:
        """Nothing secret or personal."""
        self.otel.set_attributes(attributes)

    def tell(self, event: str, attributes: Attributes) -> None:
        """Something happened, at this moment. Nothing secret or personal."""
        self.otel.add_event(event, attributes)

    def answered(self, code: str, reason: str = "") -> None:
        """By which status of gRPC the call ended, and why, if it was refused."""
        self.otel.set_attribute("rpc.response.status_code", code)
        if code in FAULTS:
            self.fail(reason or code)
        elif reason:
            self.otel.set_attribute("error.type", reason)

    def fail(self, kind: str) -> None:
        """It did not come to what it was for; `kind` is one of few names, and no text, which might quote data."""
        from opentelemetry.trace import StatusCode

        self.otel.set_attribute("error.type", kind)
        self.otel.set_status(StatusCode.ERROR)

    def end(self) -> None:
        self.otel.end()

    def __enter__(self) -> Self:
        self._token = _current.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _current.reset(self._token)
        if kind:
            self.fail(kind.__qualname__)
        self.end()


class Together:
    """What is done for many sales at once: a span in the trace of each that is recorded, by its place among them."""

    __slots__ = ("_token", "spans")

    def __init__(self, spans: Mapping[int, Span]) -> None:
        self.spans = spans

    @property
    def traceparents(self) -> dict[int, str]:
        return {place: span.traceparent for place, span in self.spans.items()}

    @property
    def exemplar(self) -> dict[str, str] | None:
        """For what is measured of it."""
        return next(iter(self.spans.values())).ids if self.spans else None

    def fail(self, kind: str) -> None:
        for span in self.spans.values():
            span.fail(kind)

    def __enter__(self) -> Self:
        if self.spans:
            self._token: Token[Span | None] = _current.set(next(iter(self.spans.values())))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.spans:
            _current.reset(self._token)
            if kind:
                self.fail(kind.__qualname__)
            for span in self.spans.values():
                span.end()


NOBODY = Together({})  # is recorded

tracer: "Tracer | None" = None  # None: off
_keeps_new: Callable[[], bool]  # whether a trace is begun
_keeps_old: Callable[["SpanContext"], bool]  # whether one that a caller has begun is continued
_current: ContextVar[Span | None] = ContextVar("span", default=None)


def current() -> Span | None:
    """The span within which this runs, if it is recorded."""
    return _current.get()


def set_current(span: Span) -> None:
    """As by its block, for the rest of this task."""
    _current.set(span)


def of_call(method: str, context: Any) -> Span | None:
    """The server's span of a call, if it is recorded; `method` is package.Service/Method, `context` gRPC's."""
    if tracer is None:
        return None
    return of_request(
        method, next((str(value) for name, value in context.invocation_metadata() if name == TRACEPARENT), "")
    )


def of_request(method: str, traceparent: str) -> Span | None:
    """The server's span of what came by `method`, if it is recorded; `traceparent` is the caller's, or nothing."""
    if tracer is None:
        return None
    before = _remote(traceparent) if traceparent else None
    if not (_keeps_old(before) if before else _keeps_new()):
        return None
    return _start(method, "SERVER", _within(before), _rpc(method))


def calling(request: Any) -> Span | None:
    """The caller's span of a call with that request, a message of one of our contracts, if it is recorded."""
    if tracer is None:
        return None
    from opentelemetry.trace import get_current_span

    before = get_current_span().get_span_context()  # of the program, which may be none of ours
    if not (before.trace_flags.sampled if before.is_valid else _keeps_new()):
        return None
    method = _method_of(request.DESCRIPTOR)
    return _start(method, "CLIENT", None, _rpc(method))


def together(
    name: str,
    kind: Kind,
    parents: Iterable[Span | str | None],
    attributes: Attributes,
    each: Callable[[int], Attributes] = lambda _: {},
) -> Together:
    """A span for each that is recorded: children of `parents`, which are spans of this process or what another one has
    sent. `each` tells what is a single one's, by its place. All are linked with the first.
    """
    if tracer is None:
        return NOBODY
    from opentelemetry.trace import Link

    spans: dict[int, Span] = {}
    first: Span | None = None
    for place, parent in enumerate(parents):
        before = parent.otel.get_span_context() if isinstance(parent, Span) else _remote(parent) if parent else None
        if before is None or not (isinstance(parent, Span) or _keeps_old(before)):
            continue
        links = [Link(first.otel.get_span_context())] if first else []
        if (span := _start(name, kind, _within(before), {**attributes, **each(place)}, links)) is None:
            continue
        if first and len(spans) <= LINKS_MAX:
            first.otel.add_link(span.otel.get_span_context())
        spans[place] = span
        first = first or span
    return Together(spans) if spans else NOBODY


def _start(
    name: str, kind: Kind, context: "Context | None", attributes: Attributes, links: "list[Any] | None" = None
) -> Span | None:
    from opentelemetry.trace import SpanKind

    assert tracer is not None
    span = tracer.start_span(name, context, SpanKind[kind], attributes, links)
    return Span(span) if span.is_recording() else None  # the tracer may be a program's own


def _within(before: "SpanContext | None") -> "Context":
    from opentelemetry import context, trace

    nothing = context.Context()
    return trace.set_span_in_context(trace.NonRecordingSpan(before), nothing) if before else nothing


def _remote(traceparent: str) -> "SpanContext | None":
    """What a caller says of its span; None if it makes no sense."""
    from opentelemetry import context, trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    read = TraceContextTextMapPropagator().extract({TRACEPARENT: traceparent}, context.Context())
    said = trace.get_current_span(read).get_span_context()
    return said if said.is_valid else None


def _rpc(method: str) -> Attributes:
    return {"rpc.system.name": "grpc", "rpc.method": method}


@lru_cache(100)
def _method_of(request: Any) -> str:
    """Each method has a request type of its own; `request` is its descriptor."""
    for service in request.file.services_by_name.values():
        for method in service.methods:
            if method.input_type.full_name == request.full_name:
                return f"{service.full_name}/{method.name}"
    return str(request.full_name)


@contextmanager
def exported(config: TraceSettings, service: str) -> Iterator[None]:
    """Have traces of this process exported while the block lasts, if it is asked for; `service` is its name.

    Raises:
        SettingsError: what exports them is not installed.
    """
    where = config.traces_exporter or ("otlp" if config.traces_endpoint else "none")
    if where == "none" or config.traces_disabled == "true":
        yield
        return
    try:
        provider = _provider(where, config, service)
    except ImportError as error:
        raise SettingsError([f"traces need what the extra otlp installs; missing: {error.name}"]) from error
    switch_on(provider.get_tracer(_SCOPE), config)
    try:
        yield
    finally:
        switch_off()
        ending = threading.Thread(target=provider.shutdown, daemon=True)  # a collector that is away may take its time
        ending.start()
        ending.join(SHUTDOWN_S)


def _provider(where: str, config: TraceSettings, service: str) -> Any:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON

    exporter: SpanExporter
    if where == "console":
        exporter = ConsoleSpanExporter()
    else:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        no_proxy: Any = (("grpc.enable_http_proxy", 0),)  # which is meant for the web, not for the chain's own network
        exporter = OTLPSpanExporter(config.traces_endpoint or ENDPOINT, channel_options=no_proxy)
    ours = {
        "service.name": service,
        "service.namespace": "retail",
        "service.version": metadata.version("retail-backbone"),
        "service.instance.id": str(uuid.uuid4()),
    }
    resource = Resource(ours).merge(OTELResourceDetector().detect())  # which has what the environment says
    # What is asked of it is to be recorded: that is decided here, at a tenth of what its own samplers cost.
    provider = TracerProvider(ALWAYS_ON, resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def switch_on(recording: "Tracer", config: TraceSettings) -> None:
    """Trace by that tracer, which records all that it is asked for."""
    global tracer, _keeps_new, _keeps_old
    sampler = config.traces_sampler.removeprefix(_PARENT_BASED)
    part = {"always_on": 1.0, "always_off": 0.0}.get(sampler, config.traces_part)
    _keeps_new = lambda: random.random() < part  # noqa: E731
    if sampler == config.traces_sampler:
        _keeps_old = lambda before: before.trace_id % 2**64 < part * 2**64  # noqa: E731 # as OpenTelemetry decides it
    else:
        _keeps_old = lambda before: before.trace_flags.sampled  # noqa: E731
    tracer = recording


def switch_off() -> None:
    global tracer
    tracer = None


def adopt() -> None:
    """Trace with OpenTelemetry as the program has set it up that uses a library of ours, if it has."""
    api = sys.modules.get("opentelemetry.trace")
    if tracer is None and api and not isinstance(provider := api.get_tracer_provider(), api.ProxyTracerProvider):
        switch_on(provider.get_tracer(_SCOPE), TraceSettings())
