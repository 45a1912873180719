"""Channels to the services, the deadline of what is asked of them, and what it means to a person when they refuse."""

from collections.abc import Awaitable
from typing import Any, TypeVar

import grpc
from grpc import StatusCode

from chassis import grpc_client
from chassis.errors import Violation
from chassis.tls import Credentials
from pages_svc import person
from pages_svc.settings import ServeSettings
from pos import service_config
from pos.errors import read_status
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub
from retail.analytics.v1.audit_service_pb2_grpc import AuditServiceStub
from retail.analytics.v1.quarantine_service_pb2_grpc import QuarantineServiceStub
from retail.purchases.v1.customers_service_pb2_grpc import CustomersServiceStub
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from retail.relay.v1.outbox_service_pb2_grpc import OutboxServiceStub

CALL_TIMEOUT_S = 5.0  # somebody looks at an empty page meanwhile

T = TypeVar("T")


class Problem(Exception):
    """Why there is no answer, in words for the person who wanted it. `reason` is the contracts', for programs."""

    def __init__(self, text: str, advice: str, *, reason: str = "", violations: tuple[Violation, ...] = ()) -> None:
        super().__init__(text)
        self.text, self.advice, self.reason, self.violations = text, advice, reason, violations

    @property
    def refused(self) -> bool:
        """Whoever asks may not: asking again is of no use."""
        return self.reason in ("PERMISSION_DENIED", "UNAUTHENTICATED")


class Services:
    """One stub for each service."""

    def __init__(self, config: ServeSettings, credentials: Credentials | None) -> None:
        def channel(target: str) -> grpc.aio.Channel:
            return grpc_client.connect(target, service_config.TEXT, credentials)

        self._targets = {
            "purchases": config.purchases_target,
            "analytics": config.analytics_target,
            "relay": config.relay_target,
            "consumer": config.consumer_target,
        }
        self._channels = {name: channel(target) for name, target in self._targets.items()}
        self.purchases: Any = PurchasesServiceStub(self._channels["purchases"])
        self.customers: Any = CustomersServiceStub(self._channels["purchases"])
        self.analytics: Any = AnalyticsServiceStub(self._channels["analytics"])
        self.outbox: Any = OutboxServiceStub(self._channels["relay"])
        self.audit: Any = AuditServiceStub(self._channels["consumer"])
        self.quarantine: Any = QuarantineServiceStub(self._channels["consumer"])

    def call(self, method: Any, request: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """A call in the name of who looks."""
        return method(request, timeout=timeout_s, metadata=person.metadata())

    async def ask(self, service: str, call: Awaitable[T]) -> T:
        """The answer to a call of that service.

        Raises:
            Problem
        """
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise self.problem(service, error) from None

    def problem(self, service: str, error: grpc.aio.AioRpcError) -> Problem:
        status = read_status(error)
        where = f"the {service} service at {self._targets[service]}"
        reason = status.reason or status.code.name
        if status.code in (StatusCode.PERMISSION_DENIED, StatusCode.UNAUTHENTICATED):
            text, advice = "This is not for you to see or do.", "Ask whoever runs the system for the right role."
            return Problem(text, advice, reason=reason)
        if status.code in (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED) and not status.reason:
            return Problem(
                f"No answer from {where}.",
                f"Is it running? Its log says why not. On a developer's machine: make status, make start "
                f"(.local/log/{service}.log). This page tries again by itself.",
                reason=reason,
            )
        text = f"{where[0].upper()}{where[1:]} says {reason}: {status.message}"
        retry = status.code in (StatusCode.UNAVAILABLE, StatusCode.RESOURCE_EXHAUSTED, StatusCode.ABORTED)
        advice = "Try again in a moment." if retry else ""
        return Problem(text, advice, reason=reason, violations=status.violations)

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close(None)
