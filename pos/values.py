"""What the purchases service answers, as till software has it, and how it is read."""

import datetime
from dataclasses import dataclass
from typing import NamedTuple

from google.protobuf import timestamp_pb2
from google.type import date_pb2

from pos import errors
from pos.sale import Item, Sale
from retail.analytics.v1 import analytics_service_pb2
from retail.purchases.v1 import customers_service_pb2, purchase_pb2, purchases_service_pb2, till_pb2


@dataclass(frozen=True, kw_only=True, slots=True)
class Purchase:
    """A sale as the chain has stored it."""

    purchase_id: str
    receipt_id: str
    branch_id: int
    cashier_id: int
    pos_id: str
    items: tuple[Item, ...]
    customer_id: str | None
    purchase_time: datetime.datetime
    create_time: datetime.datetime
    total_cents: int


class Recorded(NamedTuple):
    """The answer to a sale: it is durable."""

    purchase: Purchase
    replayed: bool  # an earlier attempt had stored it already
    consistency_token: str  # given to an analytics call, that call's answer includes this purchase


class Uploaded(NamedTuple):
    """What became of a sale of an upload."""

    sale: Sale
    outcome: Recorded | errors.PosError  # SaleRefused: not stored; OutcomeUnknown: send it again


class Customer(NamedTuple):
    customer_id: str
    create_time: datetime.datetime


class TillReport(NamedTuple):
    """What a till's journal has given out."""

    branch_id: int
    pos_id: str
    epoch: str  # of the journal, a UUID
    first_sequence: int
    last_sequence: int
    void_sequences: tuple[int, ...] = ()  # that no sale will ever come with; 1,000 at most
    clock_offset_ms: int | None = None


class TillState(NamedTuple):
    """What the chain has of a journal of a till."""

    epoch: str
    complete_through: int  # every number up to this one is there
    highest_sequence: int
    reported_through: int  # the highest that the till has told of
    missing: tuple[tuple[int, int], ...]  # the first ranges of numbers that are not there, both ends included
    missing_count: int
    missing_since: datetime.datetime | None
    conflict_count: int  # numbers that came with two sales: the till's disk was restored from an image, or cloned
    report_time: datetime.datetime | None
    clock_offset_ms: int | None  # the service's clock minus the till's


class Reported(NamedTuple):
    """The answer to a report."""

    state: TillState
    server_time: datetime.datetime
    time_zone: str  # IANA name; it cuts business days


class DayTotals(NamedTuple):
    """What one branch sold on one business day."""

    day: datetime.date
    branch_id: int
    purchase_count: int
    purchase_with_customer_count: int
    item_count: int
    revenue_cents: int


class BusinessDays(NamedTuple):
    """The business days that have purchases, `first` to `last`; None when nothing is stored."""

    first: datetime.date | None
    last: datetime.date | None
    time_zone: str  # IANA name; it cuts the days


def recorded(reply: purchases_service_pb2.CreatePurchaseResponse) -> Recorded:
    return Recorded(purchase(reply.purchase), reply.replayed, reply.consistency_token)


def purchase(message: purchase_pb2.Purchase) -> Purchase:
    return Purchase(
        purchase_id=message.purchase_id,
        receipt_id=message.receipt_id,
        branch_id=message.branch_id,
        cashier_id=message.cashier_id,
        pos_id=message.pos_id,
        items=tuple([Item(item.product_id, cents(item.unit_price.value)) for item in message.items]),
        customer_id=message.customer_id if message.HasField("customer_id") else None,
        purchase_time=moment(message.purchase_time),
        create_time=moment(message.create_time),
        total_cents=cents(message.total_amount.value),
    )


def till_state(message: till_pb2.TillState) -> TillState:
    return TillState(
        epoch=message.epoch,
        complete_through=message.complete_through,
        highest_sequence=message.highest_sequence,
        reported_through=message.reported_through,
        missing=tuple((gap.first, gap.last) for gap in message.missing),
        missing_count=message.missing_count,
        missing_since=moment(message.missing_since_time) if message.HasField("missing_since_time") else None,
        conflict_count=message.conflict_count,
        report_time=moment(message.report_time) if message.HasField("report_time") else None,
        clock_offset_ms=message.clock_offset_ms if message.HasField("clock_offset_ms") else None,
    )


def customer(message: customers_service_pb2.Customer) -> Customer:
    return Customer(message.customer_id, moment(message.create_time))


def day_totals(row: purchases_service_pb2.ControlTotals | analytics_service_pb2.DailySales) -> DayTotals:
    return DayTotals(
        date(row.sales_date),
        row.branch_id,
        row.purchase_count,
        row.purchase_with_customer_count,
        row.item_count,
        cents(row.revenue.value),
    )


def cents(amount: str) -> int:
    """`142.50` → 14250. The services print two fraction digits always; sums may be of any length."""
    return int(amount.replace(".", ""))


def date(value: date_pb2.Date) -> datetime.date:
    return datetime.date(value.year, value.month, value.day)


def moment(value: timestamp_pb2.Timestamp) -> datetime.datetime:
    return value.ToDatetime(datetime.UTC)
