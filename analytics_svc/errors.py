"""Every refusal of the analytics service, of events and of calls.

Rejected                     an event that must not be counted
ServiceError
└── CustomerNotFound         a customer of whom no purchase is counted
"""

from grpc import StatusCode

from chassis.errors import ServiceError


class Rejected(Exception):
    """An event for the quarantine. The reason is for programs, the detail for people.

    Details quote the message through `quoted` only.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail
        self.event_id: str | None = None


def quoted(value: object) -> str:
    """A value from outside, short and in printable ASCII: the database takes neither NUL nor half characters."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class CustomerNotFound(ServiceError):
    code = StatusCode.NOT_FOUND
    reason = "CUSTOMER_NOT_FOUND"
