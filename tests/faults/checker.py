"""Counts every cent: what the tills know against what two databases, the broker and the analytics service say.

Shares no code with the services: plain SQL, plain Python, whole cents. It reads the ledger and the end state, so it can
be run again on what a run has left behind. Every difference is a finding; a correct system has none.
"""

import datetime
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, LiteralString, NamedTuple
from zoneinfo import ZoneInfo

import psycopg

from tests.faults import ledger
from tests.faults.ledger import Sale

FUTURE_US = 300_000_000  # a sale may be dated five minutes ahead
DETAILS_MAX = 20  # of a kind; the others are counted
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)

Connection = psycopg.Connection[tuple[Any, ...]]

LOST = "lost"  # acknowledged, and not stored or not counted
DOUBLED = "doubled"  # stored or counted more than once
FALSELY_SENT = "falsely_sent"  # marked as sent, the queue is empty, and no consumer has seen it
PARKED_GOOD = "parked_good"  # failed or quarantined though nothing is wrong with it
INVENTED = "invented"  # stored or counted, and never sold
ALTERED = "altered"  # stored or counted otherwise than sold
REFUSED = "refused"  # though nothing spoke against it
STORED_REFUSED = "stored_refused"  # refused, and stored all the same
WRONG_ANSWER = "wrong_answer"  # INTERNAL, UNKNOWN, or another sale's
LEFTOVER = "leftover"  # a key or a receipt number without a purchase
POISON = "poison"  # a bad message is not where it belongs: dropped, counted, or quarantined twice
NOT_QUIET = "not_quiet"  # work is left, long after everything is well again
UNTRUE = "untrue"  # complete_through_time claims what is not there
WENT_BACK = "went_back"  # complete_through_time
UNBALANCED = "unbalanced"  # read models of one moment contradict each other


class Findings:
    """What is wrong: how often, and the first of each kind in words."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.details: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, detail: str, count: int = 1) -> None:
        self.counts[kind] += count
        if len(self.details[kind]) < DETAILS_MAX:
            self.details[kind].append(detail)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def lines(self) -> Iterator[str]:
        for kind, count in self.counts.items():
            yield f"{kind}: {count}"
            yield from (f"    {detail}" for detail in self.details[kind])


class Told(NamedTuple):
    """The ledger, read."""

    sales: dict[int, Sale]
    by_key: dict[str, list[int]]
    purchase_ids: dict[int, set[str]]  # of the acknowledged ones
    refusals: dict[int, list[tuple[str, float]]]  # reason, when
    dropped: list[tuple[int, float]]  # months before which time were gone, and when that was seen
    poison: dict[str, bool]  # SHA-256 of the bad bodies that were sent: whether the broker took it
    wrong: list[str]


def read_ledger(path: Path) -> Told:
    told = Told({}, defaultdict(list), defaultdict(set), defaultdict(list), [], {}, [])
    for line in ledger.read(path):
        match line["what"]:
            case "sent":
                sale = ledger.sale_of(line)
                told.sales[sale.number] = sale
                told.by_key[sale.key].append(sale.number)
            case "ok":
                told.purchase_ids[line["number"]].add(line["purchase_id"])
            case "refused":
                told.refusals[line["number"]].append((line["reason"], line["at"]))
            case "dropped":
                told.dropped.append((line["before_us"], line["at"]))
            case "poison_sent":
                told.poison[line["sha256"]] = False
            case "poison":
                told.poison[line["sha256"]] = True
            case "wrong":
                told.wrong.append(f"sale {line['number']}: {line['why']}" if line["number"] else line["why"])
    return told


class Stored(NamedTuple):
    """A purchase as the tables have it."""

    purchase_id: str
    event_id: str
    key: str
    receipt_id: str
    branch_id: int
    cashier_id: int
    pos_id: str
    customer_id: str | None
    time_us: int
    cents: int
    item_count: int


class Checker:
    """One check of everything, on open connections: a test may have changed something within their transactions."""

    def __init__(
        self, path: Path, purchases: Connection, analytics: Connection, zone: str, findings: Findings | None = None
    ) -> None:
        self.findings = Findings() if findings is None else findings
        self._told = read_ledger(path)
        self._purchases, self._analytics = purchases, analytics
        self._zone = ZoneInfo(zone)
        self._dropped_before_us = 0
        self._stored: dict[int, Stored] = {}  # by the sale's number
        self._counted: list[Sale] = []  # what every read model must be the sum of

    @property
    def counted(self) -> list[tuple[Sale, datetime.date]]:
        """What was counted, and on which business day."""
        return [(sale, self._day(sale.time_us)) for sale in self._counted]

    def check(self) -> Findings:
        (dropped_before,) = self._one(self._purchases, "SELECT dropped_before FROM chain_settings")
        self._dropped_before_us = _us(datetime.datetime.combine(dropped_before, datetime.time(), datetime.UTC))
        for why in self._told.wrong:
            self.findings.add(WRONG_ANSWER, why)
        self._check_purchases()
        self._check_acknowledged()
        self._check_refusals()
        self._check_events()
        self._check_read_models()
        return self.findings

    # --- the purchases side ---

    def _check_purchases(self) -> None:
        """Every stored purchase is one that was sold, as it was sold, once; keys and receipts are exactly theirs."""
        items: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for purchase_id, product, cents, line_cents in self._rows(
            self._purchases,
            "SELECT purchase_id::text, product_id, (unit_price * 100)::bigint, (line_total * 100)::bigint"
            " FROM purchase_items",
        ):
            items[purchase_id].append((product, cents))
            if cents != line_cents:
                self.findings.add(ALTERED, f"purchase {purchase_id}: a line's total is not its price")
        keys: Counter[str] = Counter()
        receipts: Counter[tuple[object, ...]] = Counter()
        for row in self._rows(
            self._purchases,
            "SELECT purchase_id::text, event_id::text, idempotency_key::text, receipt_id, branch_id, cashier_id,"
            " pos_id, customer_id::text, (extract(epoch FROM purchase_time) * 1000000)::bigint,"
            " (total_amount * 100)::bigint, item_count FROM purchases",
        ):
            stored = Stored(*row)
            keys[stored.key] += 1
            receipts[stored.branch_id, stored.pos_id, self._day(stored.time_us), stored.receipt_id] += 1
            self._match(stored, items.pop(stored.purchase_id, []))
        for purchase_id in items:
            self.findings.add(ALTERED, f"lines of purchase {purchase_id}, which is not there")
        # Retention deletes a month's keys and receipt numbers after the month itself, in its own time.
        self._compare_holders(
            "idempotency keys",
            keys,
            "SELECT idempotency_key::text, bool_and(purchase_time < dropped_before::timestamp AT TIME ZONE 'UTC')"
            " FROM idempotency_keys, chain_settings GROUP BY 1",
        )
        self._compare_holders(
            "receipt numbers",
            receipts,
            "SELECT branch_id, pos_id, business_day, receipt_id,"
            " bool_and(purchase_time < dropped_before::timestamp AT TIME ZONE 'UTC')"
            " FROM receipts, chain_settings GROUP BY 1, 2, 3, 4",
        )

    def _match(self, stored: Stored, items: list[tuple[int, int]]) -> None:
        numbers = self._told.by_key.get(stored.key)
        if numbers is None:
            self.findings.add(INVENTED, f"purchase {stored.purchase_id}: no till has sent its key {stored.key}")
            return
        # Sales under one key may be equal but for the way to register the customer: it is the one that was taken.
        for number in sorted(numbers, key=lambda n: n not in self._told.purchase_ids):
            if self._same(self._told.sales[number], stored, items):
                self._stored.setdefault(number, stored)
                return
        self.findings.add(ALTERED, f"purchase {stored.purchase_id} is not what sale {numbers} was")

    @staticmethod
    def _same(sale: Sale, stored: Stored, items: list[tuple[int, int]]) -> bool:
        return (
            (sale.key, sale.receipt_id, sale.branch_id, sale.cashier_id, sale.pos_id, sale.customer_id, sale.time_us)
            == (
                stored.key,
                stored.receipt_id,
                stored.branch_id,
                stored.cashier_id,
                stored.pos_id,
                stored.customer_id,
                stored.time_us,
            )
            and sorted(sale.items) == sorted(items)
            and (sale.cents, len(sale.items)) == (stored.cents, stored.item_count)
        )

    def _compare_holders(self, what: str, wanted: Counter[Any], query: LiteralString) -> None:
        """The table that makes something unique has exactly what the purchases have, each once."""
        for thing, count in wanted.items():
            if count > 1:
                self.findings.add(DOUBLED, f"{what}: {thing} has {count} purchases", count - 1)
        found = {row[0] if len(row) == 2 else row[:-1]: row[-1] for row in self._rows(self._purchases, query)}
        for thing, dropped in found.items():
            if thing not in wanted and not dropped:
                self.findings.add(LEFTOVER, f"{what}: {thing} has no purchase")
        for thing in wanted.keys() - found.keys():
            self.findings.add(LEFTOVER, f"{what}: {thing} of a purchase is not there")

    def _check_acknowledged(self) -> None:
        for number, ids in self._told.purchase_ids.items():
            sale, stored = self._told.sales[number], self._stored.get(number)
            if len(ids) > 1:
                self.findings.add(DOUBLED, f"sale {number} was acknowledged as {sorted(ids)}", len(ids) - 1)
            if stored is not None and stored.purchase_id not in ids:
                self.findings.add(DOUBLED, f"sale {number} was acknowledged as {ids}, stored as {stored.purchase_id}")
            if stored is None and not self._dropped(sale):
                self.findings.add(LOST, f"sale {number}, acknowledged as {ids}, is not stored")

    def _dropped(self, sale: Sale) -> bool:
        """Whether retention has taken its month."""
        return sale.time_us < self._dropped_before_us

    def _gone_at(self, sale: Sale) -> float:
        """When retention had dropped the sale's month, at the latest."""
        return min((at for before_us, at in self._told.dropped if sale.time_us < before_us), default=float("inf"))

    def _check_refusals(self) -> None:
        """A refused sale is not stored, and something must speak against it."""
        receipts = {self._receipt(self._told.sales[n]): n for n in self._stored}
        for number, refusals in self._told.refusals.items():
            sale = self._told.sales[number]
            if number in self._stored and number not in self._told.purchase_ids:
                self.findings.add(STORED_REFUSED, f"sale {number} was refused ({refusals[0][0]}) and is stored")
            for reason, at in refusals:
                if not self._founded(sale, reason, at, receipts):
                    self.findings.add(REFUSED, f"sale {number} was refused ({reason}) without a ground")

    def _founded(self, sale: Sale, reason: str, at: float, receipts: dict[tuple[object, ...], int]) -> bool:
        others = [n for n in self._told.by_key[sale.key] if n != sale.number]
        match reason:
            case "PURCHASE_TIME_OUT_OF_RANGE":
                return sale.time_us > at * 1_000_000 + FUTURE_US or self._dropped(sale)
            case "IDEMPOTENCY_KEY_REUSED":
                return any(n in self._stored or self._dropped(self._told.sales[n]) for n in others)
            case "RECEIPT_EXISTS":
                holder = receipts.get(self._receipt(sale))
                return (holder is not None and holder != sale.number) or self._dropped(sale)
            case "CUSTOMER_NOT_FOUND":
                return sale.customer_id is not None and not sale.register
            case _:
                return False

    def _receipt(self, sale: Sale) -> tuple[object, ...]:
        return sale.branch_id, sale.pos_id, self._day(sale.time_us), sale.receipt_id

    # --- between ---

    def _check_events(self) -> None:
        """Each purchase has one event, which says what the purchase is, and the event was counted."""
        counted = {row[0] for row in self._rows(self._analytics, "SELECT event_id::text FROM analytics_event_log")}
        quarantined = self._check_quarantine()
        stored = {row.purchase_id: (number, row) for number, row in self._stored.items()}
        seen: Counter[str] = Counter()
        known = set()
        for event_id, purchase_id, status, attempts, sent_at, body in self._rows(
            self._purchases,
            "SELECT event_id::text, aggregate_id::text, status, attempts, extract(epoch FROM sent_at)::float8,"
            " payload_json::text FROM outbox_events",
        ):
            known.add(event_id)
            seen[purchase_id] += 1
            sale = self._sale_of_event(event_id, purchase_id, body)
            self._check_origin(event_id, purchase_id, sale, stored.get(purchase_id, (0, None))[1])
            if sale is not None and purchase_id not in stored and (sent_at or 0) > self._gone_at(sale):
                self.findings.add(LOST, f"sale {sale.number} was dropped by retention before its event was sent")
            if status == "NEW":
                self.findings.add(NOT_QUIET, f"event {event_id} is not sent")
            if status == "FAILED" or attempts:
                self.findings.add(PARKED_GOOD, f"event {event_id} is {status} after {attempts} attempts")
            if event_id in quarantined:
                self.findings.add(PARKED_GOOD, f"event {event_id} is quarantined: {quarantined[event_id]}")
            if event_id in counted:
                if sale is not None:
                    self._counted.append(sale)
                continue
            if status == "SENT" and event_id not in quarantined:
                self.findings.add(FALSELY_SENT, f"event {event_id} is sent, and was never counted")
            if sale is not None and sale.number in self._told.purchase_ids:
                self.findings.add(LOST, f"sale {sale.number}, acknowledged, is not counted: event {event_id}, {status}")
        for event_id in counted - known:
            self.findings.add(INVENTED, f"event {event_id} was counted, and is no purchase's")
        self._check_one_each(seen, stored)

    def _check_one_each(self, seen: Counter[str], stored: dict[str, tuple[int, Stored]]) -> None:
        for purchase_id, count in seen.items():
            if count > 1:
                self.findings.add(DOUBLED, f"purchase {purchase_id} has {count} events", count - 1)
        for purchase_id, (number, _) in stored.items():
            if purchase_id not in seen:
                kind = LOST if number in self._told.purchase_ids else NOT_QUIET
                self.findings.add(kind, f"purchase {purchase_id} (sale {number}) has no event")

    def _check_origin(self, event_id: str, purchase_id: str, sale: Sale | None, stored: Stored | None) -> None:
        """The event and its purchase name each other and say the same."""
        if sale is None or (stored is not None and self._stored.get(sale.number) != stored):
            self.findings.add(ALTERED, f"event {event_id} is not what purchase {purchase_id} was")
        elif stored is None and not self._dropped(sale):
            self.findings.add(INVENTED, f"event {event_id} of a purchase that is not there")
        if stored is not None and stored.event_id != event_id:
            self.findings.add(ALTERED, f"purchase {purchase_id} names another event than {event_id}")

    def _check_quarantine(self) -> dict[str, str]:
        """What is quarantined by event id. Bad messages are there, each once."""
        bodies: Counter[str] = Counter()
        reasons = {}
        for event_id, reason, body in self._rows(
            self._analytics, "SELECT event_id::text, reason, body FROM quarantined_events"
        ):
            sha256 = hashlib.sha256(body).hexdigest()
            if sha256 in self._told.poison:
                bodies[sha256] += 1
            elif event_id is None:
                self.findings.add(POISON, f"something that nobody sent is quarantined: {body[:80]!r}")
            else:
                reasons[event_id] = reason
        for sha256, taken in self._told.poison.items():
            if bodies[sha256] > 1 or (taken and not bodies[sha256]):
                self.findings.add(POISON, f"a bad message is {bodies[sha256]} times in quarantine: {sha256}")
        return reasons

    def _sale_of_event(self, event_id: str, purchase_id: str, body: str) -> Sale | None:
        """The sale that the event announces; None when it says something else."""
        event = json.loads(body, parse_float=Decimal, parse_int=Decimal)
        purchase = event["purchase"]
        if (event["event_id"], event["event_type"], purchase["purchase_id"]) != (
            event_id,
            "PurchaseCreated",
            purchase_id,
        ):
            return None
        time_us = _us(datetime.datetime.fromisoformat(purchase["purchase_time"]))
        items = sorted((item["product_id"], item["unit_price"] * 100) for item in purchase["items"] if item["qty"] == 1)
        numbers = self._told.by_key.get(purchase["idempotency_key"], [])
        for number in sorted(numbers, key=lambda n: n not in self._told.purchase_ids):
            sale = self._told.sales[number]
            if (
                (sale.receipt_id, sale.branch_id, sale.cashier_id, sale.pos_id, sale.customer_id, sale.time_us)
                == (
                    purchase["receipt_id"],
                    purchase["branch_id"],
                    purchase["cashier_id"],
                    purchase["pos_id"],
                    purchase.get("customer_id"),
                    time_us,
                )
                and sorted(sale.items) == items
                and len(purchase["items"]) == len(sale.items)
                and purchase["total_amount"] * 100 == sale.cents
            ):
                return sale
        return None

    # --- the analytics side ---

    def _check_read_models(self) -> None:
        """Every table, row by row, is the sum of what was counted."""
        for name, table in TABLES.items():
            wanted: dict[tuple[object, ...], list[Any]] = {}
            for sale in self._counted:
                for key, values in table.rows(sale, self._day(sale.time_us)):
                    row = wanted.setdefault(key, [0] * len(values))
                    for column, value in enumerate(values):
                        is_maximum = column == table.maximum
                        row[column] = max(row[column], value) if is_maximum else row[column] + value
            if name == "sales_totals":
                self._add_unique_customers(wanted)
            found = {
                tuple(row[: table.key]): list(row[table.key :]) for row in self._rows(self._analytics, table.query)
            }
            for key in sorted(wanted.keys() | found.keys(), key=repr):
                if wanted.get(key) != found.get(key):
                    self._differs(name, table, key, wanted.get(key), found.get(key))

    def _add_unique_customers(self, wanted: dict[tuple[object, ...], list[Any]]) -> None:
        for (branch,), row in wanted.items():
            row.append(len({s.customer_id for s in self._counted if s.customer_id and branch in (0, s.branch_id)}))

    def _differs(
        self, name: str, table: "Table", key: tuple[object, ...], wanted: list[Any] | None, found: list[Any] | None
    ) -> None:
        detail = f"{name} {tuple(map(str, key))}: {found} instead of {wanted}"
        self.findings.add(ALTERED, detail)
        if name == "daily_sales_by_branch":  # the table that counts each purchase exactly once
            more = (found or [0] * 4)[2] - (wanted or [0] * 4)[2]
            if more:
                self.findings.add(DOUBLED if more > 0 else LOST, detail, abs(more))

    def _day(self, time_us: int) -> datetime.date:
        return (EPOCH + datetime.timedelta(microseconds=time_us)).astimezone(self._zone).date()

    @staticmethod
    def _rows(connection: Connection, query: LiteralString) -> Iterator[tuple[Any, ...]]:
        with connection.cursor() as cursor:
            cursor.execute(query)
            yield from cursor

    @staticmethod
    def _one(connection: Connection, query: LiteralString) -> tuple[Any, ...]:
        row = connection.execute(query).fetchone()
        assert row is not None
        return row


class Table(NamedTuple):
    """A read model: how to read it (key first, money in cents), and what one sale adds to it."""

    query: LiteralString
    key: int  # how many columns of a row are its key
    rows: Callable[[Sale, datetime.date], Iterable[tuple[tuple[object, ...], Sequence[int]]]]
    maximum: int = -1  # the column that is a maximum instead of a sum


def _sums(sale: Sale) -> tuple[int, int, int, int]:
    return sale.cents, len(sale.items), 1, int(sale.customer_id is not None)


def _visits(sale: Sale, *key: object) -> Iterator[tuple[tuple[object, ...], Sequence[int]]]:
    if sale.customer_id:
        yield (sale.customer_id, *key), (1, sale.time_us)


_SUMS: LiteralString = "(revenue_sum * 100)::bigint, items_sum, purchases_count, purchases_with_customer_count"
_PRODUCT_SUMS: LiteralString = "qty_sum, (revenue_sum * 100)::bigint"
_VISITS: LiteralString = "purchases_count, (extract(epoch FROM last_purchase_at) * 1000000)::bigint"

TABLES = {
    "daily_sales_by_branch": Table(
        f"SELECT day, branch_id, {_SUMS} FROM daily_sales_by_branch",
        2,
        lambda sale, day: [((day, sale.branch_id), _sums(sale))],
    ),
    "daily_sales_of_chain": Table(
        f"SELECT day, {_SUMS} FROM daily_sales_of_chain", 1, lambda sale, day: [((day,), _sums(sale))]
    ),
    "monthly_sales_by_branch": Table(
        f"SELECT branch_id, month, {_SUMS} FROM monthly_sales_by_branch",
        2,
        lambda sale, day: [((branch, day.replace(day=1)), _sums(sale)) for branch in (0, sale.branch_id)],
    ),
    "product_sales_daily": Table(
        f"SELECT day, branch_id, product_id, {_PRODUCT_SUMS} FROM product_sales_daily",
        3,
        lambda sale, day: [((day, sale.branch_id, product), (1, cents)) for product, cents in sale.items],
    ),
    "product_sales_monthly": Table(
        f"SELECT month, product_id, {_PRODUCT_SUMS} FROM product_sales_monthly",
        2,
        lambda sale, day: [((day.replace(day=1), product), (1, cents)) for product, cents in sale.items],
    ),
    "product_sales_totals": Table(
        f"SELECT branch_id, product_id, {_PRODUCT_SUMS} FROM product_sales_totals",
        2,
        lambda sale, _: [
            ((branch, product), (1, cents)) for branch in (0, sale.branch_id) for product, cents in sale.items
        ],
    ),
    "customer_loyalty": Table(
        f"SELECT customer_id::text, branch_id, {_VISITS} FROM customer_loyalty",
        2,
        lambda sale, _: _visits(sale, sale.branch_id),
        maximum=1,
    ),
    "customer_loyalty_chain": Table(
        f"SELECT customer_id::text, {_VISITS} FROM customer_loyalty_chain", 1, lambda sale, _: _visits(sale), maximum=1
    ),
    "sales_totals": Table(
        f"SELECT branch_id, {_SUMS}, unique_customers_count FROM sales_totals",
        1,
        lambda sale, _: [((branch,), _sums(sale)) for branch in (0, sale.branch_id)],
    ),
}
OTHER_TABLES = {
    "analytics_event_log", "quarantined_events", "freshness", "analytics_settings", "schema_migrations",
    "message_trials", "audit_status", "rebuild_tail",
}  # fmt: skip


def unchecked_tables(analytics: Connection) -> set[str]:
    """Tables that are new since this checker was written: it says so, rather than pass them over."""
    rows = analytics.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
    return {str(name) for (name,) in rows} - TABLES.keys() - OTHER_TABLES


def _us(moment: datetime.datetime) -> int:
    return (moment - EPOCH) // datetime.timedelta(microseconds=1)
