"""Counts every cent: what the tills know against what two databases, the broker and the analytics service say.

Shares no code with the services: plain SQL, plain Python, whole cents. It reads the ledger and the end state, so it can
be run again on what a run has left behind. Every difference is a finding; a correct system has none.
"""

import datetime
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, LiteralString, NamedTuple
from zoneinfo import ZoneInfo

from tests.faults.findings import (
    ALTERED,
    DOUBLED,
    FALSELY_SENT,
    INVENTED,
    LATE,
    LEFTOVER,
    LOST,
    NOT_QUIET,
    PARKED_GOOD,
    POISON,
    REFUSED,
    STOPPED,
    STORED_REFUSED,
    WRONG_ANSWER,
    Findings,
)  # fmt: skip
from tests.faults.ledger import EPOCH, Sale, business_day, read_ledger
from tests.faults.read_models import Connection, check_read_models

FUTURE_US = 300_000_000  # a sale may be dated five minutes ahead
LATE_S = 15.0  # from a sale to its publication, on a machine that is busy with other things
RECOVERY_S = 30.0  # after a fault has ended
HARMLESS = ("till.clock", "message.bad", "message.again", "message.redriven")  # to publishing


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
        self,
        path: Path,
        purchases: Mapping[str, Connection],
        analytics: Connection,
        zone: str,
        findings: Findings | None = None,
    ) -> None:
        """`purchases` are the databases of all cells, in their order, which take turns having the branches."""
        self.findings = Findings() if findings is None else findings
        self._told = read_ledger(path)
        self._purchases, self._analytics = purchases, analytics
        self._zone = ZoneInfo(zone)
        self._dropped_before_us: dict[str, int] = {}  # by database
        self._stored: dict[int, Stored] = {}  # by the sale's number
        self._counted: list[Sale] = []  # what every read model must be the sum of

    @property
    def counted(self) -> list[tuple[Sale, datetime.date]]:
        """What was counted, and on which business day."""
        return [(sale, self._day(sale.time_us)) for sale in self._counted]

    def check(self) -> Findings:
        for database, connection in self._purchases.items():
            (before,) = self._one(connection, "SELECT dropped_before FROM chain_settings")
            midnight = datetime.datetime.combine(before, datetime.time(), datetime.UTC)
            self._dropped_before_us[database] = _us(midnight)
        for why in self._told.wrong:
            self.findings.add(WRONG_ANSWER, why)
        for why in self._told.stopped:
            self.findings.add(STOPPED, why)
        self._check_purchases()
        self._check_acknowledged()
        self._check_refusals()
        self._check_events()
        check_read_models(self._analytics, self.counted, self.findings)
        return self.findings

    # --- the purchases side ---

    def _check_purchases(self) -> None:
        """Every stored purchase is one that was sold, as it was sold, once; keys and receipts are exactly theirs."""
        items: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for _, purchase_id, product, cents, line_cents in self._recorded(
            "SELECT purchase_id::text, product_id, (unit_price * 100)::bigint, (line_total * 100)::bigint"
            " FROM purchase_items",
        ):
            items[purchase_id].append((product, cents))
            if cents != line_cents:
                self.findings.add(ALTERED, f"purchase {purchase_id}: a line's total is not its price")
        keys: Counter[str] = Counter()
        receipts: Counter[tuple[object, ...]] = Counter()
        for database, *row in self._recorded(
            "SELECT purchase_id::text, event_id::text, idempotency_key::text, receipt_id, branch_id, cashier_id,"
            " pos_id, customer_id::text, (extract(epoch FROM purchase_time) * 1000000)::bigint,"
            " (total_amount * 100)::bigint, item_count FROM purchases",
        ):
            stored = Stored(*row)
            keys[stored.key] += 1
            receipts[stored.branch_id, stored.pos_id, self._day(stored.time_us), stored.receipt_id] += 1
            if database != self._database_of(stored.branch_id):
                self.findings.add(INVENTED, f"purchase {stored.purchase_id} is in {database}, another cell's database")
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
        numbers = self._told.under(stored.key)
        if not numbers:
            self.findings.add(INVENTED, f"purchase {stored.purchase_id}: no till has sent its key {stored.key}")
            return
        for number in numbers:
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
        found = {row[0] if len(row) == 2 else tuple(row[:-1]): row[-1] for _, *row in self._recorded(query)}
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
        return sale.time_us < self._dropped_before_us[self._database_of(sale.branch_id)]

    def _database_of(self, branch_id: int) -> str:
        """Whose cell has the branch."""
        return list(self._purchases)[(branch_id - 1) % len(self._purchases)]

    def _gone_at(self, sale: Sale) -> float:
        """When retention had dropped the sale's month, at the latest."""
        own = self._database_of(sale.branch_id)
        times = (at for before_us, at, where in self._told.dropped if sale.time_us < before_us and where == own)
        return min(times, default=float("inf"))

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
            case "PURCHASE_TIME_AHEAD":
                return sale.time_us > at * 1_000_000 + FUTURE_US
            case "PURCHASE_TIME_OUT_OF_RANGE":  # a month that nobody has sold anything in is not there to be dropped
                past = any(sale.time_us < before_us and since < at for before_us, since in self._told.decided)
                return past or self._dropped(sale)
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
        for _, event_id, purchase_id, status, attempts, recorded_at, sent_at, body in self._recorded(
            "SELECT event_id::text, aggregate_id::text, status, attempts, extract(epoch FROM occurred_at)::float8,"
            " extract(epoch FROM sent_at)::float8, payload_json::text FROM outbox_events",
        ):
            known.add(event_id)
            seen[purchase_id] += 1
            sale = self._sale_of_event(event_id, purchase_id, body)
            self._check_origin(event_id, purchase_id, sale, stored.get(purchase_id, (0, None))[1])
            if sale is not None and purchase_id not in stored and (sent_at or 0) > self._gone_at(sale):
                self.findings.add(LOST, f"sale {sale.number} was dropped by retention before its event was sent")
            if sent_at and sent_at - recorded_at > LATE_S and not self._held_up(recorded_at, sent_at):
                self.findings.add(LATE, f"event {event_id} was sent {sent_at - recorded_at:.1f} s after its sale")
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

    def _held_up(self, since: float, until: float) -> bool:
        """Whether a fault may have been the reason."""
        return any(
            begin < until and since < end + RECOVERY_S
            for kind, begin, end in self._told.faults.values()
            if kind not in HARMLESS
        )

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
        for number in self._told.under(purchase["idempotency_key"]):
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

    def _day(self, time_us: int) -> datetime.date:
        return business_day(time_us, self._zone)

    def _recorded(self, query: LiteralString) -> Iterator[tuple[Any, ...]]:
        """The rows of all cells' databases, each behind the name of its own."""
        for database, connection in self._purchases.items():
            yield from ((database, *row) for row in self._rows(connection, query))

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


def _us(moment: datetime.datetime) -> int:
    return (moment - EPOCH) // datetime.timedelta(microseconds=1)
