"""Every refusal of the purchases service.

ServiceError
├── InvalidRequest ── InvalidPurchase     fields break the rules of a sale
├── PurchaseTimeOutOfRange                too long ago
├── PurchaseTimeAhead                     too far in the future: it is taken when that time has come
├── ClocksDiffer                          ours and the database's: no sale is refused for its time
├── WrongCell                             another cell records the sales of that branch
├── BranchMoving                          it is being moved: no cell does, for a moment
├── MonthNotOpen                          so long ago that an operator has to open its month
├── IdempotencyKeyReused                  the key belongs to a sale with other content
├── ReceiptExists                         another sale of that branch, till and day has the receipt number
├── CustomerUnknown                       a sale names a customer that is not registered
├── PurchaseNotFound
└── CustomerNotFound
"""

from grpc import StatusCode

from chassis.errors import InvalidRequest, ServiceError
from retail.purchases.v1 import error_reason_pb2 as reasons

_named = reasons.ErrorReason.Name  # what the contract does not have cannot be raised


class InvalidPurchase(InvalidRequest):
    reason = _named(reasons.INVALID_PURCHASE)


class PurchaseTimeOutOfRange(ServiceError):
    code = StatusCode.OUT_OF_RANGE
    reason = _named(reasons.PURCHASE_TIME_OUT_OF_RANGE)


class PurchaseTimeAhead(ServiceError):
    code = StatusCode.UNAVAILABLE
    reason = _named(reasons.PURCHASE_TIME_AHEAD)
    retry_after_s = 60.0  # at most: a clock may be set right at any time


class ClocksDiffer(ServiceError):
    code = StatusCode.UNAVAILABLE
    reason = _named(reasons.CLOCKS_DIFFER)
    retry_after_s = 5.0


class MonthNotOpen(ServiceError):
    code = StatusCode.FAILED_PRECONDITION
    reason = _named(reasons.MONTH_NOT_OPEN)


class WrongCell(ServiceError):
    code = StatusCode.FAILED_PRECONDITION
    reason = _named(reasons.WRONG_CELL)


class BranchMoving(ServiceError):
    code = StatusCode.UNAVAILABLE
    reason = _named(reasons.BRANCH_MOVING)
    retry_after_s = 0.5


class IdempotencyKeyReused(ServiceError):
    code = StatusCode.FAILED_PRECONDITION
    reason = _named(reasons.IDEMPOTENCY_KEY_REUSED)


class ReceiptExists(ServiceError):
    code = StatusCode.ALREADY_EXISTS
    reason = _named(reasons.RECEIPT_EXISTS)


class CustomerUnknown(ServiceError):
    code = StatusCode.FAILED_PRECONDITION
    reason = _named(reasons.CUSTOMER_NOT_FOUND)


class OutboxFull(ServiceError):
    code = StatusCode.RESOURCE_EXHAUSTED
    reason = _named(reasons.OUTBOX_FULL)
    retry_after_s = 5.0


class PurchaseNotFound(ServiceError):
    code = StatusCode.NOT_FOUND
    reason = _named(reasons.PURCHASE_NOT_FOUND)


class CustomerNotFound(ServiceError):
    code = StatusCode.NOT_FOUND
    reason = _named(reasons.CUSTOMER_NOT_FOUND)
