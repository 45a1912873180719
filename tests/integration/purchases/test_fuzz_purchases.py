"""A fuzz run against the purchases service: whatever it is sent, it answers, and what it stores is whole.

The service runs as a process of its own, as an operator runs it: its log is read as a whole, and a handler that blocks
does not stop the clock of those who wait for it.

`fuzz_requests.py` makes the requests, of FUZZ_SEED alone; `fuzz_ledger.py` judges the answers. What fails is reported
with its bytes, so that it can also be sent alone. Smaller attacks follow, each with one promise.
"""

import asyncio
import json
import random
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from google.type.date_pb2 import Date
from grpc_health.v1 import health_pb2, health_pb2_grpc

from retail.purchases.v1.purchases_service_pb2 import ExportPurchasesRequest, GetPurchaseRequest
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.conftest import eventually
from tests.integration.conftest import is_serving
from tests.integration.fuzz_ledger import Ledger, content
from tests.integration.fuzz_requests import DEADLINE_S, METHODS, SEED, Plan, Request, follow_ups
from tests.integration.processes import Processes
from tests.integration.purchases.test_create_purchase import assert_whole
from tests.integration.purchases.test_upload_purchases import message, upload
from tests.integration.sales import refusal, sale
from tests.sizes import how_many

REQUESTS = how_many("FUZZ_REQUESTS")
IN_FLIGHT = 300
CONNECTIONS = 4  # the default of PURCHASES_READ_CONNECTIONS and PURCHASES_EXPORT_CONNECTIONS


@pytest.fixture
def process(purchases_db: str, tmp_path: Any) -> Iterator[Processes]:
    """The purchases service alone, on an empty database."""
    processes = Processes(purchases_db, "", "", tmp_path)
    try:
        processes.start("purchases")
        processes.wait_ready("purchases")
        yield processes
    finally:
        processes.end_all()


@pytest.fixture
async def channel(process: Processes) -> AsyncIterator[grpc.aio.Channel]:
    async with connection(process) as opened:
        yield opened


def connection(process: Processes) -> grpc.aio.Channel:
    """A connection of its own, where channels to the same address share one by default; its buffers do not grow."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
    return grpc.aio.insecure_channel(process.address["purchases"], options=options)


class Caller:
    """Makes calls whose messages are bytes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._calls = {name: _multicallable(channel, method) for name, method in METHODS.items()}

    async def call(self, request: Request) -> tuple[list[Any], grpc.aio.AioRpcError | None]:
        """The answers, and the error that ended the call."""
        streams_in, streams_out = METHODS[request.method].client_streaming, METHODS[request.method].server_streaming
        call = self._calls[request.method](
            iter(request.raws) if streams_in else request.raws[0], timeout=request.timeout_s
        )
        answers: list[Any] = []
        try:
            if streams_out:
                async for answer in call:
                    answers.append(answer)  # noqa: PERF401 - what came before an error counts, too
            else:
                answers.append(await call)
        except grpc.aio.AioRpcError as error:
            return answers, error
        return answers, None


def _multicallable(channel: grpc.aio.Channel, method: MethodDescriptor) -> Any:
    kinds: Mapping[tuple[bool, bool], Callable[..., Any]] = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, True): channel.stream_stream,
    }
    return kinds[method.client_streaming, method.server_streaming](
        path(method), response_deserializer=GetMessageClass(method.output_type).FromString
    )


def path(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


async def run(caller: Caller, ledger: Ledger) -> None:
    """Make all calls, always hundreds of them at a time."""
    plan, numbers = Plan(), iter(range(REQUESTS))

    async def make(request: Request) -> list[Any]:
        ledger.note_sent(request)
        answers, error = await caller.call(request)
        ledger.note_answers(request, answers, error)
        return answers

    async def work() -> None:
        for number in numbers:
            request, chance = plan.request(number), random.Random(f"{SEED} after {number}")
            for answer in (await make(request))[:1]:
                for following in follow_ups(chance, request, answer):
                    await make(following)

    await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))


def stored_keys(url: str) -> dict[str, str]:
    """Purchase ids by key."""
    with psycopg.connect(url) as connection:
        return dict(connection.execute("SELECT idempotency_key::text, purchase_id::text FROM idempotency_keys"))


def stored_customers(url: str) -> set[str]:
    with psycopg.connect(url) as connection:
        return {customer_id for (customer_id,) in connection.execute("SELECT customer_id::text FROM customers")}


def day(number: int, month: int = 3, year: int = 2026) -> Date:
    return Date(year=year, month=month, day=number)


async def exported(channel: grpc.aio.Channel) -> dict[str, tuple[object, ...]]:
    """Everything that is stored, read back; by purchase id."""
    request = ExportPurchasesRequest(first_date=day(1, 1, 2000), last_date=day(31, 12, 9999))
    replies: Any = PurchasesServiceStub(channel).ExportPurchases(request)
    return {reply.purchase.purchase_id: content(reply.purchase) async for reply in replies}


def trouble(log: str) -> list[str]:
    """Lines of a log that an operator would have to look into; that there is no TLS here is known."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    known = ("slow call", "plaintext: ")
    return [
        str(line)[:2_000]
        for line in lines
        if line["level"] not in ("debug", "info") and not line["event"].startswith(known)
    ]


@pytest.mark.timeout(600)  # half a minute on two idle cores; others may use them too
async def test_fuzz(process: Processes, channel: grpc.aio.Channel, purchases_db: str) -> None:
    """Whatever it is sent, the service answers by its contract, and stores exactly the sales that it took in."""
    print(f"FUZZ_SEED={SEED}")
    ledger = Ledger()
    await run(Caller(channel), ledger)
    print(*sorted(ledger.codes.items()), sep="\n")
    assert not ledger.problems, "\n".join([f"{len(ledger.problems)} problems", *ledger.problems[:5]])

    keys, contents = stored_keys(purchases_db), await exported(channel)
    assert_whole(purchases_db, len(keys))
    assert set(keys.values()) == contents.keys()
    assert ledger.answered.items() <= contents.items()
    assert all(ids == {keys[key]} for key, ids in ledger.ids.items())
    assert all(contents[purchase_id] in ledger.sent[key] for key, purchase_id in keys.items())
    assert {key for key, purchase_id in keys.items() if purchase_id not in ledger.answered} <= ledger.unsettled

    customers, buyers = stored_customers(purchases_db), {str(sold[4]) for sold in contents.values() if sold[4]}
    assert buyers | ledger.registered <= customers <= buyers | ledger.registered | ledger.customers

    assert await is_serving(channel)
    assert process.stop("purchases") == 0
    assert trouble(process.log("purchases")) == []


# --- Smaller attacks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.client_streaming])
async def test_call_that_ends_without_a_message(channel: grpc.aio.Channel, method: str) -> None:
    """A call that ends before it has sent its message is refused, rather than left waiting for ever."""
    call: Any = channel.stream_unary(path(METHODS[method]))(iter(()), timeout=DEADLINE_S)
    refused = await refusal(call)
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")


async def test_health_of_a_service_that_is_not_here(process: Processes, channel: grpc.aio.Channel) -> None:
    """Asking for the health of an unknown service is answered with NOT_FOUND, and is nobody's bug."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Check(health_pb2.HealthCheckRequest(service="no.such.Service"))
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND
    assert process.stop("purchases") == 0
    assert trouble(process.log("purchases")) == []


async def test_customer_registered_by_a_neighbour(channel: grpc.aio.Channel, purchases_db: str) -> None:
    """A sale may name a customer whom an earlier sale of the same message registers."""
    customer = str(uuid.uuid4())
    sales = [sale(customer_id=customer, register_customer=not n) for n in range(6)]
    results = await upload(PurchasesServiceStub(channel), [message(0, sales)])
    assert [results[n].error.message for n in range(6)] == [""] * 6
    assert_whole(purchases_db, 6)


async def export_unread(process: Processes, exports: int, open_calls: AsyncExitStack) -> None:
    """Exports that are begun and then not read, each of more than buffers hold."""
    async with connection(process) as channel:
        await upload(PurchasesServiceStub(channel), [message(0, [sale(("1.00",) * 60) for _ in range(500)])])
    calls = []
    for _ in range(exports):
        tills: Any = PurchasesServiceStub(await open_calls.enter_async_context(connection(process)))
        calls.append(tills.ExportPurchases(ExportPurchasesRequest(first_date=day(1), last_date=day(1))))
    begun = await asyncio.gather(*(call.read() for call in calls), return_exceptions=True)  # so many may be refused
    assert any(not isinstance(each, BaseException) for each in begun)


async def test_exports_that_are_not_read(process: Processes, channel: grpc.aio.Channel) -> None:
    """Who begins as many exports as may run, and does not read them, holds up other exports only."""
    async with AsyncExitStack() as open_calls:
        await export_unread(process, CONNECTIONS, open_calls)
        await still_reads(channel)
        one_more: Any = PurchasesServiceStub(channel).ExportPurchases(
            ExportPurchasesRequest(first_date=day(1), last_date=day(1))
        )
        refused = await refusal(one_more.read())
        assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert refused.retry.HasField("retry_delay")


async def test_exports_that_are_left(process: Processes, purchases_db: str, channel: grpc.aio.Channel) -> None:
    """When the readers of exports leave, their transactions end, and nothing of it is a bug."""
    async with AsyncExitStack() as open_calls:
        await export_unread(process, 2, open_calls)

    async def all_ended() -> bool:
        with psycopg.connect(purchases_db) as connection:
            row = connection.execute(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL"
            ).fetchone()
        return row == (0,)

    await eventually(all_ended, "no transaction is open")
    await still_reads(channel)
    assert process.stop("purchases") == 0
    assert trouble(process.log("purchases")) == []


async def still_reads(channel: grpc.aio.Channel) -> None:
    call: Any = PurchasesServiceStub(channel).GetPurchase(
        GetPurchaseRequest(purchase_id=str(uuid.uuid4())), timeout=DEADLINE_S
    )
    assert (await refusal(call)).reason == "PURCHASE_NOT_FOUND"
