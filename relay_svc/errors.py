"""Every refusal of the relay's service.

ServiceError
└── EventNotFound     an event that is to be requeued is not in the outbox
"""

from grpc import StatusCode

from chassis.errors import ServiceError


class EventNotFound(ServiceError):
    code = StatusCode.NOT_FOUND
    reason = "EVENT_NOT_FOUND"
