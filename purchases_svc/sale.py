"""The words of this service: a sale as a till reports it, and a purchase as it is stored. Pure values."""

import datetime
from typing import NamedTuple

from chassis.wire import EPOCH

ITEMS_MAX = 2_000
RECEIPT_ID_LENGTH_MAX = 64
POS_ID_LENGTH_MAX = 32
PRODUCT_ID_MAX = 10**14 - 1  # a GTIN has 14 digits at most
EARLIEST = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
FUTURE_MAX = datetime.timedelta(minutes=5)  # how far a till's clock may be ahead of ours
KEPT_MS = 60_000  # a sale that lay in its till's journal for so long has no customer waiting

_MICROSECOND, _MILLISECOND = datetime.timedelta(microseconds=1), datetime.timedelta(milliseconds=1)


class Item(NamedTuple):
    """One line: one unit of a product at a price in cents."""

    product_id: int
    price_cents: int


class JournalEntry(NamedTuple):
    """Where a sale stands in its till's own journal. No part of the sale."""

    epoch: str
    sequence: int
    clock_offset_ms: int | None


class Sale(NamedTuple):
    """A sale that keeps the rules. Ids are UUIDs in canonical lower-case text, amounts whole cents."""

    idempotency_key: str
    receipt_id: str
    branch_id: int
    cashier_id: int
    pos_id: str
    customer_id: str | None
    purchase_time: datetime.datetime  # UTC, whole microseconds
    total_cents: int
    items: tuple[Item, ...]
    register_customer: bool
    journal: JournalEntry | None = None

    def was_kept(self, now: datetime.datetime) -> bool:
        """It lay in its till's journal for a while, by our clock: what the till's is off is told with the sale."""
        if self.journal is None:
            return False
        return (now - self.purchase_time) // _MILLISECOND - (self.journal.clock_offset_ms or 0) > KEPT_MS

    def content(self) -> tuple[object, ...]:
        """What makes two sales the same: everything but the order of items, how the customer got registered, and where
        its till has it.
        """
        return (
            self.receipt_id,
            self.branch_id,
            self.cashier_id,
            self.pos_id,
            self.customer_id,
            self.purchase_time,
            self.total_cents,
            sorted(self.items),
        )


class Purchase(NamedTuple):
    """A sale as stored."""

    purchase_id: str
    event_id: str
    created_at: datetime.datetime
    business_day: datetime.date  # of the sale's time; decided once, when it is recorded
    sale: Sale


def rfc3339(moment: datetime.datetime) -> str:
    """`2026-01-06T10:14:59Z`, of a moment in UTC; with microseconds only where there are any."""
    return moment.isoformat().removesuffix("+00:00") + "Z"


def nanoseconds(moment: datetime.datetime) -> int:
    """Since 1970, for making time-ordered ids."""
    return (moment - EPOCH) // _MICROSECOND * 1_000
