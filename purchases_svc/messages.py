"""Protobuf messages to sales and back; every rule that a sale must keep.

Written for speed where it is on the path of every sale: one pass, whole cents, no Decimal objects.
"""

import re

from google.type import decimal_pb2

from chassis import wire
from chassis.errors import VIOLATIONS_MAX, FieldReason, InvalidRequest, Violation
from purchases_svc.answers import Recorded
from purchases_svc.errors import InvalidPurchase
from purchases_svc.sale import (
    ITEMS_MAX,
    POS_ID_LENGTH_MAX,
    PRODUCT_ID_MAX,
    RECEIPT_ID_LENGTH_MAX,
    Item,
    JournalEntry,
    Purchase,
    Sale,
)
from purchases_svc.tills import SEQUENCE_MAX, VOIDS_MAX, Report, State, Till, Trouble
from retail.purchases.v1 import purchase_pb2, purchases_service_pb2, till_pb2

# No legal sale has more than 100,000. What is larger is not even read: half a million broken items fit into a megabyte.
SALE_BYTES_MAX = 128 << 10
CARD_RULE = "must not hold 13 to 19 digits that may be a payment card's number"
POS_ID = re.compile(rf"[A-Za-z0-9._-]{{1,{POS_ID_LENGTH_MAX}}}")


def parse_sale(request: purchases_service_pb2.CreatePurchaseRequest) -> Sale:
    """Check every rule that needs no database and no clock.

    Raises:
        InvalidPurchase: naming every violation at once.
    """
    violations: list[Violation] = []
    purchase = request.purchase

    key = wire.parse_uuid(request.idempotency_key)
    if key is None:
        violations.append(Violation("idempotency_key", wire.UUID_RULE, FieldReason.NOT_A_UUID))
    if not request.HasField("purchase"):
        violations.append(Violation("purchase", "is required", FieldReason.REQUIRED))
        raise InvalidPurchase(violations)

    _check_receipt_id(purchase.receipt_id, violations)
    _check_pos_id(purchase.pos_id, violations)
    wire.check_id("purchase.branch_id", purchase.branch_id, violations)
    wire.check_id("purchase.cashier_id", purchase.cashier_id, violations)

    customer_id = None
    if purchase.HasField("customer_id"):
        customer_id = wire.parse_uuid(purchase.customer_id)
        if customer_id is None:
            violations.append(Violation("purchase.customer_id", wire.UUID_RULE, FieldReason.NOT_A_UUID))

    purchase_time = None
    if not purchase.HasField("purchase_time"):
        violations.append(Violation("purchase.purchase_time", "is required", FieldReason.REQUIRED))
    else:
        purchase_time = wire.parse_timestamp(purchase.purchase_time)
        if purchase_time is None:
            violations.append(Violation("purchase.purchase_time", wire.TIME_RULE, FieldReason.NOT_A_TIME))

    journal = _parse_journal_entry(request, violations) if request.HasField("journal_entry") else None
    items, sum_cents = _parse_items(purchase, violations)
    if purchase.HasField("total_amount"):
        total_cents = wire.parse_cents(purchase.total_amount.value)
        if total_cents is None:
            violations.append(Violation("purchase.total_amount", wire.AMOUNT_RULE, FieldReason.NOT_AN_AMOUNT))
        elif sum_cents is not None and total_cents != sum_cents:
            rule = f"must be the sum of the items, {wire.cents_text(sum_cents)}"
            violations.append(Violation("purchase.total_amount", rule, FieldReason.AMOUNT_MISMATCH))

    if violations:
        raise InvalidPurchase(violations)
    assert key is not None and purchase_time is not None and sum_cents is not None  # each None is a violation
    return Sale(
        key,
        purchase.receipt_id,
        purchase.branch_id,
        purchase.cashier_id,
        purchase.pos_id,
        customer_id,
        purchase_time,
        sum_cents,
        items,
        request.register_customer,
        journal,
    )


def _parse_journal_entry(
    request: purchases_service_pb2.CreatePurchaseRequest, violations: list[Violation]
) -> JournalEntry:
    entry = request.journal_entry
    epoch = wire.parse_uuid(entry.epoch)
    if epoch is None:
        violations.append(Violation("journal_entry.epoch", wire.UUID_RULE, FieldReason.NOT_A_UUID))
    wire.check_id("journal_entry.sequence", entry.sequence, violations, SEQUENCE_MAX)
    return JournalEntry(
        epoch or "", entry.sequence, entry.clock_offset_ms if entry.HasField("clock_offset_ms") else None
    )


def parse_till(
    request: purchases_service_pb2.GetTillStateRequest,
) -> tuple[Till, str | None]:
    """The till, and the journal if one is named.

    Raises:
        InvalidRequest: naming every violation at once.
    """
    violations: list[Violation] = []
    till = _parse_till(request, violations)
    epoch = _parse_epoch(request.epoch, violations) if request.HasField("epoch") else None
    if violations:
        raise InvalidRequest(violations)
    return till, epoch


def parse_report(request: purchases_service_pb2.ReportTillRequest) -> Report:
    """What a till says of its journal.

    Raises:
        InvalidRequest: naming every violation at once.
    """
    violations: list[Violation] = []
    till, epoch = _parse_till(request, violations), _parse_epoch(request.epoch, violations)
    wire.check_id("first_sequence", request.first_sequence, violations, SEQUENCE_MAX)
    if not request.first_sequence - 1 <= request.last_sequence <= SEQUENCE_MAX:
        rule = f"must be at least first_sequence - 1, and at most {SEQUENCE_MAX:,}"
        violations.append(Violation("last_sequence", rule, FieldReason.BAD_RANGE))
    if len(request.void_sequences) > VOIDS_MAX:
        rule = f"must have at most {VOIDS_MAX:,} numbers"
        violations.append(Violation("void_sequences", rule, FieldReason.TOO_MANY))
    elif any(not request.first_sequence <= number <= request.last_sequence for number in request.void_sequences):
        rule = "must be from first_sequence to last_sequence"
        violations.append(Violation("void_sequences", rule, FieldReason.BAD_RANGE))
    if violations:
        raise InvalidRequest(violations)
    return Report(
        till,
        epoch,
        request.first_sequence,
        request.last_sequence,
        sorted(set(request.void_sequences)),
        request.clock_offset_ms if request.HasField("clock_offset_ms") else None,
    )


def _parse_till(
    request: purchases_service_pb2.GetTillStateRequest | purchases_service_pb2.ReportTillRequest,
    violations: list[Violation],
) -> Till:
    wire.check_id("branch_id", request.branch_id, violations)
    _check_pos_id(request.pos_id, violations, "pos_id")
    return Till(request.branch_id, request.pos_id)


def _parse_epoch(text: str, violations: list[Violation]) -> str:
    epoch = wire.parse_uuid(text)
    if epoch is None:
        violations.append(Violation("epoch", wire.UUID_RULE, FieldReason.NOT_A_UUID))
    return epoch or ""


def to_till_state(state: State) -> till_pb2.TillState:
    return till_pb2.TillState(
        branch_id=state.till.branch_id,
        pos_id=state.till.pos_id,
        epoch=state.epoch,
        first_sequence=state.first_sequence,
        complete_through=state.complete_through,
        highest_sequence=state.highest_sequence,
        reported_through=state.reported_through,
        missing=[till_pb2.SequenceRange(first=first, last=last) for first, last in state.missing],
        missing_count=state.missing_count,
        missing_since_time=wire.timestamp(state.missing_since) if state.missing_since else None,
        conflict_count=state.conflict_count,
        report_time=wire.timestamp(state.reported_at) if state.reported_at else None,
        clock_offset_ms=state.clock_offset_ms,
    )


def to_incomplete_till(trouble: Trouble) -> till_pb2.IncompleteTill:
    return till_pb2.IncompleteTill(
        branch_id=trouble.till.branch_id,
        pos_id=trouble.till.pos_id,
        epoch=trouble.epoch,
        complete_through=trouble.complete_through,
        reported_through=trouble.reported_through,
        missing_since_time=wire.timestamp(trouble.missing_since) if trouble.missing_since else None,
        report_time=wire.timestamp(trouble.reported_at),
        conflict_count=trouble.conflicts,
    )


def _parse_items(purchase: purchase_pb2.Purchase, violations: list[Violation]) -> tuple[tuple[Item, ...], int | None]:
    """The items and their sum in cents; the sum is None when an item is broken."""
    if not purchase.items:
        violations.append(Violation("purchase.items", "must have at least one item", FieldReason.REQUIRED))
        return (), None
    if len(purchase.items) > ITEMS_MAX:
        violations.append(Violation("purchase.items", f"must have at most {ITEMS_MAX:,} items", FieldReason.TOO_MANY))
        return (), None  # a violation for each would fill the answer with noise
    before = len(violations)
    items = []
    seen: dict[int, int] = {}
    parse_cents = wire.parse_cents
    for index, item in enumerate(purchase.items):
        product_id = item.product_id
        price = parse_cents(item.unit_price.value)
        # The common case, in as few steps as possible; a missing amount parses as None like any other broken one.
        if price is not None and 0 < product_id <= PRODUCT_ID_MAX and item.quantity == 1 and product_id not in seen:
            seen[product_id] = index
            if not item.HasField("line_total") or parse_cents(item.line_total.value) == price:
                items.append(Item(product_id, price))
                continue
        _explain_item(item, f"purchase.items[{index}]", price, seen.get(product_id), index, violations)
        seen.setdefault(product_id, index)
        if len(violations) > VIOLATIONS_MAX:
            break  # more are not told
    if len(violations) > before:
        return (), None
    return tuple(items), sum(price for _, price in items)


def _explain_item(
    item: purchase_pb2.PurchaseItem,
    path: str,
    price: int | None,
    first_index: int | None,
    index: int,
    violations: list[Violation],
) -> None:
    if not 0 < item.product_id <= PRODUCT_ID_MAX:
        wire.check_id(f"{path}.product_id", item.product_id, violations, PRODUCT_ID_MAX)
    elif first_index is not None and first_index != index:
        rule = f"must be unique in the purchase; items[{first_index}] has the same product"
        violations.append(Violation(f"{path}.product_id", rule, FieldReason.DUPLICATE))
    if item.quantity != 1:
        rule = "must be 1: one unit of a product per purchase"
        violations.append(Violation(f"{path}.quantity", rule, FieldReason.NOT_ONE))
    if not item.HasField("unit_price"):
        violations.append(Violation(f"{path}.unit_price", "is required", FieldReason.REQUIRED))
    elif price is None:
        violations.append(Violation(f"{path}.unit_price", wire.AMOUNT_RULE, FieldReason.NOT_AN_AMOUNT))
    if item.HasField("line_total"):
        line_total = wire.parse_cents(item.line_total.value)
        if line_total is None:
            violations.append(Violation(f"{path}.line_total", wire.AMOUNT_RULE, FieldReason.NOT_AN_AMOUNT))
        elif price is not None and line_total != price:
            rule = f"must be {wire.cents_text(price)}, the unit price"
            violations.append(Violation(f"{path}.line_total", rule, FieldReason.AMOUNT_MISMATCH))


def _check_receipt_id(text: str, violations: list[Violation]) -> None:
    path = "purchase.receipt_id"
    if not text:
        violations.append(Violation(path, "is required", FieldReason.REQUIRED))
    elif len(text) > RECEIPT_ID_LENGTH_MAX:
        rule = f"must have at most {RECEIPT_ID_LENGTH_MAX} characters"
        violations.append(Violation(path, rule, FieldReason.TOO_LONG))
    elif not wire.is_seen(text):
        rule = "must not contain control, format, private-use or other code points that people cannot see"
        violations.append(Violation(path, rule, FieldReason.CONTROL_CHARACTER))
    elif wire.holds_card_number(text):
        violations.append(Violation(path, CARD_RULE, FieldReason.CARD_NUMBER))


def _check_pos_id(text: str, violations: list[Violation], path: str = "purchase.pos_id") -> None:
    if POS_ID.fullmatch(text):  # nearly always
        if wire.holds_card_number(text):
            violations.append(Violation(path, CARD_RULE, FieldReason.CARD_NUMBER))
    elif not text:
        violations.append(Violation(path, "is required", FieldReason.REQUIRED))
    elif len(text) > POS_ID_LENGTH_MAX:
        violations.append(Violation(path, f"must have at most {POS_ID_LENGTH_MAX} characters", FieldReason.TOO_LONG))
    else:
        rule = "must be ASCII letters, digits, points, underscores and hyphens"
        violations.append(Violation(path, rule, FieldReason.FORBIDDEN_CHARACTER))


def answer(
    request: purchases_service_pb2.CreatePurchaseRequest, recorded: Recorded
) -> purchases_service_pb2.CreatePurchaseResponse:
    """The response to a request. That to a new sale is made of the request itself, which is half the work."""
    if recorded.replayed:
        return to_response(recorded)
    stored, sale = recorded.purchase, recorded.purchase.sale
    response = purchases_service_pb2.CreatePurchaseResponse()
    purchase = response.purchase
    purchase.CopyFrom(request.purchase)
    purchase.DiscardUnknownFields()
    purchase.purchase_id = stored.purchase_id
    if sale.customer_id is not None:
        purchase.customer_id = sale.customer_id  # in its canonical form
    purchase.purchase_time.nanos -= purchase.purchase_time.nanos % 1_000
    wire.set_timestamp(purchase.create_time, stored.created_at)
    purchase.total_amount.value = wire.cents_text(sale.total_cents)
    for item, (_, cents) in zip(purchase.items, sale.items, strict=True):
        item.unit_price.value = item.line_total.value = wire.cents_text(cents)
    wire.set_date(purchase.business_day, stored.business_day)
    response.consistency_token = stored.event_id
    return response


def to_response(recorded: Recorded) -> purchases_service_pb2.CreatePurchaseResponse:
    return purchases_service_pb2.CreatePurchaseResponse(
        purchase=to_purchase(recorded.purchase),
        replayed=recorded.replayed,
        consistency_token=recorded.purchase.event_id,
    )


def to_purchase(stored: Purchase) -> purchase_pb2.Purchase:
    sale = stored.sale
    result = purchase_pb2.Purchase(
        purchase_id=stored.purchase_id,
        receipt_id=sale.receipt_id,
        branch_id=sale.branch_id,
        cashier_id=sale.cashier_id,
        pos_id=sale.pos_id,
        customer_id=sale.customer_id,
        purchase_time=wire.timestamp(sale.purchase_time),
        create_time=wire.timestamp(stored.created_at),
        business_day=wire.date(stored.business_day),
        total_amount=decimal_pb2.Decimal(value=wire.cents_text(sale.total_cents)),
    )
    add = result.items.add
    for product_id, cents in sale.items:
        price = wire.cents_text(cents)
        item = add(product_id=product_id, quantity=1)
        item.unit_price.value = price
        item.line_total.value = price
    return result
