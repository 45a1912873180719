"""The gRPC face of the quarantine. Errors are raised; `chassis.grpc_server` maps them."""

import datetime
import re
from collections.abc import Sequence
from typing import Any

from analytics_svc.errors import PurchaseExists
from analytics_svc.ingest import quarantine
from analytics_svc.ingest.announce import announce
from analytics_svc.ingest.quarantine import Kept
from analytics_svc.ingest.settling import OLDER_THAN_FLOOR, Settler
from analytics_svc.upstream.chain import Chain
from chassis import wire
from chassis.errors import VIOLATIONS_MAX, DatabaseUnavailable, FieldReason, InvalidRequest, Violation
from chassis.postgres import Pool
from retail.analytics.v1 import quarantine_service_pb2 as pb
from retail.analytics.v1 import quarantine_service_pb2_grpc

EVENTS_PER_PAGE = (50, 500)  # by default, at most
IDS_MAX = 1_000  # in one request
NAMED_MAX = 10  # refused entries that an error names in words
PURCHASES_MAX = 100  # that one body may name; an event of ours names one

# Found in bodies that no parser reads, too. Those that one reads may kill.
_PURCHASE_ID = re.compile(rb'"purchase_id"\s*:\s*"([0-9a-fA-F-]{36})"')
_REASON = re.compile(r"[A-Z][A-Z_]{0,62}")


class QuarantineServicer(quarantine_service_pb2_grpc.QuarantineServiceServicer):
    """`retail.analytics.v1.QuarantineService`."""

    def __init__(self, pool: Pool, settler: Settler, chain: Chain) -> None:
        self._pool, self._settler, self._chain = pool, settler, chain
        self.tokens: wire.PageTokens | None = None  # comes when the database is up and proven to be ours

    async def ListQuarantinedEvents(
        self, request: pb.ListQuarantinedEventsRequest, context: Any
    ) -> pb.ListQuarantinedEventsResponse:
        violations: list[Violation] = []
        limit = wire.page_size(request.page_size, *EVENTS_PER_PAGE, violations)
        if request.reason and not _REASON.fullmatch(request.reason):
            violations.append(
                Violation("reason", "must be a reason, such as TOTAL_MISMATCH", FieldReason.UNKNOWN_VALUE)
            )
        tokens = self._admit(violations)
        position = tokens.read(request)
        after = (datetime.datetime.fromisoformat(position[0]), position[1]) if position else None
        async with self._pool.connection() as connection:
            events, more = await quarantine.page(connection, request.reason, after, limit)
        last = [events[-1].quarantined_at.isoformat(), events[-1].quarantine_id] if more else None
        return pb.ListQuarantinedEventsResponse(
            quarantined_events=[
                pb.QuarantinedEvent(
                    quarantine_id=event.quarantine_id,
                    event_id=event.event_id or "",
                    reason=event.reason,
                    detail=event.detail,
                    body=event.body,
                    quarantine_time=wire.timestamp(event.quarantined_at),
                    body_size=event.body_size,
                )
                for event in events
            ],
            next_page_token=tokens.issue(request, last) if last else "",
        )

    async def RedriveEvents(self, request: pb.RedriveEventsRequest, context: Any) -> pb.RedriveEventsResponse:
        ids = self._ids(request.quarantine_ids)
        redriven = {quarantine_id: await self._settler.redrive(quarantine_id) for quarantine_id in ids}
        return pb.RedriveEventsResponse(
            redriven_count=sum(outcome is True for outcome in redriven.values()),
            remaining_count=sum(outcome is False for outcome in redriven.values()),
            unknown_quarantine_ids=[quarantine_id for quarantine_id, outcome in redriven.items() if outcome is None],
        )

    async def DiscardEvents(self, request: pb.DiscardEventsRequest, context: Any) -> pb.DiscardEventsResponse:
        ids = self._ids(request.quarantine_ids)
        known, sold = [], []
        violations = []
        for index, quarantine_id in enumerate(ids):
            async with self._pool.connection() as connection:
                kept = await quarantine.find(connection, quarantine_id)
            if kept is None:
                continue
            known.append(quarantine_id)
            if not kept.counted and kept.reason != OLDER_THAN_FLOOR and await self._has_purchase(kept):
                sold.append(quarantine_id)
                rule = "its purchase exists and is not counted: redrive the event, or rebuild the purchase's day"
                violations.append(Violation(f"quarantine_ids[{index}]", rule, FieldReason.NOT_COUNTED))
        if violations:
            raise PurchaseExists(
                f"nothing is discarded: {len(violations)} of {len(ids)} events are of purchases that exist and are not"
                f" counted; redrive them, or rebuild their days: {', '.join(sold[:NAMED_MAX])}"
                + (", …" if len(sold) > NAMED_MAX else ""),
                metadata={"violation_count": str(len(violations))},
                violations=violations[:VIOLATIONS_MAX],
            )
        async with self._pool.connection() as connection, connection.transaction():
            discarded = await quarantine.remove(connection, known)
            if discarded:
                await announce(connection, (), counted=False)
        return pb.DiscardEventsResponse(
            discarded_count=discarded,
            unknown_quarantine_ids=[quarantine_id for quarantine_id in ids if quarantine_id not in known],
        )

    async def _has_purchase(self, kept: Kept) -> bool:
        """Whether a purchases service has a purchase that the body names, or an outbox an event with that id.

        The body alone does not tell: who sends another one with the id of a real event would have that event settled,
        as far as `complete_through_time` goes.

        Raises:
            PurchasesUnavailable, RelayUnavailable: one of them does not say.
        """
        if kept.event_id and await self._chain.holds_event(kept.event_id):
            return True
        named = {wire.parse_uuid(match.decode()) for match in _PURCHASE_ID.findall(kept.body)}
        for purchase_id in list(filter(None, named))[:PURCHASES_MAX]:
            if await self._chain.recorded_day(purchase_id):
                return True
        return False

    def _ids(self, asked: Sequence[str]) -> list[str]:
        """The request's ids, each once and in the database's form."""
        violations = []
        if not 1 <= len(asked) <= IDS_MAX:
            reason = FieldReason.TOO_MANY if asked else FieldReason.REQUIRED
            violations.append(Violation("quarantine_ids", f"must be 1 to {IDS_MAX:,} ids", reason))
        ids = [wire.parse_uuid(quarantine_id) for quarantine_id in asked[:IDS_MAX]]
        violations += [
            Violation(f"quarantine_ids[{index}]", wire.UUID_RULE, FieldReason.NOT_A_UUID)
            for index, parsed in enumerate(ids)
            if not parsed
        ]
        self._admit(violations)
        return list(dict.fromkeys(filter(None, ids)))

    def _admit(self, violations: list[Violation]) -> wire.PageTokens:
        """Refuse a request that is wrong, or comes too early; returns what reads and makes page tokens."""
        if violations:
            raise InvalidRequest(violations)
        if self.tokens is None:
            raise DatabaseUnavailable("the database is not available")
        return self.tokens
