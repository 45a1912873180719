"""A fuzz run against the purchases service: whatever it is sent, it answers, and what it stores is whole.

The service runs as a process of its own, as an operator runs it: its log is read as a whole, and a handler that blocks
does not stop the clock of those who wait for it.

The run is made of FUZZ_SEED alone: hypothesis builds messages, and request number n is made of the seed and n. What
fails is reported with its bytes, so that it can also be sent alone. Smaller attacks follow, each with one promise.
"""

import asyncio
import decimal
import itertools
import json
import os
import random
import re
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, NamedTuple

import grpc
import psycopg
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from google.type.date_pb2 import Date
from google.type.decimal_pb2 import Decimal
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from chassis.grpc_server import MESSAGE_BYTES_MAX
from retail.purchases.v1 import customers_service_pb2, purchases_service_pb2
from retail.purchases.v1.purchase_pb2 import Purchase
from retail.purchases.v1.purchases_service_pb2 import (
    CreatePurchaseRequest,
    CreatePurchaseResponse,
    ExportPurchasesRequest,
    GetPurchaseRequest,
    GetPurchaseResponse,
    UploadPurchasesRequest,
)
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.conftest import eventually
from tests.integration.conftest import is_serving
from tests.integration.processes import Processes
from tests.integration.sales import NOON, refusal, sale
from tests.integration.test_create_purchase import assert_whole
from tests.integration.test_upload_purchases import message, upload

SEED = int(os.environ.get("FUZZ_SEED", "20260301"))
REQUESTS = 24_000
IN_FLIGHT = 300
DEADLINE_S = 40.0  # never what ends a call, apart from those that are given a short one to give up in mid-flight
DOMAIN = "purchases.retail.example"
CONNECTIONS = 4  # the default of PURCHASES_READ_CONNECTIONS and PURCHASES_EXPORT_CONNECTIONS
DAY_S = 86_400

METHODS: Mapping[str, MethodDescriptor] = {
    method.name: method
    for file in (purchases_service_pb2, customers_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
WEIGHTS = Counter(dict.fromkeys(METHODS, 7)) + Counter(CreatePurchase=45, UploadPurchases=-2, ExportPurchases=-6)


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


# --- What is sent -----------------------------------------------------------------------------------------------------


def pooled_uuid(pool: str, number: int) -> str:
    return str(uuid.UUID(int=random.Random(f"{pool}{number}").getrandbits(128), version=4))


def pool_of(name: str, size: int) -> st.SearchStrategy[str]:
    return st.integers(1, size).map(partial(pooled_uuid, name))


KEYS, CUSTOMERS, RECEIPTS = 3_000, 60, 400  # small, so that requests meet each other
SALE_DAYS = 6

VALID: Mapping[str, st.SearchStrategy[Any]] = {  # by field name
    "idempotency_key": pool_of("key", KEYS),
    "customer_id": pool_of("customer", CUSTOMERS),
    "customer_ids": pool_of("customer", CUSTOMERS),
    "purchase_id": pool_of("purchase", 10),
    "receipt_id": st.integers(1, RECEIPTS).map(str),
    "branch_id": st.integers(1, 3),
    "branch_ids": st.integers(1, 3),
    "cashier_id": st.integers(1, 3),
    "pos_id": st.sampled_from(["POS-1", "POS-2"]),
    "product_id": st.integers(1, 1_000),
    "quantity": st.just(1),
    "seconds": st.integers(0, SALE_DAYS * DAY_S).map(lambda passed: NOON + passed),
    "nanos": st.sampled_from([0, 1, 999, 1_000, 123_456_789, 999_999_999]),
    "value": st.sampled_from(["1.00", "8.9", "0", "007.50", "999999999999.99"]),
    "year": st.just(2026),
    "month": st.just(3),
    "day": st.integers(1, SALE_DAYS),
    "page_size": st.sampled_from([0, 1, 7, 50]),
    "page_token": st.just(""),
    "sequence_number": st.integers(0, 1_000),
    "register_customer": st.booleans(),
}
COMPUTED = {"total_amount", "line_total"}  # by the service, when they are left out
INTEGERS = st.sampled_from([0, 1, -1, 2, 60, 9_999, 10_000, 2**31 - 1, -(2**31)])
# The edges of the years 0, 1, 2000 and 10000, and of int64; a time to come, and one that needs a month of its own.
SECONDS = [
    -62_167_219_200,
    -62_135_596_801,
    -62_135_596_800,
    946_684_799,
    946_684_800,
    253_402_300_799,
    253_402_300_800,
]
SECONDS += [2**63 - 1, -(2**63), 4_102_444_800, NOON - 31 * DAY_S]
TEXTS = [
    *["", " ", "\0", "a\0b", "a\nb", "\r\n", "\x7f", "\x85", "\u2028", "\ufeff", "\u202eabc", "\u0301", "\U0010ffff"],
    *["x" * 64, "x" * 65, "x" * 20_000, "😀" * 32, "😀" * 64, "😀" * 65, "e\u0301" * 16],
    *["'; DROP TABLE purchases; --", "\\u0000", "%s%n{}", '","', "../../x", "null", "NaN", "Infinity"],
    *["12\n", "+1", "-1", "1e3", "1E+400", ".5", "5.", "1.234", "1,00", " 1", "٣", "１２", "0x10", "1_000"],
    *["9" * 13, "0" * 5_000 + "1", *(form.format(uuid.UUID(int=7)) for form in ("{{{}}}", "{}\n", "urn:uuid:{}"))],
    *[str(uuid.UUID(int=0)), str(uuid.UUID(int=2**128 - 1)).upper(), uuid.UUID(int=7).hex],
]
HOSTILE: Mapping[int, st.SearchStrategy[Any]] = {  # by type
    FieldDescriptor.CPPTYPE_STRING: st.sampled_from(TEXTS) | st.text(st.characters(codec="utf-8"), max_size=80),
    FieldDescriptor.CPPTYPE_INT32: INTEGERS | st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: INTEGERS | st.integers(-(2**63), 2**63 - 1) | st.sampled_from(SECONDS),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
}


@st.composite
def messages(draw: st.DrawFn, kind: Descriptor, hostility: int) -> Any:
    """A message with `hostility` percent of its fields broken, or at least odd."""
    built: Any = GetMessageClass(kind)()
    for field in kind.fields:
        hostile = draw(st.integers(0, 99)) < hostility
        valid = VALID.get(field.name)
        if field.message_type:
            if (hostile and draw(st.booleans())) or (not hostile and valid):
                continue
            part = messages(field.message_type, 40 if hostile else hostility)
            if field.is_repeated:
                getattr(built, field.name).extend(draw(st.lists(part, max_size=3)) if hostile else [draw(part)])
            else:
                getattr(built, field.name).CopyFrom(draw(part))
        else:
            value = HOSTILE[field.cpp_type] if hostile else VALID[field.name]
            if field.is_repeated:
                getattr(built, field.name).extend(draw(st.lists(value, max_size=3)))
            else:
                setattr(built, field.name, draw(value))
    return built


def built(kind: Descriptor, number: int) -> list[bytes]:
    """Up to `number` messages, the same for the same seed; a third of them by the rules, as far as one field tells."""
    found: list[bytes] = []

    @seed(SEED)
    @settings(
        max_examples=number,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from([0, 5, 25]).flatmap(lambda hostility: messages(kind, hostility)))
    def collect(message: Message) -> None:
        found.append(message.SerializeToString())

    collect()
    return found


def pooled_sale(number: int) -> CreatePurchaseRequest:
    """Sale `number` of those that keep the rules; some share a receipt number, many a customer."""
    chance = random.Random(f"{SEED} sale {number}")
    request = sale(tuple(chance.choice(["1.00", "8.9", "124.70", "0"]) for _ in range(chance.randint(1, 4))))
    request.idempotency_key = pooled_uuid("key", number)
    purchase = request.purchase
    purchase.receipt_id = f"R{chance.randint(1, RECEIPTS)}"
    purchase.branch_id, purchase.pos_id = chance.randint(1, 3), f"POS-{chance.randint(1, 2)}"
    purchase.purchase_time.seconds = NOON + chance.randrange(SALE_DAYS) * DAY_S
    if chance.random() < 0.5:
        purchase.customer_id = pooled_uuid("customer", chance.randint(1, CUSTOMERS))
        request.register_customer = chance.random() < 0.8
    return request


def some_sale(chance: random.Random) -> CreatePurchaseRequest:
    """A sale of the pool; one in eight under the key of another one."""
    request = pooled_sale(chance.randint(1, KEYS))
    if chance.random() < 0.12:
        request.idempotency_key = pooled_uuid("key", chance.randint(1, KEYS))
    return request


def varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def unknown_field(payload: bytes) -> bytes:
    return varint(1_000 << 3 | 2) + varint(len(payload)) + payload


def padded(raw: bytes, size: int) -> bytes:
    """The same message, made `size` bytes long by an unknown field."""
    fitting = size - len(raw)
    while len(padding := unknown_field(bytes(fitting))) > size - len(raw):
        fitting -= 1
    return raw + padding


def deep(levels: int) -> bytes:
    """An unknown group in a group in a group."""
    return varint(1_000 << 3 | 3) * levels + varint(1_000 << 3 | 4) * levels


def spoiled(chance: random.Random, raw: bytes, other: bytes) -> bytes:
    """A message with one thing done to its bytes; `other` is a message of the same type."""
    at = chance.randrange(len(raw) + 1)
    to = chance.randrange(at, len(raw) + 1)
    noise = chance.randbytes(chance.randint(1, 8))
    return chance.choice(
        [
            raw[:at],
            raw[:at] + noise + raw[at:],
            raw[:at] + noise + raw[to:],
            raw[:at] + raw[to:],
            raw[:to] + raw[at:],  # a part twice
            raw + other,  # every field twice: the last one counts
            raw[:1] + raw[:1] + raw[1:],
            bytes([(raw or b"\0")[0] ^ chance.randint(1, 7)]) + raw[1:],  # another wire type
            raw + unknown_field(noise),
            raw + deep(chance.choice([1, 90, 98, 99, 100, 101, 5_000])),
            raw + b"\xff" * 11,
        ]
    )


class Request(NamedTuple):
    """A call to be made: one message, or those of a stream."""

    method: str
    raws: Sequence[bytes]
    timeout_s: float = DEADLINE_S


class Plan:
    """What request number n is."""

    def __init__(self) -> None:
        self._corpus = {
            name: built(method.input_type, 1_500 if name == "CreatePurchase" else 400)
            for name, method in METHODS.items()
        }

    def request(self, number: int) -> Request:
        chance = random.Random(f"{SEED} request {number}")
        (method,) = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))
        raws = [self._raw(chance, method) for _ in range(chance.randint(1, 4) if method == "UploadPurchases" else 1)]
        gives_up = method in ("CreatePurchase", "UploadPurchases") and chance.random() < 0.03
        return Request(method, raws, chance.uniform(0.001, 0.1) if gives_up else DEADLINE_S)

    def _raw(self, chance: random.Random, method: str) -> bytes:
        if method == "CreatePurchase" and chance.random() < 0.4:
            return some_sale(chance).SerializeToString()
        if method == "UploadPurchases" and chance.random() < 0.7:
            first, sales = chance.randrange(10**9), [some_sale(chance) for _ in range(chance.randint(1, 12))]
            return message(first, sales).SerializeToString()
        raw, other = chance.choices(self._corpus[method], k=2)
        (kind,) = chance.choices(["as built", "spoiled", "noise", "big"], [600, 300, 90, 4])
        if kind == "spoiled":
            return spoiled(chance, raw, other)
        if kind == "noise":
            return chance.randbytes(chance.randint(0, 100))
        if kind == "big":
            return padded(raw, MESSAGE_BYTES_MAX + chance.choice([0, 1, 100_000]))
        return raw


# --- What comes back --------------------------------------------------------------------------------------------------

LEAK = re.compile(
    r"Traceback|Exception|psycopg|asyncio|\.py\b|/(work|usr|home|root|tmp|site-packages)/|SELECT |INSERT |_pb2"
)
REASON = re.compile(r"[A-Z]+(_[A-Z]+)*")
AMOUNT = re.compile(r"[0-9]{1,16}(\.[0-9]{1,2})?")  # of an item or a whole sale
# What an idle database and a patient client may be told. DEADLINE_EXCEEDED, UNAVAILABLE and OVERLOADED are failures.
REFUSALS = {  # what asks for patience besides, with RetryInfo: OVERLOADED is for exports, of which few run at once
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.ABORTED,
}
# What grpc.aio's client says, instead of why a stream ended, when it writes on: https://github.com/grpc/grpc/issues/36066
WROTE_AFTER_END = "Internal error from Core"
CODES = {code.value[0]: code for code in grpc.StatusCode}


def parsed(kind: Descriptor, raw: bytes) -> Any:
    """The message in these bytes; None when there is none."""
    try:
        return GetMessageClass(kind).FromString(raw)
    except DecodeError:
        return None


def amount(value: Decimal) -> decimal.Decimal:
    """An amount as the contract writes it; -1, which nothing stored ever is, when it is none."""
    return decimal.Decimal(value.value if AMOUNT.fullmatch(value.value) else -1)


def content(purchase: Purchase) -> tuple[object, ...]:
    """What was sold, as the contract has it, in terms that a request and what is stored share."""
    items = []
    for item in purchase.items:
        price = amount(item.unit_price)
        line_total = amount(item.line_total) if item.HasField("line_total") else price
        items.append((item.product_id, item.quantity, price, line_total))
    total = sum((line_total for *_, line_total in items), decimal.Decimal())
    return (
        purchase.receipt_id,
        purchase.branch_id,
        purchase.cashier_id,
        purchase.pos_id,
        purchase.customer_id.lower(),
        purchase.purchase_time.seconds * 1_000_000 + purchase.purchase_time.nanos // 1_000,
        amount(purchase.total_amount) if purchase.HasField("total_amount") else total,
        sorted(items),
    )


def has_field(request: Any, path: str) -> bool:
    """Whether a path such as `purchase.items[2].unit_price` leads to a field of this message."""
    for step in path.split("."):
        match = re.fullmatch(r"(\w+?)(?:\[([0-9]+)\])?", step)
        if not match or not isinstance(request, Message) or match[1] not in request.DESCRIPTOR.fields_by_name:
            return False
        request = getattr(request, match[1])
        if match[2]:
            if int(match[2]) >= len(request):
                return False
            request = request[int(match[2])]
    return True


def broken_refusal(status: status_pb2.Status, request: Any) -> str | None:
    """What a refusal of ours lacks, or says too much; None when nothing is wrong with it."""
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    has_info, has_violations, has_pause = (
        any(detail.Unpack(part) for detail in status.details) for part in (info, bad, retry)
    )
    if CODES[status.code] not in REFUSALS:
        return "must not be the answer"
    if not has_info or info.domain != DOMAIN or not REASON.fullmatch(info.reason):
        return "has no good ErrorInfo"
    if LEAK.search(f"{status.message} {info} {bad}"):
        return "tells something of the inside"
    if has_violations and not all(has_field(request, violation.field) for violation in bad.field_violations):
        return "names a field that is not in the request"
    if (info.reason == "OVERLOADED") != (CODES[status.code] == grpc.StatusCode.RESOURCE_EXHAUSTED):
        return "must not be the answer"
    if has_pause != (CODES[status.code] in (grpc.StatusCode.ABORTED, grpc.StatusCode.RESOURCE_EXHAUSTED)):
        return "tells to try again, or not to, against its code"
    return None


def made_by_grpc(request: Request, error: grpc.aio.AioRpcError) -> bool:
    """Whether it is gRPC itself that ended this call, or the client's half of it."""
    if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return max(map(len, request.raws)) > MESSAGE_BYTES_MAX
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return request.timeout_s < DEADLINE_S
    return request.method == "UploadPurchases" and error.details() == WROTE_AFTER_END


class Ledger:
    """What was sent and what was answered; everything that must not be is written down as a problem."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.codes: Counter[str] = Counter()
        self.sent: dict[str, list[tuple[object, ...]]] = defaultdict(list)  # contents by key
        self.unsettled: set[str] = set()  # keys of calls that ended without an answer
        self.answered: dict[str, tuple[object, ...]] = {}  # contents by purchase id
        self.ids: dict[str, set[str]] = defaultdict(set)  # purchase ids by key
        self.customers: set[str] = set()  # that may have been registered by CreateCustomer
        self.registered: set[str] = set()  # that were

    def note_sent(self, request: Request) -> None:
        for sent in self._messages(request):
            for each in _sales(sent):
                self.sent[each.idempotency_key.lower()].append(content(each.purchase))
            if request.method == "CreateCustomer":
                self.customers.add(sent.customer_id.lower())

    def note_answers(self, request: Request, answers: Sequence[Any], error: grpc.aio.AioRpcError | None) -> None:
        if request.method == "UploadPurchases":
            self._note_uploads(request, answers, error is None)
        for sent, answer in zip(self._messages(request), answers, strict=False):
            if request.method == "CreatePurchase":
                self._note_created(request, sent, answer)
            elif request.method == "GetPurchase":
                self._note_read(request, answer)
            elif request.method == "CreateCustomer":
                self.registered.add(answer.customer.customer_id)
        self.codes[f"{request.method} {error.code().name if error else 'OK'}"] += 1
        if error:
            self._note_refusal(request, error)

    def _note_uploads(self, request: Request, answers: Sequence[Any], complete: bool) -> None:
        messages = self._messages(request)
        if complete and len(answers) != len(request.raws):
            self.problem(request, f"{len(answers)} answers to {len(request.raws)} messages")
        for sent, answer in zip(messages, answers, strict=False):
            numbers = [each.sequence_number for each in sent.uploads]
            if numbers != [result.sequence_number for result in answer.results]:
                self.problem(request, "not every sale has one answer")
            for each, result in zip(sent.uploads, answer.results, strict=False):
                if result.WhichOneof("outcome") == "created":
                    self._note_created(request, each.create_purchase, result.created)
                    continue
                self.codes[f"an upload's sale {CODES[result.error.code].name}"] += 1
                if wrong := broken_refusal(result.error, each.create_purchase):
                    self.problem(request, f"{wrong}: {result.error}")
        for sent in messages[len(answers) :]:
            self.unsettled.update(each.idempotency_key.lower() for each in _sales(sent))

    def _note_created(self, request: Request, sent: CreatePurchaseRequest, answer: CreatePurchaseResponse) -> None:
        self.answered[answer.purchase.purchase_id] = content(answer.purchase)
        self.ids[sent.idempotency_key.lower()].add(answer.purchase.purchase_id)
        if content(sent.purchase) != content(answer.purchase):
            self.problem(request, f"answered with another sale: {answer.purchase}")

    def _note_read(self, request: Request, answer: GetPurchaseResponse) -> None:
        if self.answered.get(answer.purchase.purchase_id) != content(answer.purchase):
            self.problem(request, f"reads another sale than was answered: {answer.purchase}")

    def _note_refusal(self, request: Request, error: grpc.aio.AioRpcError) -> None:
        messages = self._messages(request)
        unanswered = made_by_grpc(request, error)
        if not unanswered:
            raw = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
            status = status_pb2.Status.FromString(raw)
            if (status.code, status.message) != (error.code().value[0], error.details()):
                self.problem(request, f"says two things: {error.code()} {error.details()} and {status}")
            elif status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0] and request.method != "ExportPurchases":
                self.problem(request, f"is turned away: {status}")
            elif wrong := broken_refusal(status, messages[-1] if messages else None):
                self.problem(request, f"{wrong}: {status}")
        if request.method == "CreatePurchase" and (unanswered or error.code() == grpc.StatusCode.ABORTED):
            self.unsettled.update(each.idempotency_key.lower() for sent in messages for each in _sales(sent))

    def problem(self, request: Request, what: str) -> None:
        raws = ", ".join(raw.hex() if len(raw) < 2_000 else f"{len(raw)} bytes" for raw in request.raws)
        self.problems.append(f"{request.method}: {what}\n  sent: {raws}")

    def _messages(self, request: Request) -> list[Any]:
        """Those that the service can read, up to the first that it cannot."""
        messages = (parsed(METHODS[request.method].input_type, raw) for raw in request.raws)
        return list(itertools.takewhile(lambda message: message is not None, messages))


def _sales(message: Any) -> Iterable[CreatePurchaseRequest]:
    if isinstance(message, CreatePurchaseRequest):
        return [message]
    if isinstance(message, UploadPurchasesRequest):
        return [each.create_purchase for each in message.uploads]
    return []


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


def follow_ups(chance: random.Random, request: Request, answer: Any) -> list[Request]:
    """What a client may ask next: the sale that it was told is stored, or the next page."""
    if request.method == "CreatePurchase" and chance.random() < 0.1:
        purchase_id = answer.purchase.purchase_id
        return [
            Request("GetPurchase", [GetPurchaseRequest(purchase_id=purchase_id.upper()).SerializeToString()]),
            request,
        ]
    if not (token := getattr(answer, "next_page_token", "")):
        return []
    same = parsed(METHODS[request.method].input_type, request.raws[0])
    at = chance.randrange(len(token))
    requests = []
    for page_token in (token, token[:at], token[:at] + chance.choice("Aa0_=é\0") + token[at + 1 :]):
        same.page_token, same.page_size = page_token, chance.choice([0, 1, 1_000])
        requests.append(Request(request.method, [same.SerializeToString()]))
    same.page_token = token
    return [*requests, Request(request.method, [same.SerializeToString() + VARIED[request.method]])]


VARIED = {  # one more field, given or given again
    "ListPurchases": purchases_service_pb2.ListPurchasesRequest(branch_id=77).SerializeToString(),
    "ListControlTotals": purchases_service_pb2.ListControlTotalsRequest(branch_ids=[77]).SerializeToString(),
    "ListCustomers": unknown_field(b"x"),
}


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
    """Lines of a log that an operator would have to look into."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return [
        str(line)[:2_000] for line in lines if line["level"] not in ("debug", "info") and line["event"] != "slow call"
    ]


@pytest.mark.timeout(300)  # a minute on two idle cores; others may use them too
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
    call: Any = channel.stream_unary(path(METHODS[method]))(iter(()), timeout=5)
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
    call: Any = PurchasesServiceStub(channel).GetPurchase(GetPurchaseRequest(purchase_id=str(uuid.uuid4())), timeout=5)
    assert (await refusal(call)).reason == "PURCHASE_NOT_FOUND"
