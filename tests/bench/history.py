"""Purchases of the past months, put into the real tables with all their indexes as fast as SQL can."""

import datetime
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import psycopg

from deploy.local.machine import StackError

MONTHS = 6
CHUNK = 20_000  # purchases in one transaction
LOADERS = 2  # connections
# The disk that it takes: tables and indexes, and the most that the write-ahead log may keep.
BYTES_PER_PURCHASE, WAL_BYTES = 2_500, 6 << 30

SESSION = """
SET synchronous_commit = off;
SET session_replication_role = replica; -- no look-ups for foreign keys: what is loaded is right by construction
SET work_mem = '256MB';
"""

_PARTITIONS = """
SELECT count(ensure_purchases_month(month::date)) FROM generate_series(
    date_trunc('month', %(first)s::timestamptz), now(), interval '1 month') AS month
UNION ALL
SELECT count(ensure_outbox_day(day::date)) FROM generate_series(
    date_trunc('day', %(first)s::timestamptz), now(), interval '1 day') AS day
"""

# Sales n of [low, high), of `total` that are spread evenly from `first` until now. Keys and receipt numbers are random,
# purchase ids tell their times, and all events were sent long ago.
_CHUNK = """
WITH sale AS MATERIALIZED (
    SELECT id AS purchase_id, uuid_extract_timestamp(id) AS purchase_time, uuidv7(age) AS event_id,
           gen_random_uuid() AS idempotency_key, gen_random_uuid()::text AS receipt_id,
           1 + (random() * 49)::int AS branch_id, 1 + (random() * 499)::int AS cashier_id,
           1 + (random() * 8999)::int AS product_id
    FROM generate_series(%(low)s::bigint, %(high)s::bigint - 1) AS n
    CROSS JOIN LATERAL (SELECT (%(first)s - now()) * (1 - n / %(total)s::float8)) AS a(age)
    CROSS JOIN LATERAL (SELECT uuidv7(age)) AS i(id)
), new_key AS (
    INSERT INTO idempotency_keys (idempotency_key, purchase_id, purchase_time, event_id)
    SELECT idempotency_key, purchase_id, purchase_time, event_id FROM sale
), new_receipt AS (
    INSERT INTO receipts (branch_id, pos_id, business_day, receipt_id, purchase_id, purchase_time)
    SELECT branch_id, 'POS-3', (purchase_time AT TIME ZONE 'UTC')::date, receipt_id, purchase_id, purchase_time
    FROM sale
), new_purchase AS (
    INSERT INTO purchases (purchase_id, receipt_id, idempotency_key, branch_id, cashier_id, pos_id, purchase_time,
                           business_day, total_amount, item_count, event_id, created_at)
    SELECT purchase_id, receipt_id, idempotency_key, branch_id, cashier_id, 'POS-3', purchase_time,
           (purchase_time AT TIME ZONE 'UTC')::date, 142.50, 3,
           event_id, purchase_time
    FROM sale
), new_item AS (
    INSERT INTO purchase_items (purchase_id, purchase_time, product_id, qty, unit_price, line_total)
    SELECT purchase_id, purchase_time, product_id + line.n, 1, line.price, line.price
    FROM sale CROSS JOIN (VALUES (0, 8.9), (1, 8.9), (2, 124.7)) AS line(n, price)
)
INSERT INTO outbox_events (event_id, event_type, aggregate_id, occurred_at, payload_json, status, sent_at)
SELECT event_id, 'PurchaseCreated', purchase_id, purchase_time, jsonb_build_object(
           'event_id', event_id, 'event_type', 'PurchaseCreated', 'occurred_at', purchase_time,
           'purchase', jsonb_build_object('purchase_id', purchase_id, 'idempotency_key', idempotency_key)),
       'SENT', purchase_time
FROM sale
"""


def require_room(purchases: int, directory: Path) -> None:
    """Raises: StackError: the disk has no room for so many."""
    needed, free = purchases * BYTES_PER_PURCHASE + WAL_BYTES, shutil.disk_usage(directory).free
    if free < needed:
        raise StackError(f"{purchases:,} purchases need {needed >> 30} GiB of disk; {free >> 30} GiB are free")


def load(url: str, purchases: int, loaded: Callable[[int], None]) -> None:
    """Load so many purchases of the past months; `loaded` is called with the number of each chunk."""
    first = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=30 * MONTHS)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET timezone = 'UTC'; SET max_parallel_workers_per_gather = 0")
        connection.execute(_PARTITIONS, {"first": first})

    over = Event()

    def load_share(share: int) -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(SESSION)
            for low in range(share * CHUNK, purchases, LOADERS * CHUNK):
                if over.is_set():
                    return
                high = min(low + CHUNK, purchases)
                connection.execute(_CHUNK, {"low": low, "high": high, "first": first, "total": purchases})
                loaded(high - low)

    with ThreadPoolExecutor(LOADERS) as loaders:
        try:
            list(loaders.map(load_share, range(LOADERS)))
        finally:
            over.set()  # on Ctrl-C, nobody begins another chunk
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM (ANALYZE)")  # as autovacuum would have done by now
        connection.execute("CHECKPOINT")
