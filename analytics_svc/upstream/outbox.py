"""The outbox as analytics sees it: through the relay's OutboxService. The only file that knows its messages."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Any, NamedTuple

import grpc

from analytics_svc.errors import RelayUnavailable
from chassis import wire
from retail.relay.v1 import outbox_service_pb2 as pb
from retail.relay.v1.outbox_service_pb2_grpc import OutboxServiceStub

SILENCE_S = 20.0  # between two messages of a listing; a longer one is an outage
ASK_TIMEOUT_S = 5.0  # for the answer about one event


class SnapshotRefused(Exception):
    """The relay cannot read a snapshot that it made, so it must be an earlier version's: list everything."""


class EventsDropped(Exception):
    """The outbox has dropped events that are not in the snapshot: whether they are counted, only a rebuild can tell."""


class Listed(NamedTuple):
    """Part of a listing. The last one says for which time the listing is complete."""

    event_ids: list[str]
    snapshot: str = ""  # on the last part only: what to ask with next time
    as_of: datetime | None = None


class Outbox:
    """Asks the relay."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = OutboxServiceStub(channel)

    async def holds(self, event_id: str) -> bool:
        """Whether a purchase was recorded with this event, as far back as the outbox is kept.

        Raises:
            RelayUnavailable: it does not say.
        """
        request = pb.ListOutboxEventsRequest(page_size=1, event_ids=[event_id])
        try:
            return bool((await self._stub.ListOutboxEvents(request, timeout=ASK_TIMEOUT_S)).outbox_events)
        except grpc.aio.AioRpcError as error:
            raise RelayUnavailable(f"the relay does not answer: {error.code().name}: {error.details()}") from error

    async def list_committed(self, after_snapshot: str) -> AsyncGenerator[Listed, None]:
        """The ids of all events committed since a snapshot, part by part; since ever, if it is empty.

        Only for the keeper: it says that all up to the snapshot is settled, for good, and the outbox may drop that.

        Raises:
            RelayUnavailable: no connection, no answer, or one that breaks off.
            SnapshotRefused: it cannot read the snapshot.
            EventsDropped: the listing would not be complete.
        """
        request = pb.ListCommittedEventIdsRequest(after_snapshot=after_snapshot, acknowledge=True)
        async with aclosing(self._list(request)) as parts:
            async for part in parts:
                yield part

    async def requeue_lost(self, event_ids: Sequence[str]) -> int:
        """Have those of some awaited events published again that the broker has lost, a thousand at most; how many.

        Raises:
            RelayUnavailable: it does not answer.
        """
        request = pb.RequeueEventsRequest(event_ids=event_ids, only_lost=True)
        try:
            return int((await self._stub.RequeueEvents(request, timeout=ASK_TIMEOUT_S)).requeued_count)
        except grpc.aio.AioRpcError as error:
            raise RelayUnavailable(f"the relay does not answer: {error.code().name}: {error.details()}") from error

    async def position(self) -> Listed:
        """The end of a listing made now, without its ids.

        Raises:
            RelayUnavailable: no connection, no answer, or one that breaks off.
        """
        async with aclosing(self._list(pb.ListCommittedEventIdsRequest(position_only=True))) as parts:
            async for part in parts:
                if part.snapshot:
                    return part
        raise AssertionError("a listing ends with its snapshot, or raises")

    async def _list(self, request: pb.ListCommittedEventIdsRequest) -> AsyncGenerator[Listed, None]:
        call = self._stub.ListCommittedEventIds(request)
        try:
            while True:
                async with asyncio.timeout(SILENCE_S):
                    reply: Any = await call.read()
                if reply is grpc.aio.EOF:
                    raise RelayUnavailable("the listing ended without its last message")
                if not reply.snapshot:
                    yield Listed(list(reply.event_ids))
                    continue
                yield Listed(list(reply.event_ids), reply.snapshot, wire.parse_timestamp(reply.as_of_time))
                return
        except TimeoutError:
            raise RelayUnavailable(f"no message for {SILENCE_S:g} s") from None
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise SnapshotRefused(error.details()) from error
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise EventsDropped(error.details()) from error
            raise RelayUnavailable(f"{error.code().name}: {error.details()}") from error
        finally:
            call.cancel()
