"""What is on its way through the system, what is stuck, what the audit has found; what an operator can do about it."""

import asyncio
import datetime
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from chassis import wire
from pages_svc.upstream.sales import Totals, date_of, moment_of, totals_of
from pages_svc.upstream.services import CALL_TIMEOUT_S, OfCell, Services
from retail.analytics.v1 import audit_service_pb2 as audit_pb
from retail.analytics.v1 import quarantine_service_pb2 as quarantine_pb
from retail.purchases.v1 import purchases_service_pb2 as purchases_pb
from retail.relay.v1 import outbox_service_pb2 as outbox_pb

LISTED_MAX = 500  # events that are looked at; the counts beside them are of all
ACT_TIMEOUT_S = 600.0
BODY_SHOWN = 4_000  # bytes of an event's body


class Outbox(NamedTuple):
    """Events on their way to the broker."""

    waiting: int
    failed: int
    oldest_s: float | None
    publishing: bool
    reason: str  # why it does not
    per_second: float  # over the last minute
    blocker: str  # what keeps PostgreSQL from cleaning up; empty: nothing
    queue: int | None  # messages in the consumer's queue that it has not in hand; None: not known


class Failed(NamedTuple):
    """An event that was given up."""

    event_id: str
    purchase_id: str
    time: datetime.datetime
    attempts: int
    reason: str


class Quarantined(NamedTuple):
    """An event that could not be counted."""

    quarantine_id: str
    event_id: str
    reason: str
    detail: str
    body: str
    body_size: int
    time: datetime.datetime


class Difference(NamedTuple):
    """A day and branch whose sums are not the same."""

    day: datetime.date
    branch_id: int
    recorded: Totals
    counted: Totals
    verdict: str
    detail: str


class Finding(NamedTuple):
    """A row of a read model that is wrong."""

    table: str
    key: str
    detail: str
    day: datetime.date | None  # whose rebuild repairs it; None: any day's


class CellMark(NamedTuple):
    """How far a cell's sales go."""

    cell: str
    complete_through: datetime.datetime | None  # None: nothing is known of it
    awaited: str  # the id of the oldest event that is waited for


class Proof(NamedTuple):
    """What the audit knows."""

    verdict: str
    stale: bool
    wrong_count: int
    foreign_count: int
    pending_count: int
    pending_since: datetime.datetime | None
    compared_through: datetime.datetime | None
    last_cycle: datetime.datetime | None
    last_sweep: datetime.datetime | None
    proven_days: int
    unproven_days: int
    differences: list[Difference]
    findings: list[Finding]
    cells: list[CellMark]  # the one that is the furthest behind first


class IncompleteTill(NamedTuple):
    """A till's journal of which sales are missing for long, or came with numbers twice."""

    branch_id: int
    pos_id: str
    complete_through: int
    reported_through: int
    missing_since: datetime.datetime | None
    reported: datetime.datetime
    conflicts: int


class Insides:
    """Asks, and acts. Every method may raise `Problem`."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def outbox(self) -> Outbox:
        """Those of all cells together."""
        every = self._services.of_cells()
        found = await asyncio.gather(*(self._outbox(each) for each in every))
        names = [f"{each.cell.name}: " if len(every) > 1 else "" for each in every]

        def told(texts: Iterable[str]) -> str:
            return "; ".join(name + text for name, text in zip(names, texts, strict=True) if text)

        return Outbox(
            sum(it.waiting for it in found),
            sum(it.failed for it in found),
            max((it.oldest_s for it in found if it.oldest_s is not None), default=None),
            all(it.publishing for it in found),
            told(it.reason for it in found),
            sum(it.per_second for it in found),
            told(it.blocker for it in found),
            max((it.queue for it in found if it.queue is not None), default=None),  # all look at the same one
        )

    async def _outbox(self, of: OfCell) -> Outbox:
        reply = await self._relay(of, "GetOutboxStatus", outbox_pb.GetOutboxStatusRequest())
        age = reply.oldest_pending_age
        return Outbox(
            reply.new_count,
            reply.failed_count,
            age.ToTimedelta().total_seconds() if reply.HasField("oldest_pending_age") else None,
            reply.breaker_state == outbox_pb.BREAKER_STATE_CLOSED,
            reply.breaker_reason,
            reply.events_per_second,
            _blocker(reply.blocking_session) if reply.HasField("blocking_session") else "",
            reply.queue_ready_count if reply.HasField("queue_ready_count") else None,
        )

    async def failed(self) -> list[Failed]:
        every = await asyncio.gather(*(self._failed(each) for each in self._services.of_cells()))
        return [it for found in every for it in found]

    async def _failed(self, of: OfCell) -> list[Failed]:
        request = outbox_pb.ListOutboxEventsRequest(page_size=LISTED_MAX, status=outbox_pb.OUTBOX_STATUS_FAILED)
        reply = await self._relay(of, "ListOutboxEvents", request)
        return [
            Failed(it.event_id, it.aggregate_id, moment_of(it.occur_time), it.attempt_count, it.last_error or "unknown")
            for it in reply.outbox_events
        ]

    async def quarantined(self, reason: str = "") -> list[Quarantined]:
        """The oldest first; up to LISTED_MAX."""
        request = quarantine_pb.ListQuarantinedEventsRequest(page_size=LISTED_MAX, reason=reason)
        listed: list[Quarantined] = []
        while True:
            reply = await self._consumer(self._services.quarantine.ListQuarantinedEvents, request)
            listed += map(_quarantined, reply.quarantined_events)
            if not reply.next_page_token or len(listed) >= LISTED_MAX:
                return listed[:LISTED_MAX]
            request.page_token = reply.next_page_token

    async def proof(self) -> Proof:
        reply = await self._consumer(self._services.audit.GetAuditStatus, audit_pb.GetAuditStatusRequest())
        return Proof(
            _verdict(reply.verdict),
            reply.stale,
            reply.wrong_count,
            reply.foreign_event_count,
            reply.pending_count,
            _moment(reply, "pending_since_time"),
            _moment(reply, "compared_through_time"),
            _moment(reply, "last_cycle_time"),
            _moment(reply, "last_sweep_time"),
            reply.proven_day_count,
            reply.unproven_day_count,
            [
                Difference(
                    date_of(row.sales_date),
                    row.branch_id,
                    totals_of(row.recorded),
                    totals_of(row.counted),
                    _verdict(row.verdict),
                    row.detail,
                )
                for row in reply.different_rows
                if row.verdict != audit_pb.AUDIT_VERDICT_PENDING
            ],
            [
                Finding(it.table, it.key, it.detail, date_of(it.sales_date) if it.HasField("sales_date") else None)
                for it in reply.findings
            ],
            [
                CellMark(it.cell, _moment(it, "complete_through_time"), it.oldest_awaited_event_id)
                for it in reply.cell_marks
            ],
        )

    async def incomplete_tills(self) -> tuple[list[IncompleteTill], int]:
        """Some of them, and how many there are."""
        every = self._services.of_cells()
        found = await asyncio.gather(*(self._incomplete_tills(each) for each in every))
        return [till for tills, _ in found for till in tills], sum(count for _, count in found)

    async def _incomplete_tills(self, of: OfCell) -> tuple[list[IncompleteTill], int]:
        call = self._services.call(of.purchases.ListIncompleteTills, purchases_pb.ListIncompleteTillsRequest())
        reply = await self._services.ask("purchases", call, of.cell.purchases)
        return [
            IncompleteTill(
                it.branch_id,
                it.pos_id,
                it.complete_through,
                it.reported_through,
                _moment(it, "missing_since_time"),
                moment_of(it.report_time),
                it.conflict_count,
            )
            for it in reply.incomplete_tills
        ], reply.total_size

    async def requeue(self, event_ids: Sequence[str]) -> int:
        """Publish events once more; how many are NEW now."""
        requeued, every = 0, self._services.of_cells()
        for of in every:
            own = event_ids
            if len(every) > 1:  # with one that is another cell's, none would be
                known = {it.event_id for it in await self._failed(of)}
                own = [event_id for event_id in event_ids if event_id in known]
            if own:
                request = outbox_pb.RequeueEventsRequest(event_ids=own)
                requeued += (await self._relay(of, "RequeueEvents", request, ACT_TIMEOUT_S)).requeued_count
        return requeued

    async def redrive(self, quarantine_ids: Sequence[str]) -> tuple[int, int, int]:
        """Try to count events again; how many are counted now, stay, and are not there any more."""
        request = quarantine_pb.RedriveEventsRequest(quarantine_ids=quarantine_ids)
        reply = await self._consumer(self._services.quarantine.RedriveEvents, request, ACT_TIMEOUT_S)
        return reply.redriven_count, reply.remaining_count, len(reply.unknown_quarantine_ids)

    async def discard(self, quarantine_ids: Sequence[str]) -> tuple[int, int]:
        """Remove events for good; how many, and how many are not there any more."""
        request = quarantine_pb.DiscardEventsRequest(quarantine_ids=quarantine_ids)
        reply = await self._consumer(self._services.quarantine.DiscardEvents, request, ACT_TIMEOUT_S)
        return reply.discarded_count, len(reply.unknown_quarantine_ids)

    async def rebuild(self, day: datetime.date) -> Any:
        """Repair a day; the answer as it is."""
        request = audit_pb.RebuildDayRequest(sales_date=wire.date(day))
        return await self._consumer(self._services.audit.RebuildDay, request, ACT_TIMEOUT_S)

    async def _relay(self, of: OfCell, method: str, request: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        call = self._services.call(getattr(of.outbox, method), request, timeout_s)
        return await self._services.ask("relay", call, of.cell.relay)

    async def _consumer(self, method: Any, request: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        return await self._services.ask("consumer", self._services.call(method, request, timeout_s))


def _quarantined(it: Any) -> Quarantined:
    body = it.body[:BODY_SHOWN].decode(errors="replace")
    return Quarantined(
        it.quarantine_id, it.event_id, it.reason, it.detail, body, it.body_size, moment_of(it.quarantine_time)
    )


def _blocker(it: Any) -> str:
    kind = outbox_pb.BlockerKind.Name(it.kind).removeprefix("BLOCKER_KIND_").lower().replace("_", " ")
    return f"{kind} {it.pid or ''} “{it.application_name}”, {it.transactions_behind:,} transactions behind"


def _verdict(number: int) -> str:
    name = audit_pb.AuditVerdict.Name(number).removeprefix("AUDIT_VERDICT_")  # type: ignore[arg-type]
    return "" if name == "UNSPECIFIED" else name


def _moment(reply: Any, field: str) -> datetime.datetime | None:
    return moment_of(getattr(reply, field)) if reply.HasField(field) else None
