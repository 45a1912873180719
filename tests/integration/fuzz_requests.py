"""What a fuzz run sends to the purchases service, made of FUZZ_SEED alone.

hypothesis builds messages, and request number n is made of the seed and n.
"""

import os
import random
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from chassis.grpc_server import GRPC_LIMIT_FACTOR
from purchases_svc.server import UPLOAD_BYTES_MAX
from retail.purchases.v1 import customers_service_pb2, purchases_service_pb2
from retail.purchases.v1.purchases_service_pb2 import CreatePurchaseRequest, GetPurchaseRequest
from tests.integration.purchases.test_upload_purchases import message
from tests.integration.sales import NOON, sale

SEED = int(os.environ.get("FUZZ_SEED", "20260301"))
DEADLINE_S = 120.0  # never what ends a call, apart from those that are given a short one to give up in mid-flight
DAY_S = 86_400

METHODS: Mapping[str, MethodDescriptor] = {
    method.name: method
    for file in (purchases_service_pb2, customers_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
WEIGHTS = Counter(dict.fromkeys(METHODS, 7)) + Counter(CreatePurchase=45, UploadPurchases=-2, ExportPurchases=-6)


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
    "after_position": st.just(""),
    "sequence_number": st.integers(0, 1_000),
    "register_customer": st.booleans(),
    "customer_id_prefix": st.sampled_from(["", "a", "0b"]),
    "traceparent": st.just(""),
    "journal_entry": st.none(),  # few tills keep one: it comes with what is odd
    "epoch": pool_of("epoch", 3),
    "sequence": st.integers(1, 1_000),
    "first_sequence": st.just(1),
    "last_sequence": st.integers(1, 1_000),
    "void_sequences": st.integers(1, 1_000),
    "clock_offset_ms": st.integers(-1_000, 1_000),
}
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
        if field.message_type:
            if (hostile and draw(st.booleans())) or (not hostile and field.name in VALID):
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
            sizes = [UPLOAD_BYTES_MAX, UPLOAD_BYTES_MAX + 1, GRPC_LIMIT_FACTOR * UPLOAD_BYTES_MAX + 1]
            return padded(raw, chance.choice(sizes))
        return raw


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


def parsed(kind: Descriptor, raw: bytes) -> Any:
    """The message in these bytes; None when there is none."""
    try:
        return GetMessageClass(kind).FromString(raw)
    except DecodeError:
        return None
