"""One purchase is one trace, from the till to the read models, over real servers."""

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from prometheus_client import REGISTRY
from prometheus_client.openmetrics import exposition as openmetrics

import relay_svc.__main__ as relay
from chassis import traces
from chassis.traces import TraceSettings
from deploy.local.collector import Trace, collecting, tree
from deploy.local.machine import wait_until
from pos.client import Item, PosClient, Sale, connect
from pos.errors import SaleRefused
from relay_svc.settings import ServeSettings as RelaySettings
from retail.purchases.v1 import purchases_service_pb2 as pb
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.conftest import WAIT_S, eventually
from tests.integration.conftest import free_address, running
from tests.integration.consumers import COUNTED, consuming, counts
from tests.integration.processes import Processes
from tests.integration.purchase_events import query
from tests.integration.sales import sale

CREATE = "retail.purchases.v1.PurchasesService/CreatePurchase"
UPLOAD = "retail.purchases.v1.PurchasesService/UploadPurchases"
INSERT, PUBLISH, PROCESS, APPLY = (
    "INSERT purchases",
    "publish purchases:purchases.created",
    "process purchases:purchases.created",
    "apply sales",
)
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"  # of the standard's own examples


class Recorded:
    """What was traced so far."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def spans(self, name: str = "") -> list[ReadableSpan]:
        found = self._exporter.get_finished_spans()
        return sorted((span for span in found if name in ("", span.name)), key=lambda span: span.start_time or 0)


@pytest.fixture
def recorded(request: pytest.FixtureRequest) -> Iterator[Recorded]:
    """Everything is traced while the test lasts, unless it names a sampler."""
    exporter, provider = InMemorySpanExporter(), TracerProvider(ALWAYS_ON, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    traces.switch_on(provider.get_tracer("test"), TraceSettings(**getattr(request, "param", {})))
    yield Recorded(exporter)
    traces.switch_off()


@pytest.fixture
async def till(purchases_channel: grpc.aio.Channel, purchases_address: str) -> AsyncIterator[PosClient]:
    with connect(purchases_address) as channel:
        yield PosClient(channel)


@pytest.fixture
async def onward(
    purchases_channel: grpc.aio.Channel, purchases_db: str, analytics_db: str, amqp_url: str
) -> AsyncIterator[None]:
    """A relay and a consumer behind the purchases service."""
    config = RelaySettings(
        purchases_db,
        amqp_url=amqp_url,
        listen=free_address(),
        metrics_listen="127.0.0.1:0",
    )
    async with (
        running(lambda stop: relay.serve(config, stop), config.listen),
        consuming(analytics_db, amqp_url, relay_target=config.listen),
    ):
        yield


def a_sale(**changes: Any) -> Sale:
    fields = {"receipt_id": uuid.uuid4().hex[:12], "branch_id": 1, "cashier_id": 17, "pos_id": "POS-3"}
    return Sale(**{**fields, "items": [Item(1001, 890)], **changes})


@pytest.mark.parametrize("by", ["a call", "an open stream"])
async def test_one_purchase_is_one_trace(
    recorded: Recorded, till: PosClient, onward: None, analytics_db: str, purchases_db: str, by: str
) -> None:
    """Each is the child of the one before: till, server, commit, publication, consumer, commit. Nothing personal."""
    sold = a_sale(customer_id=str(uuid.uuid4()))
    if by == "a call":
        await asyncio.to_thread(till.create_purchase, sold, register_customer=True)
    else:
        with till.open_stream() as stream:
            await asyncio.to_thread(stream.record, sold, register_customer=True)
    await counts(analytics_db, COUNTED, 1)
    server = CREATE if by == "a call" else UPLOAD
    spans = await sold_in_one_trace(recorded, server)
    kinds = [span.kind.name for span in spans]
    assert kinds == ["CLIENT", "SERVER", "CLIENT", "PRODUCER", "CONSUMER", "CLIENT"]
    at_till, at_server, insert, publish, process, apply = (dict(span.attributes or {}) for span in spans)
    assert at_till == {"rpc.system.name": "grpc", "rpc.method": CREATE, "rpc.response.status_code": "OK"}
    assert at_server == {
        "rpc.system.name": "grpc",
        "rpc.method": server,
        "rpc.response.status_code": "OK",
        "retail.idempotency_key": sold.idempotency_key,
    }
    assert (insert["db.system.name"], insert["db.operation.batch.size"]) == ("postgresql", 1)
    assert publish["messaging.message.id"] == process["messaging.message.id"]
    assert (publish["messaging.system"], process["messaging.operation.type"]) == ("rabbitmq", "process")
    assert (apply["db.system.name"], apply["db.operation.batch.size"]) == ("postgresql", 1)
    said = json.dumps([json.loads(span.to_json()) for span in spans])
    assert sold.customer_id and sold.customer_id not in said and sold.receipt_id not in said
    measured = ["purchases_flush_seconds", "relay_confirm_seconds", "analytics_batch_seconds"]
    if by == "a call":  # streams last as long as they like
        measured.append("grpc_server_handling_seconds")
    for metric in measured:
        assert exemplar_of(metric) & {traces.Span(span).ids["trace_id"] for span in spans}, metric  # type: ignore[arg-type]
    ((stored,),) = query(purchases_db, "SELECT traceparent FROM outbox_events")
    assert stored == traces.Span(spans[2]).traceparent  # type: ignore[arg-type]


def exemplar_of(metric: str) -> set[str]:
    """The traces that the page for Prometheus names beside a histogram, in OpenMetrics."""
    page = openmetrics.generate_latest(REGISTRY).decode()  # type: ignore[no-untyped-call]
    return set(re.findall(rf'^{metric}_bucket\{{.*# \{{.*trace_id="(\w+)"', page, re.MULTILINE))


async def sold_in_one_trace(recorded: Recorded, server: str) -> list[ReadableSpan]:
    """From the till's span to the last, each the child of the one before."""

    def of_the_sale() -> list[ReadableSpan]:
        """Beside them, processes ask each other."""
        tills = [span for span in recorded.spans(CREATE) if span.parent is None and span.context]
        ids = {span.context.trace_id for span in tills if span.context}
        return [span for span in recorded.spans() if span.context and span.context.trace_id in ids]

    async def all_there() -> bool:
        return len(of_the_sale()) >= 6

    await eventually(all_there, "six spans")
    spans = of_the_sale()
    chain = [span for span in spans if span.parent is None]
    while children := [each for each in spans if each.parent and each.parent.span_id == _id(chain[-1])]:
        (child,) = children
        chain.append(child)
    assert [each.name for each in chain] == [CREATE, server, INSERT, PUBLISH, PROCESS, APPLY]
    assert len(spans) == len(chain)
    return chain


def _id(span: ReadableSpan) -> int:
    assert span.context
    return int(span.context.span_id)


def _upload(count: int, traced: Sequence[int]) -> pb.UploadPurchasesRequest:
    """A backlog; those of `traced` have traces of their own, which callers have begun."""
    uploads = [pb.PurchaseUpload(sequence_number=number, create_purchase=sale()) for number in range(count)]
    for number in traced:
        uploads[number].traceparent = f"00-{number + 1:032x}-b7ad6b7169203331-01"
    return pb.UploadPurchasesRequest(uploads=uploads)


@pytest.mark.parametrize("recorded", [{"traces_sampler": "parentbased_always_off"}], indirect=True)
async def test_sales_of_a_batch_have_traces_of_their_own_and_are_linked(
    recorded: Recorded, purchases_channel: grpc.aio.Channel, onward: None, analytics_db: str
) -> None:
    """What is done once for many is in the trace of each that is traced, and of no other; the spans know each other."""
    stub: Any = PurchasesServiceStub(purchases_channel)  # type: ignore[no-untyped-call, unused-ignore]
    message = _upload(30, (3, 4, 20))
    async for reply in stub.UploadPurchases(iter([message])):
        assert all(result.HasField("created") for result in reply.results)
    await counts(analytics_db, COUNTED, 30)

    async def all_there() -> bool:
        return len(recorded.spans(PROCESS)) == 3

    await eventually(all_there, "three were counted")
    by_trace: dict[int, list[ReadableSpan]] = {}
    for span in recorded.spans():
        assert span.context
        by_trace.setdefault(span.context.trace_id, []).append(span)
    assert sorted(by_trace) == [4, 5, 21]
    for spans in by_trace.values():
        assert [span.name for span in spans if span.name != APPLY] == [UPLOAD, INSERT, PUBLISH, PROCESS]
    for batch in (recorded.spans(PUBLISH), recorded.spans(PROCESS)):
        assert_linked(batch)


def assert_linked(spans: Sequence[ReadableSpan]) -> None:
    """Those that were done together: the first with each other, and each other with the first."""
    ids = {_id(span) for span in spans}
    for span in spans:
        assert {link.context.span_id for link in span.links} <= ids - {_id(span)}
    if len({span.attributes["messaging.batch.message_count"] for span in spans if span.attributes}) == 1:
        firsts = [span for span in spans if len(span.links) == len(spans) - 1]
        assert firsts or not any(span.links for span in spans)


@pytest.mark.parametrize("recorded", [{"traces_sampler": "parentbased_always_off"}], indirect=True)
async def test_callers_trace_is_continued_as_they_say(recorded: Recorded, purchases_channel: grpc.aio.Channel) -> None:
    """Theirs if they trace it, none if they do not; what makes no sense is no trace."""
    stub: Any = PurchasesServiceStub(purchases_channel)  # type: ignore[no-untyped-call, unused-ignore]
    await stub.CreatePurchase(sale(), metadata=(("traceparent", CALLER),))
    for said in (f"{CALLER[:-1]}0", "nonsense", f"00-{'0' * 32}-{'0' * 16}-01", ""):
        await stub.CreatePurchase(sale(), metadata=(("traceparent", said),))
    await stub.CreatePurchase(sale())
    names = [span.name for span in recorded.spans()]
    assert sorted(names) == [INSERT, CREATE]
    (server,) = recorded.spans(CREATE)
    assert server.parent and f"{server.parent.trace_id:032x}-{server.parent.span_id:016x}" in CALLER


@pytest.mark.parametrize("recorded", [{"traces_sampler": "traceidratio", "traces_part": 0.25}], indirect=True)
async def test_a_part_is_traced_whatever_callers_say(recorded: Recorded, purchases_channel: grpc.aio.Channel) -> None:
    """By the id of the trace, so that all processes decide the same."""
    stub: Any = PurchasesServiceStub(purchases_channel)  # type: ignore[no-untyped-call, unused-ignore]
    for first in "3f":
        trace = f"00-{'1' * 16}{first}{'1' * 15}-b7ad6b7169203331-00"
        await stub.CreatePurchase(sale(), metadata=(("traceparent", trace),))
    (server,) = recorded.spans(CREATE)
    assert server.context and f"{server.context.trace_id:032x}"[16] == "3"


async def test_a_refusal_is_told_by_its_reason(recorded: Recorded, till: PosClient) -> None:
    """The till's span is one that failed; the server's is not: it did what it should. Neither has the text."""
    customer = str(uuid.uuid4())
    with pytest.raises(SaleRefused):
        await asyncio.to_thread(till.create_purchase, a_sale(customer_id=customer))
    client, server, insert = recorded.spans()
    assert (client.status.status_code.name, server.status.status_code.name) == ("ERROR", "UNSET")
    assert server.attributes and server.attributes["error.type"] == "CUSTOMER_NOT_FOUND"
    assert insert.name == INSERT
    assert not any(customer in (span.to_json() or "") for span in recorded.spans())


async def test_health_and_streams_as_such_are_not_traced(
    recorded: Recorded, purchases_channel: grpc.aio.Channel
) -> None:
    stub: Any = PurchasesServiceStub(purchases_channel)  # type: ignore[no-untyped-call, unused-ignore]
    async for _ in stub.UploadPurchases(iter([_upload(2, ())])):
        pass
    assert {span.name for span in recorded.spans()} == {UPLOAD, INSERT}
    assert len(recorded.spans(UPLOAD)) == 2


async def test_off_there_is_nothing(purchases_channel: grpc.aio.Channel, purchases_db: str) -> None:
    stub: Any = PurchasesServiceStub(purchases_channel)  # type: ignore[no-untyped-call, unused-ignore]
    await stub.CreatePurchase(sale(), metadata=(("traceparent", CALLER),))
    assert query(purchases_db, "SELECT traceparent FROM outbox_events") == [(None,)]


class Telling(Processes):
    """The four processes, all of whose traces go to a collector."""

    def __init__(self, purchases_url: str, analytics_url: str, amqp_url: str, logs: Path, collector: str) -> None:
        super().__init__(purchases_url, analytics_url, amqp_url, logs)
        self.environ |= {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",  # ms
            "LOG_LEVEL": "DEBUG",
        }


@pytest.fixture
def collector_address() -> str:
    return free_address()


@pytest.fixture
def telling(
    purchases_db: str, analytics_db: str, amqp_url: str, tmp_path: Path, collector_address: str
) -> Iterator[Telling]:
    processes = Telling(purchases_db, analytics_db, amqp_url, tmp_path, collector_address)
    try:
        yield processes
    finally:
        processes.end_all()


def test_processes_send_their_spans_to_a_collector(
    telling: Telling, collector_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trace of one purchase, as the page shows it: `-s` prints it. Its id is in the read models' log."""
    with collecting(collector_address) as collector:
        telling.start_all()
        endpoint = TraceSettings(traces_endpoint=f"http://{collector_address}")
        with traces.exported(endpoint, "pos"), connect(telling.address["purchases"]) as channel:
            PosClient(channel).create_purchase(a_sale())

        def whole() -> list[Trace]:
            return [trace for trace in collector.traces() if {INSERT, APPLY} <= {span.name for span in trace.spans}]

        assert wait_until(lambda: any(len(trace.spans) == 6 for trace in whole()), WAIT_S)
        (trace,) = whole()
        with capsys.disabled():
            print(f"\n{tree(trace)}")
        services = [line.split(" ms  ")[1].split()[0] for line in tree(trace).splitlines()[1:]]
        assert services == ["pos", "purchases", "purchases", "relay", "consumer", "consumer"]
        (counted,) = (line for line in telling.log("consumer").splitlines() if "traced sale settled" in line)
        assert json.loads(counted)["trace_id"] == trace.id


def test_a_collector_that_is_away_stops_nothing(telling: Telling) -> None:
    """Sales go on, and a process that is told to stop does."""
    telling.start("purchases")
    telling.wait_ready("purchases")
    with connect(telling.address["purchases"]) as channel:
        PosClient(channel).create_purchase(a_sale())
    assert telling.stop("purchases") == 0
    assert "Traceback" not in telling.log("purchases")
