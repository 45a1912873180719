"""Events as the purchases service writes them: into the outbox, or as the bytes that the relay makes of them."""

from pathlib import Path

import psycopg

# Sales of now, of three items each, like the yardstick's. An event takes about 600 bytes.
_EVENTS = """
WITH sale AS MATERIALIZED (
    SELECT uuidv7() AS event_id, uuidv7() AS purchase_id, gen_random_uuid() AS key, gen_random_uuid() AS receipt,
           1 + (random() * 49)::int AS branch_id, 1 + (random() * 499)::int AS cashier_id,
           1 + (random() * 8999)::int AS product_id,
           to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS happened_at
    FROM generate_series(1, %(count)s)
), event AS (
    SELECT event_id, purchase_id, jsonb_build_object(
        'event_id', event_id, 'event_type', 'PurchaseCreated', 'occurred_at', happened_at,
        'purchase', jsonb_build_object(
            'purchase_id', purchase_id, 'receipt_id', receipt, 'idempotency_key', key, 'branch_id', branch_id,
            'cashier_id', cashier_id, 'pos_id', 'POS-3', 'purchase_time', happened_at, 'total_amount', 142.50,
            'items', jsonb_build_array(
                jsonb_build_object('product_id', product_id, 'qty', 1, 'unit_price', 8.90),
                jsonb_build_object('product_id', product_id + 1, 'qty', 1, 'unit_price', 8.90),
                jsonb_build_object('product_id', product_id + 2, 'qty', 1, 'unit_price', 124.70)
            )
        )
    ) AS payload
    FROM sale
)
"""
_INTO_OUTBOX = """
INSERT INTO outbox_events (event_id, event_type, aggregate_id, occurred_at, payload_json)
SELECT event_id, 'PurchaseCreated', purchase_id, now(), payload FROM event
"""


def fill_outbox(connection: psycopg.Connection, count: int) -> None:
    """Put so many new events into the outbox; all are seen at once, when the caller's transaction commits."""
    connection.execute(_EVENTS + _INTO_OUTBOX, {"count": count})


def write_one(connection: psycopg.Connection) -> str:
    """Put one new event into the outbox; returns its id."""
    row = connection.execute(_EVENTS + _INTO_OUTBOX + "RETURNING event_id::text", {"count": 1}).fetchone()
    assert row
    return str(row[0])


def one(connection: psycopg.Connection) -> tuple[str, str]:
    """A new event that is written nowhere: its id, and the message."""
    row = connection.execute(_EVENTS + "SELECT event_id::text, payload::text FROM event", {"count": 1}).fetchone()
    assert row
    return row[0], row[1]


def write_bodies(connection: psycopg.Connection, count: int, file: Path) -> None:
    """Write so many new events as messages, one a line."""
    rows = connection.execute(_EVENTS + "SELECT payload::text FROM event", {"count": count})
    with file.open("w") as lines:
        lines.writelines(f"{body}\n" for (body,) in rows)
