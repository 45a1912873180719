"""What a till's journal gives and takes: sales, receipts, limits, and how they are written down."""

import datetime
import json
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from pos.client import Item, Sale
from pos.errors import PosError
from pos.journal.rows import JournalError, Row
from pos.sale import JournalPlace


class JournalFull(JournalError):
    """A limit is reached, which `reason` names: nothing more is sold until what waits has been sent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What may wait for the service; each is warned of at 80 %."""

    sales: int = 10_000
    age: datetime.timedelta = datetime.timedelta(days=7)  # of the oldest
    amount_cents: int = 50_000_000  # in all
    bytes: int = 256 << 20  # of the file, with what is kept after it was stored
    free_bytes: int = 16 << 20  # that the disk must have left; no warning


class Receipt(NamedTuple):
    """A sale that is on the disk. Only now may its receipt be printed."""

    sequence: int  # of this till, without gaps
    receipt_id: str  # to be printed; unique for the branch and till
    sale: Sale
    business_date: datetime.date | None  # of the sale, fixed now; None where the journal knows no time zone
    warnings: tuple[str, ...]  # for whoever looks after the till: limits that are near, a clock that is wrong


class RefusedSale(NamedTuple):
    """A sale that the service will not have as it is."""

    sequence: int
    sale: Sale
    reason: str
    refused_time: datetime.datetime


class Resolution(Enum):
    """What is to be done with a refused sale."""

    SEND_AGAIN = "as it is: what was in its way is gone, such as a customer who has been registered since"
    NEW_NUMBER = "as a new sale, with another key and receipt number: another sale had its number"
    CLOSE = "nothing: it was settled otherwise, as the note says"


class Flushed(NamedTuple):
    """What a flush has done."""

    stored: int
    refused: int
    waiting: int  # sales that are still to be sent
    trouble: PosError | None  # why some are, if not for want of time


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalStatus:
    """What is in the journal."""

    waiting: int
    waiting_cents: int
    oldest_waiting: datetime.datetime | None  # when it was sold, by the till's clock
    refused: int
    refused_cents: int
    last: Receipt | None  # shown after a start: was this receipt printed?
    bytes: int
    epoch: str
    clock_offset: datetime.timedelta | None  # service's clock minus the till's, when it was last seen
    used: float  # of the limit that is nearest, 1.0 is all
    warnings: tuple[str, ...]


def payload(sale: Sale, register_customer: bool, replaces: int | None = None) -> bytes:
    fields: dict[str, Any] = {
        "idempotency_key": sale.idempotency_key,
        "receipt_id": sale.receipt_id,
        "branch_id": sale.branch_id,
        "cashier_id": sale.cashier_id,
        "pos_id": sale.pos_id,
        "customer_id": sale.customer_id,
        "purchase_time": text(sale.purchase_time),
        "items": sale.items,
        "register_customer": register_customer,
    }
    if replaces is not None:
        fields["replaces"] = replaces
    return json.dumps(fields, separators=(",", ":")).encode()


def as_sale(row: Row) -> tuple[Sale, bool]:
    """The sale as it was recorded, and whether its customer is registered with it."""
    fields = json.loads(row.payload)
    sale = Sale(
        receipt_id=fields["receipt_id"],
        branch_id=fields["branch_id"],
        cashier_id=fields["cashier_id"],
        pos_id=fields["pos_id"],
        items=[Item(*item) for item in fields["items"]],
        customer_id=fields["customer_id"],
        purchase_time=moment(fields["purchase_time"]),
        idempotency_key=fields["idempotency_key"],
        journal=JournalPlace(row.epoch, row.sequence, row.clock_offset_ms),
    )
    return sale, fields["register_customer"]


def receipt(row: Row, warnings: tuple[str, ...] = ()) -> Receipt:
    day = datetime.date.fromisoformat(row.business_date) if row.business_date else None
    return Receipt(row.sequence, row.receipt_id, as_sale(row)[0], day, warnings)


def exported(row: Row) -> dict[str, object]:
    fields = row._asdict()
    return fields | {"payload": json.loads(row.payload), "hash": row.hash.hex()}


def mismatch(row: Row) -> str:
    """What columns say otherwise than the sale itself."""
    sale, _ = as_sale(row)
    same = (sale.idempotency_key, sale.receipt_id, sale.total_cents) == (
        row.idempotency_key,
        row.receipt_id,
        row.amount_cents,
    )
    return "" if same else f"sale {row.sequence} does not fit its row"


def milliseconds(value: int | None) -> datetime.timedelta | None:
    return None if value is None else datetime.timedelta(milliseconds=value)


def text(moment: datetime.datetime) -> str:
    """As wide for each moment, so that texts compare as moments do."""
    return moment.astimezone(datetime.UTC).isoformat(timespec="microseconds")


def moment(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)
