"""Every refusal of the purchases service.

ServiceError
├── InvalidRequest ── InvalidPurchase     fields break the rules of a sale
├── PurchaseTimeOutOfRange                too far in the future, or too long ago
├── IdempotencyKeyReused                  the key belongs to a sale with other content
├── ReceiptExists                         another sale of that branch, till and day has the receipt number
├── CustomerUnknown                       a sale names a customer that is not registered
├── PurchaseNotFound
└── CustomerNotFound
"""

from grpc import StatusCode

from chassis.errors import InvalidRequest, ServiceError


class InvalidPurchase(InvalidRequest):
    reason = "INVALID_PURCHASE"


class PurchaseTimeOutOfRange(ServiceError):
    code = StatusCode.OUT_OF_RANGE
    reason = "PURCHASE_TIME_OUT_OF_RANGE"


class IdempotencyKeyReused(ServiceError):
    code = StatusCode.FAILED_PRECONDITION
    reason = "IDEMPOTENCY_KEY_REUSED"


class ReceiptExists(ServiceError):
    code = StatusCode.ALREADY_EXISTS
    reason = "RECEIPT_EXISTS"


class CustomerUnknown(ServiceError):
    code = StatusCode.FAILED_PRECONDITION
    reason = "CUSTOMER_NOT_FOUND"


class OutboxFull(ServiceError):
    code = StatusCode.RESOURCE_EXHAUSTED
    reason = "OUTBOX_FULL"
    retry_after_s = 5.0


class PurchaseNotFound(ServiceError):
    code = StatusCode.NOT_FOUND
    reason = "PURCHASE_NOT_FOUND"


class CustomerNotFound(ServiceError):
    code = StatusCode.NOT_FOUND
    reason = "CUSTOMER_NOT_FOUND"
