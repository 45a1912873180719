"""Every refusal of the relay's service.

ServiceError
├── EventNotFound     an event that is to be requeued is not in the outbox
└── EventsDropped     events that are to be listed are past their retention, and gone
"""

from grpc import StatusCode

from chassis.errors import ServiceError
from retail.relay.v1 import error_reason_pb2 as reasons

_named = reasons.ErrorReason.Name  # what the contract does not have cannot be raised


class EventNotFound(ServiceError):
    code = StatusCode.NOT_FOUND
    reason = _named(reasons.EVENT_NOT_FOUND)


class EventsDropped(ServiceError):
    code = StatusCode.FAILED_PRECONDITION
    reason = _named(reasons.EVENTS_DROPPED)
