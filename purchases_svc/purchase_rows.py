"""A purchase, made of its rows."""

from collections.abc import Sequence
from typing import Any, LiteralString

from chassis.postgres import Connection
from chassis.wire import parse_cents
from purchases_svc.sale import Item, Purchase, Sale

COLUMNS: LiteralString = """
    p.purchase_id::text, p.event_id::text, p.created_at, p.idempotency_key::text, p.receipt_id, p.branch_id,
    p.cashier_id, p.pos_id, p.customer_id::text, p.purchase_time, p.business_day, p.total_amount::text, p.item_count
"""


async def with_items(connection: Connection, rows: Sequence[tuple[Any, ...]]) -> list[Purchase]:
    """Purchases by the COLUMNS of their rows `p`, in that order."""
    if not rows:
        return []
    ids = [row[0] for row in rows]
    times = [row[9] for row in rows]
    cursor = await connection.execute(
        "SELECT purchase_id::text, product_id, unit_price::text FROM purchase_items"
        " WHERE purchase_id = ANY(%s::uuid[]) AND purchase_time BETWEEN %s AND %s ORDER BY purchase_item_id",
        [ids, min(times), max(times)],
    )
    items: dict[str, list[Item]] = {purchase_id: [] for purchase_id in ids}
    for purchase_id, product_id, price in await cursor.fetchall():
        items[purchase_id].append(Item(product_id, _cents(price)))
    return [_purchase(row, tuple(items[row[0]])) for row in rows]


def _purchase(row: tuple[Any, ...], items: tuple[Item, ...]) -> Purchase:
    (
        purchase_id,
        event_id,
        created_at,
        key,
        receipt_id,
        branch_id,
        cashier_id,
        pos_id,
        customer_id,
        time,
        day,
        total,
        _,
    ) = row
    sale = Sale(
        key, receipt_id, branch_id, cashier_id, pos_id, customer_id, time, _cents(total), items, register_customer=False
    )
    return Purchase(purchase_id, event_id, created_at, day, sale)


def _cents(amount: str) -> int:
    """A stored amount; always two fraction digits, and a sum may be longer than what the wire takes in."""
    cents = parse_cents(amount)
    return int(amount.replace(".", "")) if cents is None else cents
