"""The one statement that records sales, and the text of the event that goes with each."""

from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring_ascii as json_text  # the C implementation
from types import MappingProxyType
from typing import LiteralString

from chassis.postgres import Connection
from chassis.wire import cents_text
from purchases_svc.sale import JournalEntry, Purchase, rfc3339

# One statement is one transaction. Everything hangs on `new_receipt` and `new_key`: what gets in has both, what does
# not leaves nothing behind. Of sales whose key, customer and branch allow it, those with a free receipt number get in.
# (The same sale on its way twice has the same receipt number, so the second waits for the first and is not accepted.
# Should another sale take its key at this very moment, the statement fails as a whole; `flush.py` sorts it out.)
# Receipts, keys and customers are inserted in sorted order, and the tables in an order that PostgreSQL chooses but that
# is the same in every flush: two that share some wait for each other, but never in a circle.
# LIMIT 1 makes each look-up a probe of the index, whatever the statistics say; nothing looks into all partitions.
_INSERT: LiteralString = """
WITH input AS MATERIALIZED (
    SELECT r.n, r.register_customer, r.traceparent, r.event, e.event_id, e.occurred_at, p.*
    FROM jsonb_to_recordset(%(rows)s::jsonb) AS r(n int, register_customer boolean, traceparent text, event jsonb)
    CROSS JOIN LATERAL jsonb_to_record(r.event) AS e(event_id uuid, occurred_at timestamptz, purchase jsonb)
    CROSS JOIN LATERAL jsonb_to_record(e.purchase) AS p(
        purchase_id uuid, receipt_id text, idempotency_key uuid, branch_id int, cashier_id int, pos_id text,
        customer_id uuid, purchase_time timestamptz, business_day date, total_amount numeric, items jsonb)
), new_receipt AS (
    INSERT INTO receipts (branch_id, pos_id, business_day, receipt_id, purchase_id, purchase_time)
    SELECT branch_id, pos_id, business_day, receipt_id, purchase_id, purchase_time
    FROM input
    LEFT JOIN LATERAL (
        SELECT true AS known FROM idempotency_keys k WHERE k.idempotency_key = input.idempotency_key LIMIT 1
    ) AS key ON true
    LEFT JOIN LATERAL (
        SELECT true AS known FROM customers c WHERE c.customer_id = input.customer_id LIMIT 1
    ) AS customer ON input.customer_id IS NOT NULL AND NOT register_customer
    LEFT JOIN LATERAL (
        SELECT true AS known FROM closed_branches b WHERE b.branch_id = input.branch_id LIMIT 1
    ) AS closed ON true
    WHERE key.known IS NULL AND closed.known IS NULL
        AND (input.customer_id IS NULL OR register_customer OR customer.known)
    ORDER BY branch_id, pos_id, business_day, receipt_id
    ON CONFLICT DO NOTHING
    RETURNING purchase_id
), accepted AS MATERIALIZED (
    SELECT input.* FROM input JOIN new_receipt USING (purchase_id)
), new_key AS (
    INSERT INTO idempotency_keys (idempotency_key, purchase_id, purchase_time, event_id)
    SELECT idempotency_key, purchase_id, purchase_time, event_id FROM accepted ORDER BY idempotency_key
), new_customer AS (
    INSERT INTO customers (customer_id)
    SELECT DISTINCT customer_id FROM accepted WHERE register_customer AND customer_id IS NOT NULL ORDER BY customer_id
    ON CONFLICT DO NOTHING
), new_purchase AS (
    INSERT INTO purchases (purchase_id, receipt_id, idempotency_key, branch_id, cashier_id, pos_id, customer_id,
                           purchase_time, business_day, total_amount, item_count, event_id, created_at)
    SELECT purchase_id, receipt_id, idempotency_key, branch_id, cashier_id, pos_id, customer_id,
           purchase_time, business_day, total_amount, jsonb_array_length(items), event_id, occurred_at
    FROM accepted
), new_item AS (
    INSERT INTO purchase_items (purchase_id, purchase_time, product_id, qty, unit_price, line_total)
    SELECT purchase_id, purchase_time, item.product_id, item.qty, item.unit_price, item.unit_price * item.qty
    FROM accepted
    CROSS JOIN LATERAL jsonb_to_recordset(items) AS item(product_id bigint, qty int, unit_price numeric)
), new_event AS (
    INSERT INTO outbox_events (event_id, event_type, aggregate_id, occurred_at, payload_json, traceparent)
    SELECT event_id, 'PurchaseCreated', purchase_id, occurred_at, event, traceparent FROM accepted
)
SELECT n FROM input WHERE purchase_id NOT IN (SELECT purchase_id FROM accepted)
"""
# The same, with places in tills' journals. A statement of its own, so that sales without one pay nothing. A place that
# another sale has refuses nobody: both are noted, and the till's disk is what somebody has to look at.
_WITH_JOURNALS: LiteralString = (
    _INSERT.replace(
        "r.event, e.event_id",
        "r.event, r.epoch, r.sequence, r.clock_offset_ms, e.event_id",
    )
    .replace("event jsonb)", "event jsonb, epoch uuid, sequence bigint, clock_offset_ms bigint)")
    .replace(
        "), new_event AS (",
        """), new_place AS (
    INSERT INTO till_sales (branch_id, pos_id, epoch, sequence, purchase_id, clock_offset_ms)
    SELECT branch_id, pos_id, epoch, sequence, purchase_id, clock_offset_ms FROM accepted WHERE epoch IS NOT NULL
    ORDER BY branch_id, pos_id, epoch, sequence
    ON CONFLICT DO NOTHING
    RETURNING purchase_id
), taken_place AS (
    INSERT INTO till_conflicts (branch_id, pos_id, epoch, sequence, purchase_id)
    SELECT branch_id, pos_id, epoch, sequence, purchase_id FROM accepted
    WHERE epoch IS NOT NULL AND purchase_id NOT IN (SELECT purchase_id FROM new_place)
), new_event AS (""",
    )
)


NO_TRACES: Mapping[int, str] = MappingProxyType({})


async def insert(
    connection: Connection, purchases: Sequence[Purchase], traceparents: Mapping[int, str] = NO_TRACES
) -> set[int]:
    """Store purchases with their events; returns the positions of those that were not stored, because something in the
    database forbids it. `traceparents` go with the events of those that are traced, by their place."""
    rows = f"[{','.join(_row(n, purchase, traceparents.get(n)) for n, purchase in enumerate(purchases))}]"
    any_journal = any(purchase.sale.journal is not None for purchase in purchases)
    statement = _WITH_JOURNALS if any_journal else _INSERT
    cursor = await connection.execute(statement, {"rows": rows}, prepare=True)
    return {n for (n,) in await cursor.fetchall()}


def _row(n: int, purchase: Purchase, traceparent: str | None) -> str:
    """The event, which is all there is to know of a purchase; what else the statement needs beside it."""
    register = "true" if purchase.sale.register_customer else "false"
    trace = f'"traceparent":"{traceparent}",' if traceparent else ""
    place = _place(purchase.sale.journal) if purchase.sale.journal else ""
    return f'{{"n":{n},"register_customer":{register},{trace}{place}"event":{event_json(purchase)}}}'


def _place(journal: JournalEntry) -> str:
    offset_ms = "null" if journal.clock_offset_ms is None else journal.clock_offset_ms
    return f'"epoch":"{journal.epoch}","sequence":{journal.sequence},"clock_offset_ms":{offset_ms},'


def event_json(purchase: Purchase) -> str:
    """The PurchaseCreated event, version 1: `proto/events/purchase_created.v1.schema.json`.

    Written by hand: amounts stay the exact decimals that they are, which no float and no `json.dumps` would keep.
    """
    sale = purchase.sale
    items = ",".join(
        f'{{"product_id":{product_id},"qty":1,"unit_price":{cents_text(cents)}}}' for product_id, cents in sale.items
    )
    customer = f'"customer_id":"{sale.customer_id}",' if sale.customer_id else ""
    return (
        f'{{"event_id":"{purchase.event_id}","event_type":"PurchaseCreated"'
        f',"occurred_at":"{rfc3339(purchase.created_at)}","purchase":{{"purchase_id":"{purchase.purchase_id}"'
        f',"receipt_id":{json_text(sale.receipt_id)},"idempotency_key":"{sale.idempotency_key}"'
        f',"branch_id":{sale.branch_id},"cashier_id":{sale.cashier_id},"pos_id":{json_text(sale.pos_id)},{customer}'
        f'"purchase_time":"{rfc3339(sale.purchase_time)}","business_day":"{purchase.business_day}","total_amount":{cents_text(sale.total_cents)}'
        f',"items":[{items}]}}}}'
    )
