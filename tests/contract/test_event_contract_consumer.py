"""The consumer reads every event that the contract allows, and no other."""

import json
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analytics_svc.errors import Rejected
from analytics_svc.ingest.events import decode
from analytics_svc.purchase import PurchaseCreated
from tests.integration.purchase_events import dumps

EVENTS = Path(__file__).parent.parent.parent / "proto" / "events"
SCHEMA = json.loads((EVENTS / "purchase_created.v1.schema.json").read_text(), parse_float=Decimal)
GOLDEN = (EVENTS / "purchase_created.v1.example.json").read_bytes()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
UTC_ZONE = ZoneInfo("UTC")

# What the schema says in words only: from 2000 on, and not of a far future.
MOMENTS = st.integers(0, 26 * 365 * 86_400).map(lambda s: datetime(2000, 1, 1, tzinfo=UTC) + timedelta(seconds=s))
IDS = st.integers(1, 2**31 - 1)
# Without what people cannot see, and without code points that are no characters yet, or never.
TEXTS = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=64)
TILLS = st.from_regex(r"[A-Za-z0-9._-]{1,32}", fullmatch=True)
ITEMS = st.lists(
    st.fixed_dictionaries(
        {
            "product_id": IDS,
            "qty": st.integers(1, 1_000_000),
            "unit_price": st.decimals(0, 10**6, places=2, allow_nan=False),
        }
    ),
    min_size=1,
    max_size=8,
)
PURCHASES = st.fixed_dictionaries(
    {
        "purchase_id": st.uuids().map(str),
        "receipt_id": TEXTS,
        "idempotency_key": st.uuids().map(lambda value: str(value).upper()),
        "branch_id": IDS,
        "cashier_id": IDS,
        "pos_id": TILLS,
        "purchase_time": MOMENTS.map(datetime.isoformat),
        "items": ITEMS,
    },
    optional={"customer_id": st.uuids().map(str), "loyalty_points": st.integers()},
)


@st.composite
def events(draw: Callable[..., Any]) -> dict[str, Any]:
    purchase = draw(PURCHASES)
    purchase["total_amount"] = sum(item["qty"] * item["unit_price"] for item in purchase["items"])
    return {
        "event_id": str(draw(st.uuids())),
        "event_type": "PurchaseCreated",
        "occurred_at": draw(MOMENTS).isoformat(),
        "purchase": purchase,
    }


def read(event: Any) -> PurchaseCreated | Rejected:
    try:
        return decode(dumps(event), UTC_ZONE)
    except Rejected as rejected:
        return rejected


def test_golden_example() -> None:
    """The example that the producer is tested with counts as +142.50 and 3 units."""
    event = decode(GOLDEN, UTC_ZONE)
    assert (event.cents, sum(item.quantity for item in event.items), event.day) == (14_250, 3, date(2026, 1, 6))


@given(events())
def test_every_allowed_event_is_read(event: dict[str, Any]) -> None:
    """What the schema allows and adds up is counted, exactly as it says."""
    VALIDATOR.validate(event)
    purchase = event["purchase"]
    found = read(event)
    assert isinstance(found, PurchaseCreated), found
    assert (found.event_id, found.branch_id, found.customer_id) == (
        event["event_id"],
        purchase["branch_id"],
        purchase.get("customer_id"),
    )
    assert found.purchase_time == datetime.fromisoformat(purchase["purchase_time"])
    assert found.day == found.purchase_time.date()
    assert found.cents == purchase["total_amount"] * 100
    assert [(item.product_id, item.quantity, Decimal(item.cents) / 100) for item in found.items] == [
        (item["product_id"], item["qty"], item["qty"] * item["unit_price"]) for item in purchase["items"]
    ]


PATHS: list[tuple[Any, ...]] = [
    *((name,) for name in SCHEMA["required"]),
    *(("purchase", name) for name in SCHEMA["properties"]["purchase"]["properties"]),
    *(("purchase", "items", 0, name) for name in ("product_id", "qty", "unit_price")),
]
VALUES: list[Any] = [
    None, True, 0, 1, -1, 2**31 - 1, 2**31, 10**6, 10**6 + 1, 10**16 - 1, 10**16, Decimal("0.01"), Decimal("8.9"),
    Decimal("8.90"), Decimal("0.005"), Decimal("-0.01"), "", "x", "x" * 64, "x" * 65, [], {}, "PurchaseCreated",
    "4F7C2D1E-9b3a-4c58-8e6f-0a1b2c3d4e5f", "4f7c2d1e9b3a4c588e6f0a1b2c3d4e5f", "2026-01-06T10:14:59Z",
    "2026-01-06T10:14:59.123456+01:00", "2026-01-06T10:14:59", "2026-01-06", "2026-01-06T10:14:59.1234567Z",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
@pytest.mark.parametrize("value", [*VALUES, "missing"], ids=repr)
def test_schema_and_decoder_agree(path: tuple[Any, ...], value: Any) -> None:
    """Whatever is changed in an event, the decoder refuses its form exactly when the schema does."""
    event = json.loads(GOLDEN, parse_float=Decimal)
    target = event
    for step in path[:-1]:
        target = target[step]
    if value == "missing":
        target.pop(path[-1], None)
    else:
        target[path[-1]] = value
    found = read(event)
    optional = {("purchase", "customer_id"), ("purchase", "business_day")}
    tolerated = path in optional and value is None  # null for absent
    if VALIDATOR.is_valid(event) or tolerated:
        # Whether it adds up is what no schema can say.
        assert not isinstance(found, Rejected) or found.reason == "TOTAL_MISMATCH"
    else:
        assert isinstance(found, Rejected)
        assert found.reason in {"BROKEN_CONTRACT", "UNKNOWN_EVENT_TYPE"}


def test_limits_of_the_schema() -> None:
    """The longest list of items is read; a day has 86,400 seconds."""
    event = json.loads(GOLDEN, parse_float=Decimal)
    event["purchase"]["items"] = [{"product_id": 1, "qty": 1, "unit_price": Decimal("0.01")}] * 2_000
    event["purchase"]["total_amount"] = 20
    event["purchase"]["purchase_time"] = (datetime(2026, 1, 7, tzinfo=UTC) - timedelta(microseconds=1)).isoformat()
    found = read(event)
    assert isinstance(found, PurchaseCreated)
    assert (len(found.items), found.day) == (2_000, date(2026, 1, 6))
    event["purchase"]["items"] *= 2
    assert isinstance(read(event), Rejected)
