"""What hangs on a branch, copied from one cell's database to another's. However a function ends, both are right.

Purchases are never changed. So copying is adding what is not there yet, and may be repeated at will. What a cell makes
for itself is not copied but made anew: lines' numbers, and the transaction that recorded a purchase *here*, by which an
audit finds the days to compare again. Events stay where they are: the relay of the cell that recorded a sale sends it,
and that cell's keeper waits for it.
"""

import datetime
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from chassis.lifecycle import Backoff

# Everything that is moved, and how each hangs on the branch. A table that is new belongs here, or to those that stay.
MOVED = (
    "customers",
    "purchases",
    "purchase_items",
    "idempotency_keys",
    "receipts",
    "till_journals",
    "till_sales",
    "till_conflicts",
)
STAYS = ("outbox_events", "branch_moves", "closed_branches")
MADE_ANEW = {"created_xid", "purchase_item_id"}

PURCHASES_AT_ONCE, ITEMS_AT_ONCE, TILL_ROWS_AT_ONCE = 500, 20_000, 5_000
MONTH_ATTEMPTS = 20  # each waits a second at most
NIL = "00000000-0000-0000-0000-000000000000"

Database = psycopg.Connection[Any]


class MoveError(Exception):
    """The move cannot go on; what to do is in the text."""


class Place(NamedTuple):
    """A purchase's, in the order of time."""

    time: datetime.datetime | None
    purchase_id: str


BEGINNING = Place(None, NIL)


class Batch(NamedTuple):
    """Purchases of the branch, as JSON, with what belongs to them."""

    purchases: str
    items: str
    customers: str
    months: list[datetime.date]
    last: Place


def after(source: Database, branch_id: int, place: Place) -> Batch | None:
    """The next purchases in the order of time; None when there are no more."""
    rows = source.execute(
        """
        SELECT purchase_time, purchase_id::text FROM (
            SELECT purchase_time, purchase_id, sum(item_count) OVER (ORDER BY purchase_time, purchase_id) - item_count
                AS items_before
            FROM (
                SELECT purchase_time, purchase_id, item_count FROM purchases
                WHERE branch_id = %(branch_id)s AND purchase_time >= coalesce(%(time)s, '-infinity'::timestamptz)
                    AND (purchase_time, purchase_id) > (coalesce(%(time)s, '-infinity'::timestamptz), %(id)s::uuid)
                ORDER BY purchase_time, purchase_id LIMIT %(purchases)s
            ) AS next
        ) AS counted WHERE items_before < %(items)s ORDER BY 1, 2
        """,
        {
            "branch_id": branch_id,
            "time": place.time,
            "id": place.purchase_id,
            "purchases": PURCHASES_AT_ONCE,
            "items": ITEMS_AT_ONCE,
        },
    ).fetchall()
    return _batch(source, [Place(*row) for row in rows]) if rows else None


def since(source: Database, branch_id: int, xid: str) -> Iterator[Batch]:
    """What was recorded by this transaction and later ones, day by day, as `recorded_days` finds it."""
    bounds = source.execute(
        "SELECT (SELECT purchase_time FROM purchases WHERE branch_id = %(id)s ORDER BY purchase_time LIMIT 1),"
        " (SELECT purchase_time FROM purchases WHERE branch_id = %(id)s ORDER BY purchase_time DESC LIMIT 1)",
        {"id": branch_id},
    ).fetchone()
    if bounds is None or bounds[0] is None:
        return
    rows = source.execute(
        """
        SELECT recorded.purchase_time, recorded.purchase_id::text, recorded.item_count
        FROM generate_series(%(first)s::date - 1, %(last)s::date + 1, interval '1 day') AS day
        CROSS JOIN LATERAL (
            SELECT purchase_time, purchase_id, item_count FROM purchases
            WHERE business_day = day::date AND created_xid >= %(xid)s::xid8
                -- What came with a dump may have ids that this server has not reached: it was in the first copy.
                AND created_xid < pg_snapshot_xmax(pg_current_snapshot())
                AND branch_id + 0 = %(branch_id)s -- the branch's own index would read all that it ever sold
                AND purchase_time >= (day - interval '1 day') AND purchase_time < (day + interval '2 days')
        ) AS recorded
        """,
        {"first": bounds[0].date(), "last": bounds[1].date(), "xid": xid, "branch_id": branch_id},
    ).fetchall()
    places: list[Place] = []
    items = 0
    for moment, purchase_id, item_count in rows:
        if places and (len(places) == PURCHASES_AT_ONCE or items + item_count > ITEMS_AT_ONCE):
            yield _batch(source, places)
            places, items = [], 0
        places.append(Place(moment, purchase_id))
        items += item_count
    if places:
        yield _batch(source, places)


def _batch(source: Database, places: Sequence[Place]) -> Batch:
    times = [place.time for place in places if place.time]
    rows = source.execute(
        """
        WITH these AS MATERIALIZED (
            SELECT * FROM purchases
            WHERE purchase_id = ANY(%(ids)s::uuid[]) AND purchase_time BETWEEN %(from)s AND %(to)s
        )
        SELECT (SELECT jsonb_agg(to_jsonb(p) ORDER BY p.created_xid, p.purchase_id)::text FROM these p),
            (SELECT coalesce(jsonb_agg(to_jsonb(i) ORDER BY i.purchase_item_id), '[]')::text FROM purchase_items i
                WHERE purchase_id = ANY(%(ids)s::uuid[]) AND purchase_time BETWEEN %(from)s AND %(to)s),
            (SELECT coalesce(jsonb_agg(to_jsonb(c)), '[]')::text FROM customers c
                WHERE customer_id IN (SELECT customer_id FROM these)),
            (SELECT array_agg(DISTINCT date_trunc('month', purchase_time)::date) FROM these)
        """,
        {"ids": [place.purchase_id for place in places], "from": min(times), "to": max(times)},
    ).fetchone()
    assert rows is not None
    return Batch._make((*rows, places[-1]))


def ensure_months(target: Database, months: Sequence[datetime.date]) -> None:
    """Have the months made in which purchases are to lie.

    Raises:
        MoveError: one is past the retention there.
    """
    for month in months:
        backoff = Backoff(0.05, 1.0)
        for attempt in range(1, MONTH_ATTEMPTS + 1):
            try:
                target.execute("SELECT ensure_purchases_month(%s)", [month])
                break
            except psycopg.errors.DatetimeFieldOverflow:
                raise MoveError(
                    f"the branch has purchases of {month:%Y-%m}, which the other cell keeps no longer: give both the"
                    " same `retail-purchases retention`, and drop here what is past it"
                ) from None
            except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                if attempt == MONTH_ATTEMPTS:
                    raise
                time.sleep(backoff.next_s())


def add(target: Database, batch: Batch) -> int:
    """Add what is not there yet, in the caller's transaction; returns how many purchases.

    Raises:
        MoveError: their keys or receipt numbers are other sales' there.
    """
    _insert(target, "customers", batch.customers, "customer_id")
    row = target.execute(
        sql.SQL(
            """
            WITH new AS (
                INSERT INTO purchases ({columns})
                SELECT {columns} FROM jsonb_populate_recordset(NULL::purchases, %s::jsonb)
                ON CONFLICT DO NOTHING
                RETURNING *
            ), new_receipt AS (
                INSERT INTO receipts (branch_id, pos_id, business_day, receipt_id, purchase_id, purchase_time)
                SELECT branch_id, pos_id, business_day, receipt_id, purchase_id, purchase_time FROM new
                ORDER BY branch_id, pos_id, business_day, receipt_id
                ON CONFLICT DO NOTHING
                RETURNING purchase_id
            ), new_key AS (
                INSERT INTO idempotency_keys (idempotency_key, purchase_id, purchase_time, event_id)
                SELECT idempotency_key, purchase_id, purchase_time, event_id FROM new ORDER BY idempotency_key
                ON CONFLICT DO NOTHING
                RETURNING purchase_id
            )
            SELECT (SELECT coalesce(array_agg(purchase_id::text), '{{}}') FROM new),
                (SELECT coalesce(sum(item_count), 0) FROM new),
                ARRAY(SELECT purchase_id::text FROM new WHERE purchase_id NOT IN (SELECT purchase_id FROM new_receipt)
                    OR purchase_id NOT IN (SELECT purchase_id FROM new_key))
            """
        ).format(columns=_columns(target, "purchases")),
        [batch.purchases],
    ).fetchone()
    assert row is not None
    new, item_count, taken = row
    if taken:
        raise MoveError(
            f"{len(taken):,} purchases have keys or receipt numbers that other sales have in the other cell, such as"
            f" {', '.join(taken[:3])}: the branch has sold there, too, and somebody has to say which of them are right"
        )
    items = target.execute(
        sql.SQL(
            "INSERT INTO purchase_items ({columns})"
            " SELECT {columns} FROM jsonb_populate_recordset(NULL::purchase_items, %s::jsonb)"
            " WHERE purchase_id = ANY(%s::uuid[]) ORDER BY purchase_item_id"
        ).format(columns=_columns(target, "purchase_items")),
        [batch.items, new],
    )
    if items.rowcount != item_count:
        raise MoveError(f"{items.rowcount:,} lines are there instead of {item_count:,}: a bug, or a broken table")
    return len(new)


def copy_till_sales(source: Database, target: Database, branch_id: int) -> None:
    """Of each journal, what comes after the numbers that are there without a gap."""
    of_branch = "SELECT pos_id, epoch::text, count(*), min(sequence) FROM till_sales WHERE branch_id = %s GROUP BY 1, 2"
    there = {(pos_id, epoch): rest for pos_id, epoch, *rest in target.execute(of_branch, [branch_id])}
    for pos_id, epoch, count, first in source.execute(of_branch, [branch_id]).fetchall():
        if there.get((pos_id, epoch)) == [count, first]:
            continue
        journal = {"branch_id": branch_id, "pos_id": pos_id, "epoch": epoch, "first": first}
        target.execute(  # what has gone here with its month
            "DELETE FROM till_sales WHERE branch_id = %(branch_id)s AND pos_id = %(pos_id)s AND epoch = %(epoch)s"
            " AND sequence < %(first)s",
            journal,
        )
        last = _one(
            target.execute(
                """
                SELECT coalesce(max(sequence), 0) FROM (
                    SELECT sequence, row_number() OVER (ORDER BY sequence) AS n FROM till_sales
                    WHERE branch_id = %(branch_id)s AND pos_id = %(pos_id)s AND epoch = %(epoch)s
                ) AS numbered WHERE sequence = %(first)s + n - 1
                """,
                journal,
            )
        )
        while True:
            rows, size, last_one = source.execute(
                """
                SELECT coalesce(jsonb_agg(to_jsonb(s)), '[]')::text, count(*), max(sequence) FROM (
                    SELECT * FROM till_sales WHERE branch_id = %(branch_id)s AND pos_id = %(pos_id)s
                        AND epoch = %(epoch)s AND sequence > %(last)s ORDER BY sequence LIMIT %(limit)s
                ) AS s
                """,
                {**journal, "last": last, "limit": TILL_ROWS_AT_ONCE},
            ).fetchall()[0]
            if not size:
                break
            _insert(target, "till_sales", rows, "sequence")
            last = last_one


def copy_tills(source: Database, target: Database, branch_id: int) -> None:
    """What changes, or is little: to be done when nothing is written any more."""
    copy_till_sales(source, target, branch_id)
    for table in ("till_journals", "till_conflicts"):
        rows = _one(
            source.execute(
                sql.SQL("SELECT coalesce(jsonb_agg(to_jsonb(t)), '[]')::text FROM {} t WHERE branch_id = %s").format(
                    sql.Identifier(table)
                ),
                [branch_id],
            )
        )
        with target.transaction():
            target.execute(  # those of an earlier call, or of an earlier stay
                sql.SQL("DELETE FROM {} WHERE branch_id = %s").format(sql.Identifier(table)), [branch_id]
            )
            _insert(target, table, rows, "pos_id, epoch")


def difference(source: Database, target: Database, branch_id: int) -> str | None:
    """What the one has and the other has not, if anything. Months that have gone here meanwhile are nobody's loss."""
    first = _one(
        source.execute(
            "SELECT coalesce((SELECT purchase_time FROM purchases WHERE branch_id = %s ORDER BY purchase_time LIMIT 1),"
            " 'infinity'::timestamptz)::text",
            [branch_id],
        )
    )
    for table, figures in _FIGURES.items():
        since = "AND purchase_time >= %(first)s::timestamptz" if table in ("purchases", "receipts") else ""
        statement = sql.SQL("SELECT {} FROM {} WHERE branch_id = %(id)s {}").format(
            sql.SQL(figures), sql.Identifier(table), sql.SQL(since)
        )
        here, there = (
            side.execute(statement, {"id": branch_id, "first": first}).fetchone() for side in (source, target)
        )
        if here != there:
            return f"{table}: {figures} are {here} here and {there} there"
    return None


_FIGURES = {
    "purchases": "count(*), count(customer_id), sum(item_count), sum(total_amount),"
    " bit_xor(hashtextextended(purchase_id::text, 0))",
    "receipts": "count(*), bit_xor(hashtextextended(purchase_id::text, 0))",
    "till_sales": "count(*), sum(sequence), bit_xor(hashtextextended(purchase_id::text, 0))",
    "till_journals": "count(*), sum(last_sequence), sum(complete_through)",
    "till_conflicts": "count(*), bit_xor(hashtextextended(purchase_id::text, 0))",
}


def _insert(target: Database, table: str, rows: str, order: str) -> None:
    target.execute(
        sql.SQL(
            "INSERT INTO {table} ({columns}) SELECT {columns} FROM jsonb_populate_recordset(NULL::{table}, %s::jsonb)"
            " ORDER BY {order} ON CONFLICT DO NOTHING"
        ).format(table=sql.Identifier(table), columns=_columns(target, table), order=sql.SQL(order)),
        [rows],
    )


def _columns(database: Database, table: str) -> sql.Composable:
    rows = database.execute(
        "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY 1",
        [table],
    ).fetchall()
    return sql.SQL(", ").join(sql.Identifier(name) for (name,) in rows if name not in MADE_ANEW)


def _one(cursor: psycopg.Cursor[Any]) -> Any:
    ((value,),) = cursor.fetchall()
    return value
