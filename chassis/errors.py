"""The root of every error that may reach a caller. Handlers raise; `chassis.grpc_server` alone maps to the wire.

ServiceError
├── UnknownMethod         no service here has it
├── MessageTooLarge       by this service's limit
├── MalformedMessage      the bytes are not the message
├── AccessRefused
│   ├── Unauthenticated   nobody knows who calls
│   └── PermissionDenied  the method, or what the request names, is not for this caller
├── InvalidRequest        fields break the rules; carries every violation at once
├── InvalidToken          a page or consistency token that this server did not make
├── Overloaded            more work than the server takes in
├── RateExceeded          more calls than one caller may make
├── ShuttingDown          the process is draining
├── DatabaseUnavailable   no connection, or the connection was lost
├── TransactionConflict   concurrent transactions got in each other's way, retries included
├── DeadlineExceeded      the server's own limit for the call has passed
└── Internal              a bug of ours
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import ClassVar, NamedTuple

from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode


class FieldReason(StrEnum):
    """Which rule a field breaks, in words for programs; the contracts have the same in `FieldReason`."""

    REQUIRED = "REQUIRED"
    NOT_POSITIVE = "NOT_POSITIVE"
    NEGATIVE = "NEGATIVE"
    NOT_ONE = "NOT_ONE"
    NOT_A_UUID = "NOT_A_UUID"
    NOT_AN_AMOUNT = "NOT_AN_AMOUNT"
    NOT_A_DATE = "NOT_A_DATE"
    NOT_A_TIME = "NOT_A_TIME"
    TOO_LONG = "TOO_LONG"
    TOO_MANY = "TOO_MANY"
    CONTROL_CHARACTER = "CONTROL_CHARACTER"
    DUPLICATE = "DUPLICATE"
    AMOUNT_MISMATCH = "AMOUNT_MISMATCH"
    BAD_RANGE = "BAD_RANGE"
    UNKNOWN_VALUE = "UNKNOWN_VALUE"
    FIELDS_EXCLUDE_EACH_OTHER = "FIELDS_EXCLUDE_EACH_OTHER"
    NOT_COUNTED = "NOT_COUNTED"
    TOO_LARGE = "TOO_LARGE"
    FORBIDDEN_CHARACTER = "FORBIDDEN_CHARACTER"
    CARD_NUMBER = "CARD_NUMBER"


class Violation(NamedTuple):
    """One broken rule: the field's path in the request, such as `purchase.items[2].unit_price`, and the rule, in words
    for people and for programs (a `FieldReason`)."""

    field: str
    description: str
    reason: str


class ServiceError(Exception):
    """An answer other than OK: its gRPC code, a reason for programs, a text for people.

    Reasons are the values of ErrorReason in the contract of whichever service raises it.
    """

    code: ClassVar[StatusCode] = StatusCode.UNKNOWN
    reason: ClassVar[str] = ""
    retry_after_s: float | None = None  # sent as google.rpc.RetryInfo when set

    def __init__(
        self,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)


class UnknownMethod(ServiceError):
    code = StatusCode.UNIMPLEMENTED
    reason = "UNKNOWN_METHOD"


class MessageTooLarge(ServiceError):
    code = StatusCode.INVALID_ARGUMENT  # not RESOURCE_EXHAUSTED, which policies retry: it never fits
    reason = "MESSAGE_TOO_LARGE"


class MalformedMessage(ServiceError):
    code = StatusCode.INVALID_ARGUMENT
    reason = "MALFORMED_MESSAGE"


class AccessRefused(ServiceError):
    """Its text is always the same, so that it tells nothing of what exists."""

    text: ClassVar[str]

    def __init__(self) -> None:
        super().__init__(self.text)


class Unauthenticated(AccessRefused):
    code = StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"
    text = "it is not known who calls"


class PermissionDenied(AccessRefused):
    code = StatusCode.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"
    text = "this caller is not permitted to do this"


class InvalidRequest(ServiceError):
    code = StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"

    def __init__(self, violations: Sequence[Violation]) -> None:
        text = "; ".join(f"{v.field}: {v.description}" for v in violations[:MESSAGE_VIOLATIONS_MAX])
        if len(violations) > MESSAGE_VIOLATIONS_MAX:
            more = len(violations) - MESSAGE_VIOLATIONS_MAX  # whoever looks for them may stop after VIOLATIONS_MAX
            text += f"; and {more} more" if len(violations) <= VIOLATIONS_MAX else "; and many more"
        super().__init__(
            text, metadata={"violation_count": str(len(violations))}, violations=violations[:VIOLATIONS_MAX]
        )


# Statuses travel in HTTP/2 trailers, of which Java's clients take 8 KiB at most, with the details in base64.
VIOLATIONS_MAX = 30
MESSAGE_VIOLATIONS_MAX = 5


class InvalidToken(ServiceError):
    code = StatusCode.INVALID_ARGUMENT
    reason = "INVALID_TOKEN"


class Overloaded(ServiceError):
    code = StatusCode.RESOURCE_EXHAUSTED
    reason = "OVERLOADED"
    retry_after_s = 1.0


class RateExceeded(ServiceError):
    code = StatusCode.RESOURCE_EXHAUSTED
    reason = "RATE_EXCEEDED"
    retry_after_s = 1.0


class ShuttingDown(ServiceError):
    code = StatusCode.UNAVAILABLE
    reason = "SHUTTING_DOWN"
    retry_after_s = 0.2


class DatabaseUnavailable(ServiceError):
    code = StatusCode.UNAVAILABLE
    reason = "DATABASE_UNAVAILABLE"
    retry_after_s = 1.0


class TransactionConflict(ServiceError):
    code = StatusCode.ABORTED
    reason = "TRANSACTION_CONFLICT"
    retry_after_s = 0.1


class DeadlineExceeded(ServiceError):
    code = StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class Internal(ServiceError):
    """Its text is fixed, so that nothing of the inside leaks out."""

    code = StatusCode.INTERNAL
    reason = "INTERNAL"


class PortTaken(Exception):
    """Another process listens there. No answer to a caller: the process cannot start."""


def to_status(error: ServiceError, domain: str) -> status_pb2.Status:
    """The rich form of an error: ErrorInfo always, BadRequest and RetryInfo where they apply."""
    details: list[message.Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=domain, metadata=error.metadata)
    ]
    if error.violations:
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=v.field, description=v.description, reason=v.reason
                    )
                    for v in error.violations
                ]
            )
        )
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1_000_000_000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status
