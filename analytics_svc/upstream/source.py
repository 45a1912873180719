"""What was recorded, asked of the purchases service: the truth that read models are checked against and rebuilt from.

The only file here that knows its messages.
"""

from collections.abc import AsyncGenerator, Sequence
from datetime import UTC, date, datetime
from typing import Any, NamedTuple, Protocol
from zoneinfo import ZoneInfo

import grpc

from analytics_svc.errors import PurchasesUnavailable, TimeZonesDiffer
from analytics_svc.purchase import Item, PurchaseCreated
from chassis import wire
from chassis.zones import business_day
from retail.purchases.v1 import purchase_pb2, purchases_service_pb2
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub

CONTROL_TOTALS_DAYS_MAX = 31  # the service's limit for one question
PAGE_ROWS = 1_000
CHUNK = 500  # purchases; as many as the consumer applies at once
CALL_TIMEOUT_S = 20.0
PROOF = [("retail-purpose", "proof")]  # the service keeps an export for whoever says so


class Totals(NamedTuple):
    """Sums over the purchases of one branch on one business day."""

    purchases: int = 0
    with_customer: int = 0
    items: int = 0
    cents: int = 0


class Recorded(NamedTuple):
    """What was recorded by a moment."""

    totals: dict[tuple[date, int], Totals]  # by business day and branch
    read_at: datetime  # by the purchases' clock, which is also that of complete_through_at
    earliest: date | None  # business days of the earliest and the latest purchase
    latest: date | None
    complete_from: date | None  # the retention has dropped purchases of days before it; None: nothing yet


class RecordedDays(NamedTuple):
    """On which business days something was recorded since an earlier answer."""

    days: list[date]
    position: str  # what to ask with next time
    as_of: datetime  # by the purchases' clock: all that was committed before is told of, here or in the answers before


class Source(Protocol):
    """What was recorded, in one cell or in all. Every method may raise PurchasesUnavailable."""

    def today(self) -> date:
        """The business day that it is now."""

    def day_of(self, moment: datetime) -> date:
        """The business day on which a purchase of that moment was recorded."""

    async def control_totals(self, first: date, last: date) -> Recorded:
        """Sums by business day and branch, of 31 days at most.

        Raises:
            TimeZonesDiffer: the other side's days are not ours.
        """

    async def recorded_days(self, after: str) -> RecordedDays:
        """The days since the position of an earlier answer; all that are recorded, where it is empty or means nothing.

        Raises:
            TimeZonesDiffer: the other side's days are not ours.
        """

    def export(
        self, first: date, last: date, customer_ids: Sequence[str] = ()
    ) -> AsyncGenerator[list[PurchaseCreated], None]:
        """The purchases of these business days as the events that announced them, some at a time."""

    async def recorded_day(self, purchase_id: str) -> date | None:
        """The business day of a recorded purchase; None when none has this id."""


class CellSource:
    """Asks one purchases service."""

    def __init__(self, channel: grpc.aio.Channel, zone: ZoneInfo) -> None:
        self._stub: Any = PurchasesServiceStub(channel)
        self._zone = zone

    def today(self) -> date:
        return self.day_of(datetime.now(UTC))

    def day_of(self, moment: datetime) -> date:
        return business_day(moment, self._zone)

    async def control_totals(self, first: date, last: date) -> Recorded:
        request = purchases_service_pb2.ListControlTotalsRequest(
            page_size=PAGE_ROWS, first_date=wire.date(first), last_date=wire.date(last)
        )
        totals: dict[tuple[date, int], Totals] = {}
        while True:
            try:
                reply = await self._stub.ListControlTotals(request, timeout=CALL_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                raise _unavailable(error) from error
            self._require_zone(reply.time_zone)
            for row in reply.control_totals:
                totals[_day(row.sales_date), row.branch_id] = Totals(
                    row.purchase_count, row.purchase_with_customer_count, row.item_count, _cents(row.revenue.value)
                )
            if not reply.next_page_token:
                break
            request.page_token = reply.next_page_token
        return Recorded(
            totals,
            reply.read_time.ToDatetime(UTC),  # of the last page, and so no earlier than any
            *(
                _day(getattr(reply, field)) if reply.HasField(field) else None
                for field in ("earliest_sales_date", "latest_sales_date", "complete_from_date")
            ),
        )

    async def recorded_days(self, after: str) -> RecordedDays:
        request = purchases_service_pb2.ListRecordedDaysRequest(after_position=after)
        try:
            reply = await self._stub.ListRecordedDays(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if after and error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                return await self.recorded_days("")
            raise _unavailable(error) from error
        self._require_zone(reply.time_zone)
        return RecordedDays(list(map(_day, reply.sales_dates)), reply.position, reply.as_of_time.ToDatetime(UTC))

    def _require_zone(self, theirs: str) -> None:
        if theirs != self._zone.key:
            raise TimeZonesDiffer(
                f"the purchases' business days are cut in {theirs}, ours in {self._zone.key}; they cannot be compared"
            )

    async def export(
        self, first: date, last: date, customer_ids: Sequence[str] = ()
    ) -> AsyncGenerator[list[PurchaseCreated], None]:
        request = purchases_service_pb2.ExportPurchasesRequest(
            first_date=wire.date(first), last_date=wire.date(last), customer_ids=customer_ids
        )
        call = self._stub.ExportPurchases(request, metadata=PROOF)
        chunk: list[PurchaseCreated] = []
        try:
            async for reply in call:
                chunk.append(_event(reply.event_id, reply.purchase))
                if len(chunk) == CHUNK:
                    yield chunk
                    chunk = []
        except grpc.aio.AioRpcError as error:
            raise _unavailable(error) from error
        finally:
            call.cancel()
        if chunk:
            yield chunk

    async def recorded_day(self, purchase_id: str) -> date | None:
        request = purchases_service_pb2.GetPurchaseRequest(purchase_id=purchase_id)
        try:
            reply = await self._stub.GetPurchase(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.NOT_FOUND:
                return None
            raise _unavailable(error) from error
        return _day(reply.purchase.business_day)


def _event(event_id: str, purchase: purchase_pb2.Purchase) -> PurchaseCreated:
    purchase_time = purchase.purchase_time.ToDatetime(UTC)
    return PurchaseCreated(
        event_id,
        _day(purchase.business_day),
        purchase_time,
        purchase.branch_id,
        purchase.customer_id or None,
        _cents(purchase.total_amount.value),
        [Item(item.product_id, item.quantity, _cents(item.line_total.value)) for item in purchase.items],
        purchase.purchase_id,
    )


def _unavailable(error: grpc.aio.AioRpcError) -> PurchasesUnavailable:
    return PurchasesUnavailable(f"the purchases service does not answer: {error.code().name}: {error.details()}")


def _day(value: Any) -> date:
    return date(value.year, value.month, value.day)


def _cents(text: str) -> int:
    """A printed amount: always with two fraction digits, and sums may be longer than what the wire takes in."""
    cents = wire.parse_cents(text)
    return int(text.replace(".", "")) if cents is None else cents
