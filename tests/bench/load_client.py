"""`python -m tests.bench.load_client ADDRESS [ANALYTICS]`: the load, as cheap as a Python client can make it.

Requests are serialized before the clock starts, answers stay bytes, and only a sample of them is parsed. Each job is a
line of JSON on stdin; the answer is `begin` and `end` at the edges of the measured time, then a line of JSON.
"""

import asyncio
import gc
import json
import sys
import time
import uuid
from collections import deque
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from itertools import count, cycle
from random import Random

import grpc
import uvloop
from google.type.decimal_pb2 import Decimal

from chassis import tls
from chassis.settings import load
from retail.purchases.v1.purchases_service_pb2 import (
    CreatePurchaseRequest,
    CreatePurchaseResponse,
    PurchaseUpload,
    PurchaseUploadResult,
    UploadPurchasesRequest,
    UploadPurchasesResponse,
)
from tests.bench.figures import percentile
from tests.bench.load import Job, Load
from tests.bench.probe import Probe

CREATE = "/retail.purchases.v1.PurchasesService/CreatePurchase"
UPLOAD = "/retail.purchases.v1.PurchasesService/UploadPurchases"

CONNECTIONS = 8  # that calls are spread over, as those of tills are: what one connection may have on its way is limited
SALES_PER_MESSAGE = 500
TOGETHER = 20  # the most that leave in one message of an open stream
MESSAGES_AHEAD = 3  # of a stream, sent before their answers have come
PARSE_EVERY = 100  # answers to a call; of a stream, every one is parsed after the clock has stopped
WARM_UP_S = 0.5
# Requests are made beforehand, for each second more than any server of ours takes in.
CALLS_PER_S_MAX, UPLOADED_PER_S_MAX = 12_000, 40_000
CALL_TIMEOUT_S = 20.0  # tills set deadlines, too; with one, a call is cheaper to the server
STREAM_EXTRA_S = 60.0  # for warming up and for the last answers
ANSWER_BYTES_MAX = 16 << 20

BRANCHES, CASHIERS, PRODUCTS = 50, 500, 9_000
PRICES = ("8.90", "8.90", "124.70")
TOTAL = "142.50"


class Run:
    """One job: the sales to send, whether to go on, and what each answer took."""

    def __init__(self, job: Job, channels: Sequence[grpc.aio.Channel], probe: Probe | None, branches: int) -> None:
        self._job, self._channel, self._channels, self._probe = job, channels[0], cycle(channels), probe
        self._stopped = False
        self._answers: list[tuple[float, int]] = []  # seconds it took, purchases in it
        seconds = WARM_UP_S + job.measure_s
        if job.method != "upload":
            calls = int((seconds + 1) * (job.per_s or CALLS_PER_S_MAX)) + job.at_once
            journal = str(uuid.uuid4()) if job.journal else ""
            requests = (
                sale(branches=branches, first=job.first_branch, place=(journal, n) if journal else None)
                for n in range(1, calls + 1)
            )
            self._requests = iter([request.SerializeToString() for request in requests])
        else:
            messages = int(seconds * UPLOADED_PER_S_MAX / SALES_PER_MESSAGE) + job.at_once * MESSAGES_AHEAD
            self._requests = iter([upload(branches).SerializeToString() for _ in range(messages)])

    async def measure(self) -> Load:
        stream = None
        match self._job:
            case Job(method="upload"):
                client = self._uploads
            case Job(method="stream"):
                stream = OpenStream(self._channel, self._job.measure_s + STREAM_EXTRA_S)
                client = partial(self._sales, stream)
            case Job(per_s=0):
                client = self._calls
            case _:
                client = self._paced_calls
                self._turns, self._began = count(), time.perf_counter()
        async with asyncio.TaskGroup() as clients:
            reading = clients.create_task(stream.run()) if stream else None
            selling = [clients.create_task(client()) for _ in range(self._job.at_once)]
            await asyncio.sleep(WARM_UP_S)
            probing = clients.create_task(self._probe.run()) if self._probe else None
            first, began = len(self._answers), time.perf_counter()
            print("begin", flush=True)
            await asyncio.sleep(self._job.measure_s)
            last, ended = len(self._answers), time.perf_counter()
            print("end", flush=True)
            self._stopped = True
            if self._probe and probing:
                self._probe.stop()
                await probing
            if reading:
                await asyncio.wait(selling)
                reading.cancel()  # which waits for an answer, though nothing more is asked
        if next(self._requests, None) is None:
            raise RuntimeError("all requests were sent before the time was over: prepare more of them")
        measured = self._answers[first:last]
        seconds = sorted(took for took, _ in measured)
        return Load(
            sum(purchases for _, purchases in measured),
            ended - began,
            percentile(seconds, 50) * 1_000,
            percentile(seconds, 99) * 1_000,
            sorted(self._probe.visible_ms) if self._probe else (),
            sorted(self._probe.lag_ms) if self._probe else (),
        )

    async def _calls(self) -> None:
        """One call after the other."""
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = next(self._channels).unary_unary(CREATE)
        for request in self._requests:
            started = time.perf_counter()
            answer = await call(request, timeout=CALL_TIMEOUT_S)  # raises unless it is OK
            self._answers.append((time.perf_counter() - started, 1))
            if len(self._answers) % PARSE_EVERY == 0:
                check(CreatePurchaseResponse.FromString(answer))
            if self._stopped:
                return

    async def _paced_calls(self) -> None:
        """The calls that are due, one after the other. Whoever is late goes on at once, and his answers come late."""
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = next(self._channels).unary_unary(CREATE)
        while not self._stopped:
            due = self._began + next(self._turns) / self._job.per_s
            if (early_s := due - time.perf_counter()) > 0:
                await asyncio.sleep(early_s)
            answer = await call(next(self._requests), timeout=CALL_TIMEOUT_S)  # raises unless it is OK
            self._answers.append((time.perf_counter() - due, 1))
            if len(self._answers) % PARSE_EVERY == 0:
                check(CreatePurchaseResponse.FromString(answer))

    async def _sales(self, stream: "OpenStream") -> None:
        """One sale after the other, on a stream that all share."""
        for request in self._requests:
            started = time.perf_counter()
            answer = await stream.record(request)
            self._answers.append((time.perf_counter() - started, 1))
            if len(self._answers) % PARSE_EVERY == 0:
                check(answer.created)
            if self._stopped:
                return

    async def _uploads(self) -> None:
        """Message after message, a few ahead of their answers."""
        method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(UPLOAD)
        call = method(timeout=self._job.measure_s + STREAM_EXTRA_S)
        sent: deque[float] = deque()
        answers: list[bytes] = []
        while sent or not self._stopped:
            while not self._stopped and len(sent) < MESSAGES_AHEAD:
                sent.append(time.perf_counter())
                await call.write(next(self._requests))
            answer = await call.read()
            if not isinstance(answer, bytes):
                raise RuntimeError(f"the stream ended too soon, with {await call.code()}: {await call.details()}")
            answers.append(answer)
            self._answers.append((time.perf_counter() - sent.popleft(), SALES_PER_MESSAGE))
        await call.done_writing()
        if await call.read() is not grpc.aio.EOF or await call.code() is not grpc.StatusCode.OK:
            raise RuntimeError(f"the stream ended with {await call.code()}")
        for answer in answers:
            results = UploadPurchasesResponse.FromString(answer).results
            if len(results) != SALES_PER_MESSAGE:
                raise RuntimeError(f"a message was answered with {len(results)} results")
            for result in results:
                check(result.created)  # an error is not, either


class OpenStream:
    """As `pos.open_stream`: sales that wait while a message is on its way out leave together in the next one."""

    def __init__(self, channel: grpc.aio.Channel, timeout_s: float) -> None:
        method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(UPLOAD)
        self._call = method(timeout=timeout_s)
        self._numbers = count(1)
        self._waiting: list[PurchaseUpload] = []
        self._sale_came = asyncio.Event()
        self._unanswered: dict[int, asyncio.Future[PurchaseUploadResult]] = {}

    async def run(self) -> None:
        """Take in answers until cancelled."""
        sending = asyncio.ensure_future(self._send())
        try:
            while True:
                answer = await self._call.read()
                if not isinstance(answer, bytes):
                    raise RuntimeError(f"the stream ended with {await self._call.code()}: {await self._call.details()}")
                for result in UploadPurchasesResponse.FromString(answer).results:
                    self._unanswered.pop(result.sequence_number).set_result(result)
        finally:
            sending.cancel()
            self._call.cancel()

    async def record(self, sale: bytes) -> PurchaseUploadResult:
        number = next(self._numbers)
        answer: asyncio.Future[PurchaseUploadResult] = asyncio.get_running_loop().create_future()
        self._unanswered[number] = answer
        upload = PurchaseUpload(sequence_number=number)
        upload.create_purchase.ParseFromString(sale)
        self._waiting.append(upload)
        self._sale_came.set()
        return await answer

    async def _send(self) -> None:
        while True:
            await self._sale_came.wait()
            self._sale_came.clear()
            while self._waiting:
                sales, self._waiting = self._waiting[:TOGETHER], self._waiting[TOGETHER:]
                await self._call.write(UploadPurchasesRequest(uploads=sales).SerializeToString())


def check(answer: CreatePurchaseResponse) -> None:
    """A new purchase, as it was sent."""
    stored = answer.purchase
    if (
        not stored.purchase_id
        or answer.replayed
        or len(stored.items) != len(PRICES)
        or stored.total_amount.value != TOTAL
    ):
        raise RuntimeError(f"not the answer to a new sale: {answer}")


def sale(
    random: Random = Random(), branches: int = BRANCHES, first: int = 1, place: tuple[str, int] | None = None
) -> CreatePurchaseRequest:
    """A sale of this moment, as the yardstick's: three items, a random key and a random receipt number. `place` is the
    epoch and the number of its till's journal."""
    request = CreatePurchaseRequest(idempotency_key=str(uuid.uuid4()))
    purchase = request.purchase
    purchase.receipt_id = str(uuid.uuid4())
    purchase.branch_id = random.randint(first, first + branches - 1)
    purchase.cashier_id = random.randint(1, CASHIERS)
    purchase.pos_id = "POS-3"
    purchase.purchase_time.GetCurrentTime()
    purchase.total_amount.value = TOTAL
    product_id = random.randint(1, PRODUCTS)
    for number, price in enumerate(PRICES):
        purchase.items.add(product_id=product_id + number, quantity=1, unit_price=Decimal(value=price))
    if place:
        request.journal_entry.epoch, request.journal_entry.sequence = place
        request.journal_entry.clock_offset_ms = 12
    return request


def upload(branches: int) -> UploadPurchasesRequest:
    sales = (sale(branches=branches) for _ in range(SALES_PER_MESSAGE))
    uploads = (PurchaseUpload(sequence_number=number, create_purchase=each) for number, each in enumerate(sales))
    return UploadPurchasesRequest(uploads=uploads)


async def main(address: str, analytics_address: str = "") -> None:
    loop = asyncio.get_running_loop()
    options = [("grpc.max_receive_message_length", ANSWER_BYTES_MAX), ("grpc.use_local_subchannel_pool", 1)]
    credentials = tls.credentials(load(tls.TlsSettings))
    async with AsyncExitStack() as stack:
        channels = []
        for _ in range(CONNECTIONS):
            if credentials:  # of one till, which sells in its own branch
                channel = grpc.aio.secure_channel(address, tls.channel_credentials(credentials.now()), options=options)
            else:
                channel = grpc.aio.insecure_channel(address, options=options)
            channels.append(await stack.enter_async_context(channel))
        analytics = await stack.enter_async_context(grpc.aio.insecure_channel(analytics_address or address))
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            job = Job(*json.loads(line))
            probe = Probe(channels[0], analytics, sale) if job.probe else None
            run = Run(job, channels, probe, 1 if credentials else BRANCHES)
            gc.collect()
            gc.freeze()  # the requests are many, and none is garbage while the clock runs
            print(json.dumps(await run.measure()), flush=True)
            gc.unfreeze()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
