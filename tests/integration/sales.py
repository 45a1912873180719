"""Sales for tests, and how to read an error."""

import uuid
from typing import Any

import grpc
from google.protobuf import timestamp_pb2
from google.rpc import error_details_pb2, status_pb2
from google.type import decimal_pb2

from chassis.errors import FieldReason
from retail.purchases.v1.purchases_service_pb2 import CreatePurchaseRequest

NOON = 1_772_366_400  # 2026-03-01T12:00:00Z


def sale(prices: tuple[str, ...] = ("8.90", "124.70"), **changes: Any) -> CreatePurchaseRequest:
    """A request with a key and a receipt number of its own; `changes` are fields of the purchase, or of the request."""
    request = CreatePurchaseRequest(idempotency_key=str(uuid.uuid4()))
    purchase = request.purchase
    purchase.receipt_id = uuid.uuid4().hex[:12]
    purchase.branch_id, purchase.cashier_id, purchase.pos_id = 1, 17, "POS-3"
    purchase.purchase_time.seconds = NOON
    for number, price in enumerate(prices):
        purchase.items.add(product_id=1001 + number, quantity=1, unit_price=decimal_pb2.Decimal(value=price))
    for name, value in changes.items():
        target = request if name in request.DESCRIPTOR.fields_by_name else purchase
        if name == "seconds":
            purchase.purchase_time.CopyFrom(timestamp_pb2.Timestamp(seconds=value))
        elif name == "total":
            purchase.total_amount.value = value
        else:
            setattr(target, name, value)
    return request


def copy(request: CreatePurchaseRequest) -> CreatePurchaseRequest:
    twin = CreatePurchaseRequest()
    twin.CopyFrom(request)
    return twin


class Refusal:
    """The rich form of an error."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code()
        trailers = dict(error.trailing_metadata() or ())
        self.status = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))
        assert (self.status.code, self.status.message) == (self.code.value[0], error.details())
        self.info, bad, self.retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        for detail in self.status.details:
            for part in (self.info, bad, self.retry):
                detail.Unpack(part)
        pause = str(self.retry.retry_delay.ToMilliseconds()) if self.retry.HasField("retry_delay") else None
        assert trailers.get("grpc-retry-pushback-ms") == pause  # for the retries built into gRPC's clients
        assert {violation.reason for violation in bad.field_violations} <= set(FieldReason)
        self.reason = self.info.reason
        self.fields = [violation.field for violation in bad.field_violations]


async def refusal(call: Any) -> Refusal:
    """How a call is refused; an error if it is not."""
    try:
        reply = await call
    except grpc.aio.AioRpcError as error:
        return Refusal(error)
    raise AssertionError(f"not refused: {reply}")
