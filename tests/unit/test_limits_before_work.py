"""A list that is longer than allowed is refused by its length: nobody looks at what is in it."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from analytics_svc.serve import server as analytics
from chassis import wire
from chassis.errors import InvalidRequest, Violation
from chassis.parts import Parts
from purchases_svc.server import CUSTOMER_IDS_MAX, PurchasesServicer
from relay_svc import server as relay
from retail.purchases.v1.purchases_service_pb2 import (
    CreatePurchaseRequest,
    ExportPurchasesRequest,
    PurchaseUpload,
    UploadPurchasesRequest,
)
from retail.relay.v1.outbox_service_pb2 import ListOutboxEventsRequest, RequeueEventsRequest

MANY = 100_000


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each rule is applied."""
    counter: Counter[str] = Counter()
    for rule in ("parse_uuid", "check_id"):
        original = getattr(wire, rule)

        def counting(*args: Any, original: Any = original, rule: str = rule) -> Any:
            counter[rule] += 1
            return original(*args)

        monkeypatch.setattr(wire, rule, counting)
    return counter


def test_ids_of_an_analytics_question(looked_at: Counter[str]) -> None:
    """The one check of all lists of ids there."""
    violations: list[Violation] = []
    analytics._check_ids("product_ids", [0] * MANY, violations)
    assert (len(violations), looked_at["check_id"]) == (1, 0)


async def test_customers_of_an_export(looked_at: Counter[str]) -> None:
    """At most as many as an export may name."""
    servicer: Any = PurchasesServicer(*(SimpleNamespace(max_size=2) for _ in range(6)))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest):
        async for _ in servicer.ExportPurchases(ExportPurchasesRequest(customer_ids=["x"] * MANY), None):
            pass
    assert looked_at["parse_uuid"] <= CUSTOMER_IDS_MAX


async def test_events_of_the_outbox(looked_at: Counter[str]) -> None:
    """At most as many as a call may name."""
    servicer: Any = relay.OutboxServicer(*(SimpleNamespace() for _ in range(5)))  # type: ignore[arg-type]
    for call in (
        servicer.RequeueEvents(RequeueEventsRequest(event_ids=["x"] * MANY), None),
        servicer.ListOutboxEvents(ListOutboxEventsRequest(event_ids=["x"] * MANY), None),
    ):
        with pytest.raises(InvalidRequest):
            await call
    assert looked_at["parse_uuid"] <= relay.REQUEUE_MAX + relay.EVENTS_PER_PAGE[1]


def test_uploads_of_a_message_are_opened_part_by_part() -> None:
    """A megabyte of them may be half a million items: nobody reads them all in one go. What the gate looks at and what
    is recorded are the same, read once."""
    message = UploadPurchasesRequest(
        uploads=[PurchaseUpload(sequence_number=n, create_purchase=CreatePurchaseRequest()) for n in range(5)]
    )
    read: Any = PurchasesServicer.UploadPurchases
    looked_at: list[UploadPurchasesRequest] = []

    def open_part(raw: bytes) -> UploadPurchasesRequest:
        looked_at.append(UploadPurchasesRequest.FromString(raw))
        return looked_at[-1]

    parts = Parts(read.unopened.FromString(message.SerializeToString()), open_part)
    assert (len(parts), looked_at) == (5, [])
    opened = [parts.open(first, first + 2) for first in range(0, 5, 2)]
    assert [upload for part in opened for upload in part.uploads] == list(message.uploads)
    assert all(one is other for one, other in zip(opened, looked_at, strict=True))
