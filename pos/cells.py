"""Which cell of the chain records a branch's sales: learnt when a service refuses one, and says who does."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc

from chassis.tls import Credentials
from pos import errors
from pos.calls import connect
from pos.errors import Status, WrongCell
from retail.purchases.v1 import purchases_service_pb2 as pb2
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub

HOPS_MAX = 3  # while a branch moves, two services may each say that the other one has it

# They agree soon. So it is no refusal, but a reason to come again.
MOVING = Status(grpc.StatusCode.UNAVAILABLE, "the branch is being moved: each cell says that another one has it")

Reach = Callable[[str], grpc.Channel]


@contextmanager
def reaching(credentials: Credentials | None) -> Iterator[Reach]:
    """Opens channels to addresses; they are closed at the end of the block."""
    with ExitStack() as channels:
        yield lambda address: channels.enter_context(connect(address, credentials))


class Cells:
    """The services that record sales: the one at which a client begins, and those that it was sent on to."""

    def __init__(self, first: grpc.Channel, reach: Reach | None) -> None:
        """Without `reach`, sales of another cell's branches are refused."""
        self._first, self._reach = PurchasesServiceStub(first), reach
        self._lock = threading.Lock()
        self._at: dict[str, PurchasesServiceStub] = {}  # by address
        self._of: dict[int, PurchasesServiceStub] = {}  # by branch, where it is not the first

    def of(self, branch_id: int) -> PurchasesServiceStub:
        return self._of.get(branch_id, self._first)

    def is_elsewhere(self, branch_id: int) -> bool:
        """Whether the branch is known to be another cell's than the one at which the client begins."""
        return branch_id in self._of

    def create(
        self, request: pb2.CreatePurchaseRequest, timeout: float, metadata: Sequence[tuple[str, str]] = ()
    ) -> pb2.CreatePurchaseResponse:
        """CreatePurchase at the service that has the branch, wherever that is said to be.

        Raises:
            grpc.RpcError, Unavailable
        """
        return self._call("CreatePurchase", request.purchase.branch_id, request, timeout, metadata)  # type: ignore[no-any-return]

    def report_till(
        self, request: pb2.ReportTillRequest, timeout: float, metadata: Sequence[tuple[str, str]] = ()
    ) -> pb2.ReportTillResponse:
        """ReportTill, as `create`."""
        return self._call("ReportTill", request.branch_id, request, timeout, metadata)  # type: ignore[no-any-return]

    def till_state(
        self, request: pb2.GetTillStateRequest, timeout: float, metadata: Sequence[tuple[str, str]] = ()
    ) -> pb2.GetTillStateResponse:
        """GetTillState, as `create`."""
        return self._call("GetTillState", request.branch_id, request, timeout, metadata)  # type: ignore[no-any-return]

    def _call(
        self, method: str, branch_id: int, request: Any, timeout: float, metadata: Sequence[tuple[str, str]]
    ) -> Any:
        for _ in range(HOPS_MAX):
            try:
                return getattr(self.of(branch_id), method)(request, timeout=timeout, metadata=metadata)
            except grpc.RpcError as error:
                if not self.learn(branch_id, errors.read_status(error)):
                    raise
        raise errors.Unavailable(MOVING)

    def learn(self, branch_id: int, status: Status) -> bool:
        """Whether a refusal tells where to send the branch's sales from now on."""
        address = WrongCell(status).address if status.reason == errors.WRONG_CELL else ""
        if not address or not self._reach:
            return False
        with self._lock:
            if address not in self._at:
                self._at[address] = PurchasesServiceStub(self._reach(address))  # it connects when it is called
            self._of[branch_id] = self._at[address]
        return True
