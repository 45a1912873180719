"""Every refusal of the relay's service.

ServiceError
├── EventNotFound     an event that is to be requeued is not in the outbox
└── EventsDropped     events that are to be listed are past their retention, and gone
"""

from grpc import StatusCode

from chassis.errors import ServiceError


class EventNotFound(ServiceError):
    code = StatusCode.NOT_FOUND
    reason = "EVENT_NOT_FOUND"


class EventsDropped(ServiceError):
    code = StatusCode.FAILED_PRECONDITION
    reason = "EVENTS_DROPPED"
