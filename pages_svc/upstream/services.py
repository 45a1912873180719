"""Channels to the services, the deadline of what is asked of them, and what it means to a person when they refuse."""

from collections.abc import Awaitable
from typing import Any, NamedTuple, TypeVar

import grpc
from grpc import StatusCode

from chassis import cells, grpc_client
from chassis.cells import Cell, Cells
from chassis.errors import Violation
from chassis.tls import Credentials
from pages_svc import person
from pages_svc.settings import ServeSettings
from pos import service_config
from pos.errors import read_status
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub
from retail.analytics.v1.audit_service_pb2_grpc import AuditServiceStub
from retail.analytics.v1.quarantine_service_pb2_grpc import QuarantineServiceStub
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


class OfCell(NamedTuple):
    """The stubs of a cell's own services."""

    cell: Cell
    purchases: Any
    outbox: Any


class Services:
    """A stub for each service; of those that each cell has, one for each."""

    def __init__(self, config: ServeSettings, credentials: Credentials | None) -> None:
        """Raises SettingsError: the file of cells makes no sense."""
        self._credentials = credentials
        self._channels: dict[str, grpc.aio.Channel] = {}  # by target
        self._targets = {"analytics": config.analytics_target, "consumer": config.consumer_target}
        self._said = cells.follow(config) if config.cells_file else None
        self._only = cells.only(config.purchases_target, config.relay_target)
        self.analytics: Any = AnalyticsServiceStub(self._channel(config.analytics_target))
        self.audit: Any = AuditServiceStub(self._channel(config.consumer_target))
        self.quarantine: Any = QuarantineServiceStub(self._channel(config.consumer_target))

    @property
    def cells(self) -> Cells:
        return self._said.value if self._said else self._only

    def of_cells(self, branch_id: int | None = None) -> list[OfCell]:
        """Those of all cells, or of the one that has the branch."""
        having = branch_id and self.cells.of_branch(branch_id)
        return [
            OfCell(
                cell,
                PurchasesServiceStub(self._channel(cell.purchases)),
                OutboxServiceStub(self._channel(cell.relay)),
            )
            for cell in ([having] if having else self.cells.by_name.values())
        ]

    async def follow(self) -> None:
        """What the file of cells says, until cancelled."""
        if self._said:
            await self._said.follow(lambda: None)

    def _channel(self, target: str) -> grpc.aio.Channel:
        if target not in self._channels:
            self._channels[target] = grpc_client.connect(target, service_config.TEXT, self._credentials)
        return self._channels[target]

    def call(self, method: Any, request: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """A call in the name of who looks."""
        return method(request, timeout=timeout_s, metadata=person.metadata())

    async def ask(self, service: str, call: Awaitable[T], target: str = "") -> T:
        """The answer to a call of that service; `target` is where, of those that each cell has.

        Raises:
            Problem
        """
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise self.problem(service, error, target) from None

    def problem(self, service: str, error: grpc.aio.AioRpcError, target: str = "") -> Problem:
        status = read_status(error)
        where = f"the {service} service at {target or self._targets[service]}"
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
