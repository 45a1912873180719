"""The event that the purchases service writes keeps the contract that consumers rely on."""

import datetime
import json
from decimal import Decimal
from pathlib import Path

import jsonschema
import pytest

from purchases_svc.insert import event_json
from purchases_svc.sale import Item, Purchase, Sale

SCHEMA = Path(__file__).parent.parent.parent / "proto" / "events" / "purchase_created.v1.schema.json"
MOMENT = datetime.datetime(2026, 1, 6, 10, 14, 59, 120_000, tzinfo=datetime.UTC)


def purchase(**changes: object) -> Purchase:
    sale = Sale(
        idempotency_key="4f7c2d1e-9b3a-4c58-8e6f-0a1b2c3d4e5f",
        receipt_id="123456",
        branch_id=1,
        cashier_id=17,
        pos_id="POS-3",
        customer_id=None,
        purchase_time=MOMENT,
        total_cents=13_360,
        items=(Item(1001, 890), Item(2007, 12_470)),
        register_customer=False,
    )._replace(**changes)  # type: ignore[arg-type]
    return Purchase(
        "019b92cd-7cb8-7a11-9c44-5e8f00d2b3a6", "019b92cd-80a0-7c3e-8f5a-2b6d1c0e4f77", MOMENT, MOMENT.date(), sale
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"customer_id": "4f7c2d1e-9b3a-4c58-8e6f-0a1b2c3d4e5f"},
        {"receipt_id": 'quote " backslash \\ ünïcode \U0001f6d2 </script>'},
        {"purchase_time": MOMENT.replace(microsecond=0)},
        {"total_cents": 99_999_999_999_999, "items": (Item(1, 99_999_999_999_999),)},
        {"total_cents": 0, "items": (Item(2_147_483_647, 0),)},
    ],
)
def test_event_keeps_the_schema(changes: dict[str, object]) -> None:
    """Whatever the sale, its event is valid and says exactly what was sold."""
    stored = purchase(**changes)
    event = json.loads(event_json(stored), parse_float=Decimal)
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(), parse_float=Decimal)).validate(event)
    assert event["purchase"]["receipt_id"] == stored.sale.receipt_id
    assert event["purchase"]["total_amount"] * 100 == stored.sale.total_cents
    assert [(i["product_id"], i["unit_price"] * 100) for i in event["purchase"]["items"]] == list(stored.sale.items)
    assert event["purchase"].get("customer_id") == stored.sale.customer_id
    assert event["purchase"]["business_day"] == stored.business_day.isoformat()
