"""A sale as till software has it, and as the message that is sent."""

import datetime
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from grpc import StatusCode

from chassis import wire
from chassis.errors import VIOLATIONS_MAX, Violation
from pos.errors import InvalidSale, Status
from retail.purchases.v1 import purchase_pb2
from retail.purchases.v1.purchases_service_pb2 import CreatePurchaseRequest

# No sale that keeps the rules is so big. gRPC refuses what is far bigger in a way that looks like a busy service.
SALE_BYTES_MAX = 100_000
_TOLD_MAX = 5  # violations that the error's text names; `violations` has them all, up to VIOLATIONS_MAX


class Item(NamedTuple):
    """One unit of a product; the chain sells at most one per sale. A tuple: big sales have a thousand."""

    product_id: int
    price_cents: int


class JournalPlace(NamedTuple):
    """Where a sale stands in its till's journal: `pos.journal` sees to it."""

    epoch: str
    sequence: int
    clock_offset_ms: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sale:
    """A completed sale, ready to be sent. Its key is made once, here; every attempt to send it carries it."""

    receipt_id: str
    branch_id: int
    cashier_id: int
    pos_id: str
    items: Sequence[Item]
    customer_id: str | None = None
    purchase_time: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    idempotency_key: str = field(default_factory=lambda: str(uuid.uuid4()))
    journal: JournalPlace | None = None

    @property
    def total_cents(self) -> int:
        return sum(item.price_cents for item in self.items)


def create_request(sale: Sale, register_customer: bool) -> CreatePurchaseRequest:
    """The message.

    Raises:
        InvalidSale: no message can say what is in the sale, whatever that is: it names every such field.
    """
    try:
        request = _message(sale, register_customer)
    except Exception as error:  # the values are the caller's, and may be anything
        violations = _what_cannot_be_sent(sale)
        text = "; ".join(f"{each.field}: {each.description}" for each in violations[:_TOLD_MAX]) or _said(error)
        status = Status(StatusCode.INVALID_ARGUMENT, f"it cannot be sent: {text}", violations=tuple(violations))
        raise InvalidSale(status) from None
    if request.ByteSize() > SALE_BYTES_MAX:
        rule = f"a sale must have at most {SALE_BYTES_MAX:,} bytes; this one has {request.ByteSize():,}"
        raise InvalidSale(Status(StatusCode.INVALID_ARGUMENT, rule))
    return request


def _message(sale: Sale, register_customer: bool) -> CreatePurchaseRequest:
    request = CreatePurchaseRequest(
        idempotency_key=sale.idempotency_key,
        register_customer=register_customer,
        purchase=purchase_pb2.Purchase(
            receipt_id=sale.receipt_id,
            branch_id=sale.branch_id,
            cashier_id=sale.cashier_id,
            pos_id=sale.pos_id,
            customer_id=sale.customer_id,
            purchase_time=wire.timestamp(sale.purchase_time),
        ),
    )
    if sale.journal is not None:
        request.journal_entry.epoch, request.journal_entry.sequence, offset_ms = sale.journal
        if offset_ms is not None:
            request.journal_entry.clock_offset_ms = offset_ms
    add = request.purchase.items.add  # filling items in place takes half the time of building them apart
    total_cents = 0
    for product_id, price_cents in sale.items:
        add(product_id=product_id, quantity=1).unit_price.value = _amount(price_cents)
        total_cents += price_cents
    # The total on the customer's receipt: the service refuses a sale whose items add up to another.
    request.purchase.total_amount.value = _amount(total_cents)
    return request


def _amount(cents: int) -> str:
    if type(cents) is not int:
        raise TypeError(f"must be whole cents, an int, not {type(cents).__name__}")
    return wire.cents_text(cents)


def _what_cannot_be_sent(sale: Sale) -> list[Violation]:
    """Tries each field by itself."""
    violations: list[Violation] = []
    request, purchase = CreatePurchaseRequest(), purchase_pb2.Purchase()

    def attempt(path: str, send: Callable[[], object]) -> None:
        try:
            send()
        except Exception as error:
            if len(violations) < VIOLATIONS_MAX:
                violations.append(Violation(path, _said(error), ""))  # no rule of the contract: it never got there

    def add(item: Any) -> None:
        product_id, price_cents = item
        purchase_pb2.PurchaseItem(product_id=product_id)
        _amount(price_cents)

    attempt("idempotency_key", lambda: setattr(request, "idempotency_key", sale.idempotency_key))
    for name in ("receipt_id", "branch_id", "cashier_id", "pos_id"):
        attempt(f"purchase.{name}", lambda name=name: setattr(purchase, name, getattr(sale, name)))  # type: ignore[misc]
    attempt("purchase.customer_id", lambda: purchase_pb2.Purchase(customer_id=sale.customer_id))
    attempt("purchase.purchase_time", lambda: wire.timestamp(sale.purchase_time))
    items: list[Any] = []
    attempt("purchase.items", lambda: items.extend(sale.items))
    for number, item in enumerate(items):
        attempt(f"purchase.items[{number}]", lambda item=item: add(item))  # type: ignore[misc]
    return violations


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
