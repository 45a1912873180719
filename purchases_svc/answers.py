"""What becomes of a sale: the answer to each that was stored, was stored before, or cannot be.

What an answer says to be stored is as durable as what a flush stores.
"""

import datetime
import math
from collections.abc import Sequence
from typing import NamedTuple

from chassis.errors import ServiceError
from chassis.logs import Sampled
from chassis.postgres import Connection
from chassis.standby import make_durable
from purchases_svc import branches, stored
from purchases_svc.branches import Branches
from purchases_svc.errors import (
    ClocksDiffer,
    CustomerUnknown,
    IdempotencyKeyReused,
    MonthNotOpen,
    PurchaseTimeAhead,
    PurchaseTimeOutOfRange,
    ReceiptExists,
)
from purchases_svc.sale import FUTURE_MAX, Purchase, Sale, rfc3339


class Recorded(NamedTuple):
    """The purchase that holds the sale, and whether it had been there before this call."""

    purchase: Purchase
    replayed: bool


Outcome = Recorded | Exception


def for_one(outcome: Outcome) -> Outcome:
    """The outcome for one of several callers who share it: an error is a copy with the same traceback. Whoever raises
    an error adds to its traceback, and whoever logs it later writes what all before have added.
    """
    if isinstance(outcome, Recorded):
        return outcome
    copy = outcome.__class__.__new__(outcome.__class__, *outcome.args)  # constructors want other arguments than these
    copy.__dict__.update(outcome.__dict__)
    copy.__cause__, copy.__context__ = outcome.__cause__, outcome.__context__
    copy.__suppress_context__ = outcome.__suppress_context__
    return copy.with_traceback(outcome.__traceback__)


CLOCKS_APART_MAX = datetime.timedelta(days=1)  # ours and the database's

_clocks = Sampled("error", "this machine's clock and the database's are far apart")


async def explain(connection: Connection, purchases: Sequence[Purchase], ours: Branches) -> list[Outcome | None]:
    """Why purchases were not stored, by what is stored: replays first, since a stored sale also holds its receipt
    number. None for one that nothing speaks against any more.
    """
    holders = await stored.by_keys(connection, [purchase.sale.idempotency_key for purchase in purchases])
    new = [purchase for purchase in purchases if purchase.sale.idempotency_key not in holders]
    closed = await branches.closed(connection, (purchase.sale.branch_id for purchase in new))
    unknown = await stored.unknown_customers(connection, [purchase.sale for purchase in new])
    receipts = await stored.receipt_holders(connection, new)
    if holders or receipts:
        await make_durable(connection)

    def answer(purchase: Purchase) -> Outcome | None:
        sale = purchase.sale
        if holder := holders.get(sale.idempotency_key):
            if holder.purchase_id == purchase.purchase_id:
                return Recorded(holder, replayed=False)  # our own: the answer to its commit was lost
            return replay(sale, holder)
        if move := closed.get(sale.branch_id):
            return ours.refusal(sale.branch_id, move)
        if sale.customer_id in unknown and not sale.register_customer:
            return _customer_unknown(sale.customer_id)
        if receipt_holder := receipts.get(sale.idempotency_key):
            return _receipt_exists(sale, receipt_holder)
        return None

    return [answer(purchase) for purchase in purchases]


async def known_or_out_of_time(
    connection: Connection,
    sales: Sequence[Sale],
    now: datetime.datetime,
    *,
    earliest: datetime.datetime,
    open_from: datetime.datetime,
    closed: bool,
) -> list[Outcome | None]:
    """A known key is answered before the time is checked: the clock may have been set back since. None for a sale of a
    month from before `open_from` that is there, unless their months are known to be `closed`.

    Nothing is refused for good by a clock that the database's contradicts.
    """
    holders = await stored.by_keys(connection, [sale.idempotency_key for sale in sales])
    if holders:
        await make_durable(connection)
    database_time = await stored.clock(connection)
    months = await stored.months(connection)

    def answer(sale: Sale) -> Outcome | None:
        if holder := holders.get(sale.idempotency_key):
            return replay(sale, holder)
        if sale.purchase_time > now + FUTURE_MAX:
            return _ahead(sale, now)
        if abs(database_time - now) > CLOCKS_APART_MAX:
            return _clocks_differ(now, database_time)
        if closed or sale.purchase_time < earliest:
            return _too_long_ago(sale, earliest, now)
        if sale.purchase_time.date().replace(day=1) in months:
            return None
        return _month_not_open(sale, open_from, now)

    return [answer(sale) for sale in sales]


def replay(sale: Sale, holder: Purchase) -> Outcome:
    """The answer to a sale whose key a purchase holds."""
    if holder.sale.content() == sale.content():
        return Recorded(holder, replayed=True)
    metadata = {"idempotency_key": sale.idempotency_key}
    if holder.sale.branch_id != sale.branch_id:  # what other branches sold is not this one's to know
        return IdempotencyKeyReused(
            f"idempotency_key {sale.idempotency_key} belongs to another purchase", metadata=metadata
        )
    return IdempotencyKeyReused(
        f"idempotency_key {sale.idempotency_key} belongs to purchase {holder.purchase_id}, whose content differs",
        metadata={**metadata, "purchase_id": holder.purchase_id},
    )


def _ahead(sale: Sale, now: datetime.datetime) -> ServiceError:
    ahead = sale.purchase_time - now
    error = PurchaseTimeAhead(
        f"purchase.purchase_time {rfc3339(sale.purchase_time)} is {str(ahead).partition('.')[0]} ahead of the server's"
        f" clock, {rfc3339(now)}; the sale is taken {FUTURE_MAX.seconds // 60} minutes before that time",
        metadata={
            "purchase_time": rfc3339(sale.purchase_time),
            "server_time": rfc3339(now),
            "ahead_seconds": f"{ahead.total_seconds():.3f}",
        },
    )
    until_taken_s = math.ceil((ahead - FUTURE_MAX).total_seconds())
    error.retry_after_s = min(until_taken_s, PurchaseTimeAhead.retry_after_s)
    return error


def _clocks_differ(now: datetime.datetime, database_time: datetime.datetime) -> ServiceError:
    _clocks("apart", now=rfc3339(now), database=rfc3339(database_time))
    return ClocksDiffer(f"the server's clock says {rfc3339(now)}, its database's {rfc3339(database_time)}")


def _too_long_ago(sale: Sale, earliest: datetime.datetime, now: datetime.datetime) -> ServiceError:
    return PurchaseTimeOutOfRange(
        f"purchase.purchase_time {rfc3339(sale.purchase_time)} must not be before {rfc3339(earliest)};"
        f" the server's time is {rfc3339(now)}",
        metadata={"purchase_time": rfc3339(sale.purchase_time), "server_time": rfc3339(now)},
    )


def _month_not_open(sale: Sale, open_from: datetime.datetime, now: datetime.datetime) -> ServiceError:
    return MonthNotOpen(
        f"purchase.purchase_time {rfc3339(sale.purchase_time)} is in a month that is not open; sales from"
        f" {open_from:%Y-%m} on are taken, and the server's time is {rfc3339(now)}. If the till's clock is right, an"
        f" operator opens the month: retail-purchases partitions --open {sale.purchase_time:%Y-%m}",
        metadata={
            "purchase_time": rfc3339(sale.purchase_time),
            "server_time": rfc3339(now),
            "open_from": f"{open_from:%Y-%m}",
        },
    )


def _customer_unknown(customer_id: str) -> ServiceError:
    return CustomerUnknown(f"customer {customer_id} is not registered", metadata={"customer_id": customer_id})


def _receipt_exists(sale: Sale, holder_id: str) -> ServiceError:
    return ReceiptExists(
        f"receipt {sale.receipt_id} of {sale.pos_id} in branch {sale.branch_id} on that business day belongs to"
        f" purchase {holder_id}",
        metadata={"receipt_id": sale.receipt_id, "purchase_id": holder_id},
    )
