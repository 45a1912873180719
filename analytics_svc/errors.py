"""Every refusal of the analytics service, of events and of calls.

Rejected                     an event that must not be counted
ServiceError
├── CustomerNotFound         a customer of whom no purchase is counted
├── NotYetVisible            the purchase of a consistency token is not included within the caller's time
├── PurchaseQuarantined      its event is quarantined: waiting does not help
├── WatcherTooSlow           a watcher does not take what it is sent
├── PurchasesUnavailable     the purchases service, which an audit or a repair asks, does not answer
├── RelayUnavailable         the relay cannot be asked about the outbox, or does not finish its answer
├── PurchaseExists           an event that must not be discarded, as its purchase is not counted
├── TimeZonesDiffer          its business days are not ours
├── RebuildRunning           one repair at a time
└── HistoryDropped           the recorded purchases that it would take are past their retention
"""

from grpc import StatusCode

from chassis.errors import ServiceError
from retail.analytics.v1 import error_reason_pb2 as reasons

_named = reasons.ErrorReason.Name  # what the contract does not have cannot be raised


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
    reason = _named(reasons.CUSTOMER_NOT_FOUND)


class NotYetVisible(ServiceError):
    code = StatusCode.UNAVAILABLE
    reason = _named(reasons.NOT_YET_VISIBLE)
    retry_after_s = 1.0


class PurchaseQuarantined(ServiceError):
    code = StatusCode.FAILED_PRECONDITION
    reason = _named(reasons.PURCHASE_QUARANTINED)


class WatcherTooSlow(ServiceError):
    code = StatusCode.RESOURCE_EXHAUSTED
    reason = _named(reasons.WATCHER_TOO_SLOW)
    retry_after_s = 1.0


class PurchasesUnavailable(ServiceError):
    code = StatusCode.UNAVAILABLE
    reason = _named(reasons.PURCHASES_UNAVAILABLE)
    retry_after_s = 1.0


class RelayUnavailable(ServiceError):
    code = StatusCode.UNAVAILABLE
    reason = _named(reasons.RELAY_UNAVAILABLE)
    retry_after_s = 1.0


class PurchaseExists(ServiceError):
    code = StatusCode.FAILED_PRECONDITION
    reason = _named(reasons.PURCHASE_EXISTS)


class TimeZonesDiffer(ServiceError):
    code = StatusCode.FAILED_PRECONDITION
    reason = _named(reasons.TIME_ZONES_DIFFER)


class RebuildRunning(ServiceError):
    code = StatusCode.ABORTED
    reason = _named(reasons.REBUILD_RUNNING)
    retry_after_s = 5.0


class HistoryDropped(ServiceError):
    code = StatusCode.FAILED_PRECONDITION
    reason = _named(reasons.HISTORY_DROPPED)
