"""The gRPC face: requests to values, values to responses. Errors are raised; `chassis.grpc_server` maps them."""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from google.protobuf import duration_pb2

from chassis import wire
from chassis.errors import FieldReason, InvalidRequest, Violation
from chassis.grpc_server import CALL_TIMEOUT_S
from chassis.postgres import Connection, Pool
from chassis.wire import PageTokens
from relay_svc import committed, days, inspection, lost
from relay_svc.depth import Depth
from relay_svc.errors import EventNotFound
from relay_svc.outbox import NIL
from relay_svc.publisher import Publisher
from relay_svc.relay import Relay
from retail.relay.v1 import outbox_service_pb2 as pb2
from retail.relay.v1 import outbox_service_pb2_grpc

EVENTS_PER_PAGE = (50, 500)  # by default, at most
REQUEUE_MAX = 1_000  # events in one request, and in one transaction
NAMED_MAX = 10  # missing events that an error names


class OutboxServicer(outbox_service_pb2_grpc.OutboxServiceServicer):
    """`retail.relay.v1.OutboxService`."""

    def __init__(self, relay: Relay, publisher: Publisher, pool: Pool, tokens: PageTokens, depth: Depth) -> None:
        self._relay, self._publisher, self._depth = relay, publisher, depth
        self._pool, self._tokens = pool, tokens

    async def GetOutboxStatus(self, request: pb2.GetOutboxStatusRequest, context: Any) -> pb2.GetOutboxStatusResponse:
        async with _transaction(self._pool, context) as connection:
            backlog = await inspection.backlog(connection)
            blocker = await inspection.cleanup_blocker(connection)
        reason = self._relay.breaker_reason
        return pb2.GetOutboxStatusResponse(
            new_count=backlog.new,
            failed_count=backlog.failed,
            oldest_pending_age=_duration(backlog.oldest_age),
            breaker_state=pb2.BREAKER_STATE_OPEN if reason else pb2.BREAKER_STATE_CLOSED,
            breaker_reason=reason or "",
            events_per_second=self._relay.events_per_second(),
            blocking_session=_blocking_session(blocker) if blocker else None,
            queue_ready_count=self._depth.ready,
        )

    async def ListOutboxEvents(
        self, request: pb2.ListOutboxEventsRequest, context: Any
    ) -> pb2.ListOutboxEventsResponse:
        violations: list[Violation] = []
        limit = wire.page_size(request.page_size, *EVENTS_PER_PAGE, violations)
        if request.status not in pb2.OutboxStatus.values():
            violations.append(Violation("status", "must be a known status", FieldReason.UNKNOWN_VALUE))
        if len(request.event_ids) > EVENTS_PER_PAGE[1]:
            rule = f"must have at most {EVENTS_PER_PAGE[1]} events"
            violations.append(Violation("event_ids", rule, FieldReason.TOO_MANY))
        event_ids = _parsed(request.event_ids[: EVENTS_PER_PAGE[1]], violations)
        _raise_if(violations)
        status = pb2.OutboxStatus.Name(request.status).removeprefix("OUTBOX_STATUS_") if request.status else None
        position = self._tokens.read(request)
        after = inspection.Place(*position) if position else inspection.BEGINNING
        events = await self._page(context, status, event_ids, after, limit + 1)
        page = events[:limit]
        token = self._tokens.issue(request, list(page[-1].place)) if len(events) > limit else ""
        return pb2.ListOutboxEventsResponse(outbox_events=map(_outbox_event, page), next_page_token=token)

    async def _page(
        self, context: Any, status: str | None, among: Sequence[str], after: inspection.Place, limit: int
    ) -> list[inspection.StoredEvent]:
        """The first events of all days, of which each hundred are read in a transaction of their own."""
        events: list[inspection.StoredEvent] = []
        if among:
            for ids in days.ids_in_parts(among):
                async with _transaction(self._pool, context) as connection:
                    events += await inspection.page_among(connection, ids, status=status, after=after, limit=limit)
            return sorted(events, key=inspection.order)[:limit]
        async with _transaction(self._pool, context) as connection:
            found = await inspection.days_with(connection, status)
        for part in days.parts(found):
            async with _transaction(self._pool, context) as connection:
                events += await inspection.page(connection, part, status=status, after=after, limit=limit)
        return sorted(events, key=inspection.order)[:limit]

    async def RequeueEvents(self, request: pb2.RequeueEventsRequest, context: Any) -> pb2.RequeueEventsResponse:
        if request.all_failed:
            for field, given in (("event_ids", bool(request.event_ids)), ("only_lost", request.only_lost)):
                if given:
                    rule = "must be empty when all_failed is set"
                    raise InvalidRequest([Violation(field, rule, FieldReason.FIELDS_EXCLUDE_EACH_OTHER)])
            return pb2.RequeueEventsResponse(requeued_count=await self._requeue_all_failed(context))
        event_ids = _event_ids(request)
        parts = list(days.ids_in_parts(event_ids))
        if not request.only_lost:
            await self._require_there(parts, context)
        requeued = 0
        for part in parts:
            async with _transaction(self._pool, context) as connection:
                if request.only_lost:
                    requeued += await lost.requeue(connection, self._publisher, part, lost.AFTER_S)
                else:
                    requeued += await inspection.requeue(connection, part)
        return pb2.RequeueEventsResponse(requeued_count=requeued)

    async def _require_there(self, parts: Sequence[Sequence[str]], context: Any) -> None:
        """
        Raises:
            EventNotFound: some events are not in the outbox.
        """
        missing: list[str] = []
        for part in parts:
            async with _transaction(self._pool, context) as connection:
                missing += await inspection.missing(connection, part)
        if missing:
            named = ", ".join(missing[:NAMED_MAX]) + (", …" if len(missing) > NAMED_MAX else "")
            raise EventNotFound(
                f"{len(missing)} of the events are not in the outbox, so none was requeued: {named}",
                metadata={"event_ids": ",".join(missing[:NAMED_MAX])},
            )

    async def _requeue_all_failed(self, context: Any) -> int:
        """A thousand at a time, each in a transaction of its own. What fails again meanwhile is passed already."""
        async with _transaction(self._pool, context) as connection:
            found = await inspection.days_with(connection, "FAILED")
        requeued = 0
        for part in days.parts(found):
            event_ids, after = [NIL] * REQUEUE_MAX, NIL
            while len(event_ids) == REQUEUE_MAX:
                async with _transaction(self._pool, context) as connection:
                    event_ids = await inspection.failed_ids(connection, part, after=after, limit=REQUEUE_MAX)
                    requeued += await inspection.requeue(connection, event_ids)
                after = event_ids[-1] if event_ids else NIL
        return requeued

    async def ListCommittedEventIds(
        self, request: pb2.ListCommittedEventIdsRequest, context: Any
    ) -> AsyncIterator[pb2.ListCommittedEventIdsResponse]:
        if request.position_only and (request.after_snapshot or request.acknowledge):
            rule = "must not be set together with other fields"
            raise InvalidRequest([Violation("position_only", rule, FieldReason.FIELDS_EXCLUDE_EACH_OTHER)])
        async with self._pool.connection() as connection:
            if request.position_only:
                async with connection.transaction():
                    first = await committed.position(connection)
            else:
                after = await committed.parse(connection, request.after_snapshot)
                async with aclosing(committed.since(connection, after)) as parts:
                    first = await anext(parts)
                    yield pb2.ListCommittedEventIdsResponse(event_ids=first.event_ids)
                    async for part in parts:
                        yield pb2.ListCommittedEventIdsResponse(event_ids=part.event_ids)
            if request.acknowledge:
                await committed.remember(connection, first)
        assert first.as_of_time is not None
        yield pb2.ListCommittedEventIdsResponse(
            snapshot=str(first.snapshot), as_of_time=wire.timestamp(first.as_of_time)
        )


@asynccontextmanager
async def _transaction(pool: Pool, context: Any) -> AsyncIterator[Connection]:
    """A transaction whose statements end when the caller's deadline does, so that nobody's query lingers."""
    remaining = context.time_remaining()
    timeout_s = CALL_TIMEOUT_S if remaining is None else min(max(remaining, 0.001), CALL_TIMEOUT_S)
    async with pool.connection(timeout=timeout_s) as connection, connection.transaction():
        await connection.execute(
            "SELECT set_config('statement_timeout', %s, true)", [str(max(int(timeout_s * 1000), 1))]
        )
        yield connection


def _event_ids(request: pb2.RequeueEventsRequest) -> list[str]:
    violations: list[Violation] = []
    if not 1 <= len(request.event_ids) <= REQUEUE_MAX:
        rule = f"must have 1 to {REQUEUE_MAX:,} events, or all_failed must be set"
        reason = FieldReason.TOO_MANY if request.event_ids else FieldReason.REQUIRED
        violations.append(Violation("event_ids", rule, reason))
    event_ids = _parsed(request.event_ids[:REQUEUE_MAX], violations)
    _raise_if(violations)
    return event_ids


def _parsed(texts: Sequence[str], violations: list[Violation]) -> list[str]:
    event_ids = [wire.parse_uuid(text) for text in texts]
    violations += [
        Violation(f"event_ids[{n}]", wire.UUID_RULE, FieldReason.NOT_A_UUID)
        for n, known in enumerate(event_ids)
        if known is None
    ]
    return [event_id for event_id in event_ids if event_id is not None]


def _outbox_event(event: inspection.StoredEvent) -> pb2.OutboxEvent:
    return pb2.OutboxEvent(
        event_id=event.event_id,
        event_type=event.event_type,
        aggregate_id=event.aggregate_id,
        occur_time=wire.timestamp(event.occurred_at),
        status=pb2.OutboxStatus.Value(f"OUTBOX_STATUS_{event.status}"),
        attempt_count=event.attempts,
        last_error=event.last_error or "",
        send_time=wire.timestamp(event.sent_at) if event.sent_at else None,
    )


def _blocking_session(blocker: inspection.Blocker) -> pb2.BlockingSession:
    return pb2.BlockingSession(
        pid=blocker.pid,
        application_name=blocker.name,
        transaction_age=_duration(blocker.transaction_age),
        kind=pb2.BlockerKind.Value(f"BLOCKER_KIND_{blocker.kind}"),
        transactions_behind=blocker.transactions,
    )


def _duration(age: Any) -> duration_pb2.Duration | None:
    if age is None:
        return None
    duration = duration_pb2.Duration()
    duration.FromTimedelta(age)
    return duration


def _raise_if(violations: list[Violation]) -> None:
    if violations:
        raise InvalidRequest(violations)
