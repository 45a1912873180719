"""Can the checker see at all? Each change of what a run has left behind must be a finding of the right kind.

Everything happens within transactions that are rolled back: checked, changed, checked, as it was.
"""

from typing import LiteralString, NamedTuple

from tests.faults.checker import Checker
from tests.faults.findings import (
    ALTERED,
    DOUBLED,
    FALSELY_SENT,
    INVENTED,
    LEFTOVER,
    LOST,
    NOT_QUIET,
    PARKED_GOOD,
    POISON,
)
from tests.faults.ledger import Ledger
from tests.faults.system import TIME_ZONE, System


class Change(NamedTuple):
    what: str
    database: str
    sql: LiteralString
    finding: str


_SOME_SALE: LiteralString = (
    "(SELECT purchase_id FROM purchases WHERE purchase_time > now() - interval '20 days' ORDER BY purchase_id LIMIT 1)"
)
_SOME_EVENT: LiteralString = "(SELECT event_id FROM outbox_events ORDER BY event_id OFFSET 20 LIMIT 1)"


def _one_row(table: LiteralString, change: LiteralString, finding: str = ALTERED) -> Change:
    return Change(
        f"{table}: {change}",
        "analytics",
        "UPDATE " + table + " SET " + change + " WHERE ctid = (SELECT ctid FROM " + table + " LIMIT 1)",
        finding,
    )


CHANGES = [
    Change(
        "a sale is gone",
        "purchases",
        f"CREATE TEMPORARY TABLE gone AS SELECT {_SOME_SALE} AS purchase_id;"
        " DELETE FROM purchase_items USING gone WHERE purchase_items.purchase_id = gone.purchase_id;"
        " DELETE FROM purchases USING gone WHERE purchases.purchase_id = gone.purchase_id",
        LOST,
    ),
    Change("an item is gone", "purchases", f"DELETE FROM purchase_items WHERE purchase_id = {_SOME_SALE}", ALTERED),
    Change(
        "a cent more",
        "purchases",
        f"UPDATE purchases SET total_amount = total_amount + 0.01 WHERE purchase_id = {_SOME_SALE}",
        ALTERED,
    ),
    Change(
        "another cashier",
        "purchases",
        f"UPDATE purchases SET cashier_id = 99 WHERE purchase_id = {_SOME_SALE}",
        ALTERED,
    ),
    Change("a key is gone", "purchases", f"DELETE FROM idempotency_keys WHERE purchase_id = {_SOME_SALE}", LEFTOVER),
    Change("a receipt is gone", "purchases", f"DELETE FROM receipts WHERE purchase_id = {_SOME_SALE}", LEFTOVER),
    Change(
        "a key of nothing",
        "purchases",
        "INSERT INTO idempotency_keys VALUES (gen_random_uuid(), gen_random_uuid(), now(), gen_random_uuid())",
        LEFTOVER,
    ),
    Change("an event is gone", "purchases", f"DELETE FROM outbox_events WHERE event_id = {_SOME_EVENT}", LOST),
    Change(
        "a second event",
        "purchases",
        "INSERT INTO outbox_events (event_id, event_type, aggregate_id, occurred_at, payload_json, status)"
        " SELECT (left(event_id::text, 24) || '123456789abc')::uuid, event_type, aggregate_id, occurred_at,"
        f" payload_json, 'SENT' FROM outbox_events WHERE event_id = {_SOME_EVENT}",
        DOUBLED,
    ),
    Change(
        "an event says another total",
        "purchases",
        "UPDATE outbox_events SET payload_json = jsonb_set(payload_json, '{purchase,total_amount}', '0.01')"
        f" WHERE event_id = {_SOME_EVENT}",
        ALTERED,
    ),
    Change(
        "an event waits",
        "purchases",
        f"UPDATE outbox_events SET status = 'NEW' WHERE event_id = {_SOME_EVENT}",
        NOT_QUIET,
    ),
    Change(
        "an event is given up",
        "purchases",
        "UPDATE outbox_events SET status = 'FAILED', attempts = 5, next_attempt_at = 'infinity'"
        f" WHERE event_id = {_SOME_EVENT}",
        PARKED_GOOD,
    ),
    Change(
        "an event is not in the log",
        "analytics",
        "DELETE FROM analytics_event_log WHERE ctid = (SELECT ctid FROM analytics_event_log LIMIT 1)",
        FALSELY_SENT,
    ),
    Change(
        "a stranger is in the log",
        "analytics",
        "INSERT INTO analytics_event_log (event_id, day, event_type) VALUES (gen_random_uuid(), '2026-01-06', 'X')",
        INVENTED,
    ),
    Change("the quarantine is empty", "analytics", "DELETE FROM quarantined_events", POISON),
    Change(
        "a good event is quarantined",
        "analytics",
        "INSERT INTO quarantined_events (event_id, reason, detail, body, properties)"
        " SELECT event_id, 'X', 'x', 'x', '{}' FROM analytics_event_log LIMIT 1",
        PARKED_GOOD,
    ),
    _one_row("daily_sales_by_branch", "purchases_count = purchases_count + 1", DOUBLED),
    _one_row(
        "daily_sales_by_branch",
        "purchases_count = purchases_count - 1,"
        " purchases_with_customer_count = least(purchases_with_customer_count, purchases_count - 1)",
        LOST,
    ),
    _one_row("daily_sales_by_branch", "revenue_sum = revenue_sum + 0.01"),
    _one_row("daily_sales_of_chain", "items_sum = items_sum + 1"),
    _one_row("monthly_sales_by_branch", "revenue_sum = revenue_sum + 0.01"),
    _one_row("product_sales_daily", "qty_sum = qty_sum + 1"),
    _one_row("product_sales_of_chain_sums", "revenue_sum = revenue_sum + 0.01"),
    _one_row("product_sales_totals", "revenue_sum = revenue_sum + 0.01"),
    _one_row("customer_loyalty", "purchases_count = purchases_count + 1"),
    _one_row("customer_loyalty_chain", "last_purchase_at = last_purchase_at + interval '1 second'"),
    _one_row("sales_totals", "unique_customers_count = unique_customers_count - 1"),
]


def unseen(system: System, ledger: Ledger) -> list[str]:
    """The changes that the checker does not see, or takes for something else."""
    missed = []
    for change in CHANGES:
        with system.connections() as (purchases, analytics):
            changed = next(iter(purchases.values())) if change.database == "purchases" else analytics
            changed.execute(change.sql)
            found = Checker(ledger.path, purchases, analytics, TIME_ZONE).check().counts
            for connection in (*purchases.values(), analytics):
                connection.rollback()
        if change.finding not in found:
            missed.append(f"{change.what}: found {dict(found)} instead of {change.finding}")
    return missed
