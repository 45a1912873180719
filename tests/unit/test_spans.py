"""What is traced, what that costs when nothing is, and who hears of it."""

import asyncio
import io
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from opentelemetry import trace as api
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from analytics_svc.ingest.messages import Message
from chassis import logs, traces
from chassis.settings import SettingsError, load
from chassis.traces import LINKS_MAX, TraceSettings
from purchases_svc.tasks import Tasks
from retail.purchases.v1.purchases_service_pb2 import CreatePurchaseRequest

METHOD = "retail.purchases.v1.PurchasesService/CreatePurchase"


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    traces.switch_on(provider.get_tracer("test"), TraceSettings())
    yield exporter
    traces.switch_off()


def test_off_nothing_is_begun() -> None:
    """Not even the library is imported: it is an extra."""
    assert traces.tracer is None
    assert traces.of_call(METHOD, None) is None
    assert traces.calling(CreatePurchaseRequest()) is None
    assert traces.together("batch", "CLIENT", iter(["00-1-1-01"]), {}) is traces.NOBODY
    with traces.NOBODY as none:
        assert (none.traceparents, none.exemplar, traces.current()) == ({}, None, None)


@pytest.mark.parametrize(
    ("sampler", "part", "begun"),
    [
        ("always_on", 0.0, 100),
        ("always_off", 1.0, 0),
        ("traceidratio", 1.0, 100),
        ("parentbased_traceidratio", 0.0, 0),
        ("parentbased_always_on", 0.0, 100),
    ],
)
def test_samplers_of_the_standard(exporter: InMemorySpanExporter, sampler: str, part: float, begun: int) -> None:
    assert traces.tracer
    traces.switch_on(traces.tracer, TraceSettings(traces_sampler=sampler, traces_part=part))
    assert sum(traces.of_request(METHOD, "") is not None for _ in range(100)) == begun


def test_links_of_a_large_batch_are_bounded(exporter: InMemorySpanExporter) -> None:
    """The first has links to some, each other one to the first."""
    sent = [f"00-{number:032x}-b7ad6b7169203331-01" for number in range(1, 501)]
    with traces.together("batch", "CLIENT", sent, {}) as batch:
        assert len(batch.spans) == 500
    first, *others = exporter.get_finished_spans()
    assert len(first.links) == LINKS_MAX
    assert {len(span.links) for span in others} == {1}


@pytest.mark.parametrize(
    "said", [None, 5, b"\xff", {"a": 1}, "nonsense", "0" * 100_000, f"00-{'0' * 32}-{'0' * 16}-01"]
)
def test_what_makes_no_sense_in_a_message_is_no_trace(exporter: InMemorySpanExporter, said: object) -> None:
    """Anybody who may publish can write anything there."""
    for headers in ({"traceparent": said}, {}, None):
        message = Message(b"", {"headers": headers})
        assert traces.together("process", "CONSUMER", [message.traceparent], {}) is traces.NOBODY


def test_a_block_that_fails_is_a_span_that_failed(exporter: InMemorySpanExporter) -> None:
    """It tells the kind of error, and not its text, which may quote data."""
    with (
        pytest.raises(ValueError, match="4711"),
        traces.together("batch", "CLIENT", ["00-" + "1" * 32 + "-1234567812345678-01"], {}),
    ):
        raise ValueError("receipt 4711")
    (span,) = exporter.get_finished_spans()
    assert (span.status.status_code.name, span.attributes and span.attributes["error.type"]) == ("ERROR", "ValueError")
    assert "4711" not in span.to_json()


def test_lines_of_the_log_have_the_ids(exporter: InMemorySpanExporter) -> None:
    said = io.StringIO()
    logs.configure("test", "INFO")
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(said), cache_logger_on_first_use=False)
    span = traces.of_request(METHOD, "")
    assert span
    log: Any = structlog.get_logger()
    with span:
        log.info("within")
    log.info("after")
    within, after = map(json.loads, said.getvalue().splitlines())
    assert {name: within[name] for name in ("trace_id", "span_id")} == span.ids
    assert "trace_id" not in after


async def test_work_for_many_is_not_traced_as_that_of_the_one_who_set_it_off(exporter: InMemorySpanExporter) -> None:
    tasks, seen = Tasks(), list[object]()

    async def work() -> None:
        seen.append(traces.current())

    span = traces.of_request(METHOD, "")
    assert span
    with span:
        await tasks.start(work())
        await asyncio.create_task(work())
    assert seen == [None, span]


def test_a_program_that_traces_has_our_calls_in_its_traces(exporter: InMemorySpanExporter, monkeypatch: Any) -> None:
    """A till's own OpenTelemetry, with a span of its own around the sale."""
    traces.switch_off()
    traces.adopt()
    assert traces.tracer is None, "no program has set up anything"
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(api, "get_tracer_provider", lambda: provider)
    traces.adopt()
    with provider.get_tracer("till").start_as_current_span("checkout") as checkout:
        span = traces.calling(CreatePurchaseRequest())
        assert span
        span.end()
    ours, _ = exporter.get_finished_spans()
    assert (ours.name, ours.parent) == (METHOD, checkout.get_span_context())


def test_wrong_settings_are_named() -> None:
    environ = {
        "OTEL_TRACES_EXPORTER": "zipkin",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "collector",
        "OTEL_TRACES_SAMPLER": "sometimes",
        "OTEL_TRACES_SAMPLER_ARG": "2",
        "OTEL_SDK_DISABLED": "maybe",
    }
    with pytest.raises(SettingsError) as caught:
        load(TraceSettings, environ)
    assert {problem.partition("=")[0] for problem in caught.value.problems} == set(environ)


def test_traces_do_not_leave_the_machine_in_plaintext() -> None:
    for url in ("http://127.0.0.1:4317", "http://[::1]:4317", "https://collector.example:4317"):
        load(TraceSettings, {"OTEL_EXPORTER_OTLP_ENDPOINT": url})
    from purchases_svc.settings import ServeSettings

    environ = {
        "PURCHASES_DATABASE_URL": "postgresql://localhost/x",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector.example:4317",
    }
    with pytest.raises(SettingsError, match="https"):
        load(ServeSettings, environ)
    load(ServeSettings, {**environ, "ALLOW_PLAINTEXT": "yes"})


def test_what_exports_may_not_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsError, match="otlp"), traces.exported(TraceSettings(traces_exporter="console"), "test"):
        pass


def test_disabled_is_disabled() -> None:
    for config in (
        TraceSettings(),
        TraceSettings(traces_exporter="none", traces_endpoint="http://127.0.0.1:4317"),
        TraceSettings(traces_exporter="console", traces_disabled="true"),
    ):
        with traces.exported(config, "test"):
            assert traces.tracer is None
    with traces.exported(TraceSettings(traces_exporter="console"), "test"):
        assert traces.tracer is not None
    assert traces.tracer is None
