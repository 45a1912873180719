"""What a fuzz run was answered, held against the contract and against what it sent."""

import decimal
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from google.type.decimal_pb2 import Decimal

from chassis.grpc_server import GRPC_LIMIT_FACTOR
from purchases_svc.server import UPLOAD_BYTES_MAX
from retail.purchases.v1.purchase_pb2 import Purchase
from retail.purchases.v1.purchases_service_pb2 import (
    CreatePurchaseRequest,
    CreatePurchaseResponse,
    GetPurchaseResponse,
    UploadPurchasesRequest,
)
from tests.integration.fuzz_requests import DEADLINE_S, METHODS, Request, parsed

DOMAIN = "purchases.retail.example"
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
    if info.reason == "PURCHASE_TIME_AHEAD":
        return None if has_pause and CODES[status.code] is grpc.StatusCode.UNAVAILABLE else "is not put off"
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
        return max(map(len, request.raws)) > GRPC_LIMIT_FACTOR * UPLOAD_BYTES_MAX
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
        """Sales are answered in any order. Of several with one number, it is the one that the answer fits."""
        sent: dict[int, list[CreatePurchaseRequest]] = defaultdict(list)
        for message in self._messages(request):
            for each in message.uploads:
                sent[each.sequence_number].append(each.create_purchase)
        for result in itertools.chain.from_iterable(answer.results for answer in answers):
            candidates = sent[result.sequence_number]
            if not candidates:
                self.problem(request, f"answers {result.sequence_number} once too often")
                continue
            of = next((each for each in candidates if _fits(result, each)), candidates[0])
            candidates.remove(of)
            if result.WhichOneof("outcome") == "created":
                self._note_created(request, of, result.created)
                continue
            self.codes[f"an upload's sale {CODES[result.error.code].name}"] += 1
            if wrong := broken_refusal(result.error, of):
                self.problem(request, f"{wrong}: {result.error}")
        unanswered = list(itertools.chain.from_iterable(sent.values()))
        if complete and unanswered:
            self.problem(request, f"{len(unanswered)} sales have no answer")
        self.unsettled.update(each.idempotency_key.lower() for each in unanswered)

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


def _fits(result: Any, sent: CreatePurchaseRequest) -> bool:
    if result.WhichOneof("outcome") == "created":
        return content(result.created.purchase) == content(sent.purchase)
    return not broken_refusal(result.error, sent)


def _sales(message: Any) -> Iterable[CreatePurchaseRequest]:
    if isinstance(message, CreatePurchaseRequest):
        return [message]
    if isinstance(message, UploadPurchasesRequest):
        return [each.create_purchase for each in message.uploads]
    return []
