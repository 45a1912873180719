"""Everything that can go wrong for a till, on one screen; gRPC statuses are read here and nowhere else.

PosError
├── SaleRefused                the sale is not stored and, sent again as it is, never will be
│   ├── InvalidSale            fields break the rules: `violations` names every one
│   ├── ReceiptTaken           another sale of that till and day has the number: `purchase_id` names it
│   ├── IdempotencyKeyReused   the key belongs to another sale: `purchase_id` names it
│   ├── CustomerUnknown        register the customer first, or with the sale
│   ├── PurchaseTimeOutOfRange too long ago
│   └── WrongCell              another cell records that branch's sales, at `address`; see `PosClient.at`
├── OutcomeUnknown             the sale may or may not be stored: send it again with the same key
│   └── ClockAhead             it is not stored yet: its time lies ahead of the service's clock, `ahead` tells how far
├── NotFound
├── InvalidRequest             fields of another call than a sale break the rules: `violations`
├── Unavailable                gave up on such a call: trying later may help
└── CallFailed                 any other status: not allowed, not implemented, a fault inside the service
"""

import datetime
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from chassis.errors import Violation
from pos import service_config
from retail.purchases.v1 import error_reason_pb2 as reasons

_named = reasons.ErrorReason.Name


class Status(NamedTuple):
    """A gRPC status with its rich details, as far as it has any."""

    code: StatusCode
    message: str
    reason: str = ""  # of ErrorInfo, UPPER_SNAKE
    metadata: Mapping[str, str] = {}
    violations: tuple[Violation, ...] = ()
    retry_delay_s: float | None = None  # the service asks to wait at least this long


class PosError(Exception):
    """An answer other than OK."""

    def __init__(self, status: Status) -> None:
        super().__init__(f"{status.reason or status.code.name}: {status.message}")
        self.status = status

    @property
    def violations(self) -> tuple[Violation, ...]:
        return self.status.violations


class SaleRefused(PosError):
    pass


class InvalidSale(SaleRefused):
    pass


class _TakenBySale(SaleRefused):
    @property
    def purchase_id(self) -> str:
        """The stored sale that is in the way; empty when the service did not say."""
        return self.status.metadata.get("purchase_id", "")


class ReceiptTaken(_TakenBySale):
    pass


class IdempotencyKeyReused(_TakenBySale):
    pass


class CustomerUnknown(SaleRefused):
    pass


class PurchaseTimeOutOfRange(SaleRefused):
    pass


class WrongCell(SaleRefused):
    """Refused here, and nothing is wrong with the sale: it is to be sent to another service, with its key."""

    @property
    def address(self) -> str:
        """Of the service that records the branch's sales; empty when no cell has the branch."""
        return self.status.metadata.get("address", "")


class OutcomeUnknown(PosError):
    pass


class ClockAhead(OutcomeUnknown):
    """The service stores the sale as soon as its time has come. Somebody should look at the till's clock."""

    @property
    def ahead(self) -> datetime.timedelta:
        """How far the sale's time was ahead of the service's clock; zero when the service did not say."""
        try:
            return datetime.timedelta(seconds=float(self.status.metadata.get("ahead_seconds", "0")))
        except (ValueError, OverflowError):
            return datetime.timedelta()


class NotFound(PosError):
    pass


class InvalidRequest(PosError):
    pass


class Unavailable(PosError):
    pass


class CallFailed(PosError):
    pass


# Passing troubles. Trying again is safe whatever the call: sales carry their key, customers their id. Here each attempt
# has a deadline of its own: that one of them passed it is no reason to give up. And nobody here cancels a call that
# somebody waits for: a server cut it off, or gRPC threw it away before anybody saw it.
RETRYABLE = service_config.RETRYABLE | {StatusCode.DEADLINE_EXCEEDED, StatusCode.CANCELLED}

# After these, too, nobody knows whether the sale was committed before the trouble came.
_UNCLEAR = RETRYABLE | {
    StatusCode.UNKNOWN,
    StatusCode.INTERNAL,
    StatusCode.DATA_LOSS,
}

TIME_AHEAD = "PURCHASE_TIME_AHEAD"
WRONG_CELL = _named(reasons.WRONG_CELL)
_REFUSALS: Mapping[str, type[SaleRefused]] = {
    _named(reasons.INVALID_PURCHASE): InvalidSale,
    _named(reasons.RECEIPT_EXISTS): ReceiptTaken,
    _named(reasons.IDEMPOTENCY_KEY_REUSED): IdempotencyKeyReused,
    _named(reasons.CUSTOMER_NOT_FOUND): CustomerUnknown,
    _named(reasons.PURCHASE_TIME_OUT_OF_RANGE): PurchaseTimeOutOfRange,
    WRONG_CELL: WrongCell,
}
_REFUSING_CODES: Mapping[StatusCode, type[SaleRefused]] = {
    StatusCode.INVALID_ARGUMENT: InvalidSale,
    StatusCode.FAILED_PRECONDITION: SaleRefused,
    StatusCode.ALREADY_EXISTS: SaleRefused,
    StatusCode.OUT_OF_RANGE: SaleRefused,
}


def of_sale(status: Status) -> PosError:
    """What a status means for a sale that was sent."""
    if status.reason == TIME_AHEAD:
        return ClockAhead(status)
    if status.code in _UNCLEAR:
        return OutcomeUnknown(status)
    refusal = _REFUSALS.get(status.reason) or _REFUSING_CODES.get(status.code)
    return refusal(status) if refusal else CallFailed(status)


def of_call(status: Status) -> PosError:
    """What a status means for any other call."""
    if status.code in RETRYABLE:
        return Unavailable(status)
    if status.code is StatusCode.NOT_FOUND:
        return NotFound(status)
    if status.code in (StatusCode.INVALID_ARGUMENT, StatusCode.OUT_OF_RANGE):
        return InvalidRequest(status)
    return CallFailed(status)


@contextmanager
def sending() -> Iterator[None]:
    """Turns whatever is raised by values that no request can hold into InvalidRequest; they may be anything."""
    try:
        yield
    except Exception as error:
        text = f"it cannot be sent: {type(error).__name__}: {error}"
        raise InvalidRequest(Status(StatusCode.INVALID_ARGUMENT, text)) from None


@contextmanager
def reading(kind: type[PosError]) -> Iterator[None]:
    """Turns whatever is raised by an answer that breaks its contract into an error of that kind."""
    try:
        yield
    except Exception as error:
        text = f"the answer cannot be read: {type(error).__name__}: {error}"
        raise kind(Status(StatusCode.INTERNAL, text)) from error


def read_status(error: grpc.RpcError) -> Status:
    """The status of a failed call. gRPC's own statuses have no details; broken details count as none."""
    status = Status(error.code(), error.details() or "")
    rich = status_pb2.Status()
    metadata: Iterable[Any] = error.trailing_metadata() or ()  # the stubs do not know that these are pairs
    try:
        for key, value in metadata:
            if key == "grpc-status-details-bin":
                rich.ParseFromString(value)
        return _with_details(status, rich)
    except DecodeError:
        return status


def parse_status(rich: status_pb2.Status) -> Status:
    """The status of one sale of an upload."""
    status = Status(_CODES.get(rich.code, StatusCode.UNKNOWN), rich.message)
    try:
        return _with_details(status, rich)
    except DecodeError:
        return status


# Without OK, which is not what became of a sale that was not stored.
_CODES: Mapping[int, StatusCode] = {code.value[0]: code for code in StatusCode if code is not StatusCode.OK}


def _with_details(status: Status, rich: status_pb2.Status) -> Status:
    """Raises DecodeError: a detail is not what it says."""
    for detail in rich.details:
        info = error_details_pb2.ErrorInfo()
        broken_fields = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            status = status._replace(reason=info.reason, metadata=dict(info.metadata))
        elif detail.Unpack(broken_fields):
            named = tuple(Violation(v.field, v.description, v.reason) for v in broken_fields.field_violations)
            status = status._replace(violations=named)
        elif detail.Unpack(retry):
            status = status._replace(retry_delay_s=max(retry.retry_delay.ToNanoseconds() / 1e9, 0.0))
    return status
