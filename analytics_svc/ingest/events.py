"""The tolerant decoder of the event contract (proto/events/): bytes in, a PurchaseCreated or a reason out.

Pure but for the clock, as no purchase is of a far future.

Tolerant: what the contract does not name is ignored. Amounts go from the message's digits to whole cents; no binary
floating point sees them.
"""

import json
import re
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from decimal import Context, Decimal, Inexact, InvalidOperation
from typing import Any, NoReturn
from zoneinfo import ZoneInfo

from analytics_svc.errors import Rejected, quoted
from analytics_svc.purchase import PRODUCT_ID_MAX, Item, PurchaseCreated
from chassis.wire import is_seen, parse_cents
from chassis.zones import business_day

EVENT_TYPE = "PurchaseCreated"
SCHEMA_VERSION = 1

BODY_BYTES_MAX = 1 << 20  # 2,000 items take a quarter of it; a larger body would hold up all others while it is read
ID_MAX = 2**31 - 1
ITEMS_MAX = 2_000
QUANTITY_MAX = 1_000_000
TEXT_LENGTH_MAX = 64
WHOLE_MAX = 10**16  # an amount stays below it
# No purchase is of another time: the purchases service refuses it. The slack is for clocks that differ.
EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)
AHEAD_MAX = timedelta(days=367)
ZONES_MAX = timedelta(days=1)  # between the days that two clocks show at one time

# Reasons. Programs and people select by them, so they never change.
TOO_LARGE = "TOO_LARGE"
UNDECODABLE = "UNDECODABLE"  # not the JSON that we read: broken, NaN, too deep, a name twice in one object
UNKNOWN_EVENT_TYPE = "UNKNOWN_EVENT_TYPE"
UNSUPPORTED_SCHEMA_VERSION = "UNSUPPORTED_SCHEMA_VERSION"
BROKEN_CONTRACT = "BROKEN_CONTRACT"  # a field is missing or wrong; the detail begins with its path
TOTAL_MISMATCH = "TOTAL_MISMATCH"


def decode(
    body: bytes,
    zone: ZoneInfo,
    *,
    message_id: object = None,
    message_type: object = None,
    schema_version: object = None,
) -> PurchaseCreated:
    """Read a message: its body, and the properties and header of the same names, which may all be missing.

    The event's id is the one in the body. `message_id` repeats it, but tools that move messages between queues set
    their own, so it only names an event whose body does not say.

    Raises:
        Rejected: the message must not be counted.
    """
    event_id = message_event_id(message_id)
    try:
        if message_type not in (None, EVENT_TYPE):
            raise Rejected(UNKNOWN_EVENT_TYPE, f"the message's type is {quoted(message_type)}")
        if schema_version not in (None, SCHEMA_VERSION, str(SCHEMA_VERSION)):
            raise Rejected(UNSUPPORTED_SCHEMA_VERSION, f"schema_version is {quoted(schema_version)}")
        event = _parse(body)
        event_id = _uuid(event.get("event_id"), "event_id")
        if (event_type := _text(event.get("event_type"), "event_type")) != EVENT_TYPE:
            raise Rejected(UNKNOWN_EVENT_TYPE, f"event_type is {quoted(event_type)}")
        _time(event.get("occurred_at"), "occurred_at")
        return _purchase(event_id, event.get("purchase"), zone)
    except Rejected as rejected:
        rejected.event_id = event_id
        raise


def message_event_id(message_id: object) -> str | None:
    """The event's id by the message's own, if that is one."""
    return message_id.lower() if isinstance(message_id, str) and _UUID.fullmatch(message_id) else None


def uuid7_time(message_id: object) -> float | None:
    """When an event was recorded, in seconds since 1970, by an id of ours; None for any other."""
    event_id = message_event_id(message_id)
    return int(event_id[:8] + event_id[9:13], 16) / 1_000 if event_id and event_id[14] == "7" else None


def _purchase(event_id: str, purchase: Any, zone: ZoneInfo) -> PurchaseCreated:
    if type(purchase) is not dict:
        _wrong("purchase", "must be an object", purchase)
    get = purchase.get
    purchase_id = _uuid(get("purchase_id"), "purchase.purchase_id")
    _receipt_id(get("receipt_id"))
    _uuid(get("idempotency_key"), "purchase.idempotency_key")
    branch_id = _whole(get("branch_id"), "purchase.branch_id", ID_MAX)
    _whole(get("cashier_id"), "purchase.cashier_id", ID_MAX)
    _pos_id(get("pos_id"))
    customer_id = get("customer_id")  # null is taken for absent: it can mean nothing else
    if customer_id is not None:
        customer_id = _uuid(customer_id, "purchase.customer_id")
    purchase_time = _time(get("purchase_time"), "purchase.purchase_time")
    cents = _cents(get("total_amount"), "purchase.total_amount")
    items = _items(get("items"))
    if (total := sum(item.cents for item in items)) != cents:
        raise Rejected(TOTAL_MISMATCH, f"total_amount is {cents} cents, the items' sum is {total} cents")
    if not EARLIEST <= purchase_time <= datetime.now(UTC) + AHEAD_MAX:
        rule = f"must be from {EARLIEST.date()} to {AHEAD_MAX.days} days ahead"
        _wrong("purchase.purchase_time", rule, get("purchase_time"))
    day = _business_day(get("business_day"), purchase_time, zone)
    return PurchaseCreated(event_id, day, purchase_time, branch_id, customer_id, cents, items, purchase_id)


def _business_day(value: Any, purchase_time: datetime, zone: ZoneInfo) -> date:
    """The producer's word; without it (or with null), the day that we make of the time."""
    if value is None:
        return business_day(purchase_time, zone)
    if type(value) is str and _DATE.fullmatch(value):
        with suppress(ValueError):
            day = date.fromisoformat(value)
            if abs(day - purchase_time.date()) <= ZONES_MAX:
                return day
    _wrong("purchase.business_day", "must be a day such as 2026-01-06, at most one from purchase_time's", value)


def _items(items: Any) -> list[Item]:
    if type(items) is not list or not 1 <= len(items) <= ITEMS_MAX:
        raise Rejected(BROKEN_CONTRACT, f"purchase.items must be a list of 1 to {ITEMS_MAX} items")
    found = []
    for index, item in enumerate(items):
        try:
            if type(item) is not dict:
                _wrong("", "must be an object", item)
            product_id = _whole(item.get("product_id"), ".product_id", PRODUCT_ID_MAX)
            quantity = _whole(item.get("qty"), ".qty", QUANTITY_MAX)
            found.append(Item(product_id, quantity, quantity * _cents(item.get("unit_price"), ".unit_price")))
        except Rejected as rejected:
            raise Rejected(rejected.reason, f"purchase.items[{index}]{rejected.detail}") from None
    return found


class _Number(str):
    """The digits of a JSON number with a point or an exponent, unread: fields that we ignore may hold any."""


def _parse(body: bytes) -> dict[str, Any]:
    if len(body) > BODY_BYTES_MAX:
        raise Rejected(TOO_LARGE, f"the body has {len(body)} bytes, more than {BODY_BYTES_MAX}")
    try:
        event = _DECODER.decode(body.decode())
    except RecursionError:
        raise Rejected(UNDECODABLE, "the JSON is nested too deeply") from None
    except ValueError as error:
        raise Rejected(UNDECODABLE, quoted(str(error))) from None
    if type(event) is not dict:
        raise Rejected(UNDECODABLE, "the JSON is not an object")
    return event


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """With a name twice, two readers may disagree on what was sold."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a name twice")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_Number, parse_constant=_constant)

_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_POS_ID = re.compile(r"[A-Za-z0-9._-]{1,32}")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,6})?(?:Z|[+-][0-9]{2}:[0-9]{2})")


def _wrong(path: str, rule: str, value: object) -> NoReturn:
    raise Rejected(BROKEN_CONTRACT, f"{path} {rule}, not {quoted(value)}".replace(", not None", " and is missing"))


def _uuid(value: Any, path: str) -> str:
    if type(value) is not str or not _UUID.fullmatch(value):
        _wrong(path, "must be a UUID", value)
    return value.lower()


def _text(value: Any, path: str) -> str:
    if type(value) is not str or not 1 <= len(value) <= TEXT_LENGTH_MAX or "\0" in value:
        _wrong(path, f"must be a text of 1 to {TEXT_LENGTH_MAX} characters without NUL", value)
    return value


def _receipt_id(value: Any) -> None:
    if not is_seen(_text(value, "purchase.receipt_id")):
        _wrong("purchase.receipt_id", "must have nothing that people cannot see", value)


def _pos_id(value: Any) -> None:
    if type(value) is not str or not _POS_ID.fullmatch(value):
        _wrong("purchase.pos_id", "must be 1 to 32 ASCII letters, digits, points, underscores and hyphens", value)


def _time(value: Any, path: str) -> datetime:
    if type(value) is str and _TIME.fullmatch(value):
        try:
            return datetime.fromisoformat(value).astimezone(UTC)
        except (ValueError, OverflowError):
            pass
    _wrong(path, "must be a point in time such as 2026-01-06T10:14:59Z", value)


def _whole(value: Any, path: str, most: int) -> int:
    if type(value) is _Number:  # 1.0 is a whole number, too
        cents = _read_cents(value)
        value = cents // 100 if cents is not None and cents % 100 == 0 else value
    if type(value) is not int or not 1 <= value <= most:
        _wrong(path, f"must be a whole number from 1 to {most}", value)
    return value


def _cents(value: Any, path: str) -> int:
    if type(value) is _Number:
        cents = _read_cents(value)
    elif type(value) is int and 0 <= value < WHOLE_MAX:
        cents = value * 100
    else:
        cents = None
    if cents is None:
        _wrong(path, "must be a number from 0 to below 10^16 with at most two decimals", value)
    return cents


_CENT = Decimal("0.01")
_EXACT = Context(prec=18, traps=[Inexact, InvalidOperation])  # the 16 digits below WHOLE_MAX and the cents


def _read_cents(number: _Number) -> int | None:
    """`8.9`, `8.90`, `8.900` and `89e-1` are 890; None when it is negative, too large or not whole cents."""
    if (cents := parse_cents(number)) is not None:
        return cents
    try:
        amount = _EXACT.quantize(_EXACT.create_decimal(number), _CENT)
    except (Inexact, InvalidOperation):
        return None
    return int(amount.scaleb(2, _EXACT)) if amount >= 0 else None
