"""UploadPurchases: the backlog of a till that was offline, message by message, and sales as they happen, one by one."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import NamedTuple
from weakref import WeakValueDictionary

from chassis import grpc_guard, grpc_server, traces
from chassis.errors import (
    AccessRefused,
    FieldReason,
    Internal,
    InvalidRequest,
    MalformedMessage,
    MessageTooLarge,
    ServiceError,
    ShuttingDown,
    Violation,
    to_status,
)
from chassis.parts import Parts
from chassis.traces import Span
from purchases_svc import messages
from purchases_svc.admission import SHARE_SALES_MIN
from purchases_svc.answers import Outcome, Recorded
from purchases_svc.entry import Call
from purchases_svc.in_hand import InHand, Single
from purchases_svc.record import Recorder
from purchases_svc.sale import Sale
from retail.purchases.v1 import purchases_service_pb2 as pb2

METHOD = "retail.purchases.v1.PurchasesService/UploadPurchases"
UPLOADS_PER_MESSAGE_MAX = 500
# Of so few sales in a message, each is answered by itself: they come from tills that sell right now, perhaps from
# several on one stream, and who has to wait for something holds up nobody else. More are a backlog.
SINGLES_PER_MESSAGE_MAX = 20
# Sales of one caller's backlogs, on all its streams, that are being stored and answered: as many as it may always have
# on their way. Further messages wait to be looked at: what waits as bytes is no work for anybody.
SALES_OF_CALLER_MAX = SHARE_SALES_MIN
SLICE, SLICE_BYTES = 10, 64 << 10  # sales, before anybody else has a turn; of large ones fewer, one at the least


class Uploads:
    """Answers upload streams until the server drains."""

    def __init__(self, recorder: Recorder, host: grpc_server.Server) -> None:
        self._recorder, self._host = recorder, host
        self._slicing = asyncio.Lock()
        self._shares: WeakValueDictionary[str, Share] = WeakValueDictionary()  # by caller

    async def answer(
        self, requests: AsyncIterator[Parts], caller: str
    ) -> AsyncGenerator[pb2.UploadPurchasesResponse, None]:
        """Each sale is answered once, after it is durable, in whatever order that comes.

        When the server drains, what was read is still answered; then the stream ends with SHUTTING_DOWN.
        """
        hand = InHand(self._host.in_flight, caller)
        share = self._shares.setdefault(caller, Share())
        refused: ServiceError | None = None
        reader = asyncio.create_task(self._read(requests, caller, hand, share))
        draining = asyncio.create_task(self._host.draining.wait())
        draining.add_done_callback(lambda _: reader.cancel())
        try:
            async with aclosing(hand.answerable()) as answerable:
                async for part in answerable:
                    try:
                        response = await (part if isinstance(part, asyncio.Task) else self._answer(part))
                    except (AccessRefused, MalformedMessage, MessageTooLarge) as error:
                        refused = refused or error  # and ends the stream, once what came before is answered
                        reader.cancel()
                    else:
                        yield response
            if refused:
                await asyncio.wait({reader})
                raise refused
            await reader  # raises why the reading ended, if not by the client's own will
        finally:
            draining.cancel()  # and the reader with it
            hand.close()

    async def _read(self, requests: AsyncIterator[Parts], caller: str, hand: InHand, share: "Share") -> None:
        iterator = aiter(requests)
        try:
            while True:
                await hand.room()
                request = await anext(iterator, None)  # chassis ends a stream that is idle for long
                if request is None:
                    return  # the client has sent everything
                if not 1 <= len(request) <= UPLOADS_PER_MESSAGE_MAX:
                    rule = f"must have 1 to {UPLOADS_PER_MESSAGE_MAX} sales"
                    reason = FieldReason.TOO_MANY if len(request) else FieldReason.REQUIRED
                    raise InvalidRequest([Violation("uploads", rule, reason)])
                if len(request) > SINGLES_PER_MESSAGE_MAX:
                    hand.take_batch(asyncio.create_task(self._record_in_turn(request, caller, share)))
                    continue
                opened: list[pb2.PurchaseUpload] = []
                for first, last in _slices(request.sizes):
                    opened += _opened(request, first, last)
                    await asyncio.sleep(0)
                for upload in opened:  # all of it was looked at by now
                    self._take_in(upload, caller, hand)
        except asyncio.CancelledError:
            if self._host.draining.is_set():
                raise ShuttingDown("this server is shutting down; send what was not answered to another one") from None
            raise
        finally:
            hand.all_read()

    def _take_in(self, upload: pb2.PurchaseUpload, caller: str, hand: InHand) -> None:
        single = hand.take_single(upload, upload.ByteSize())
        spans = _spans([upload])
        try:
            self._recorder.require_room(caller, 1)  # before anything is made of it
            sale = self._recorder.ours(messages.parse_sale(upload.create_purchase))
            single.call = self._recorder.take_in([sale], caller, spans)
        except ServiceError as error:
            _end(spans.values(), error)
            single.refusal = error.with_traceback(None)  # which holds this frame, which holds the sale: a ring
            hand.settled(single)
        else:
            single.call.answered.add_done_callback(lambda _: hand.settled(single))
            _end_when_answered(single.call, spans)

    async def _answer(self, singles: Sequence[Single]) -> pb2.UploadPurchasesResponse:
        """At once: tills wait for these, and not in the line of the backlogs."""
        response = pb2.UploadPurchasesResponse()
        for number, single in enumerate(singles, 1):
            self._add(response, single.upload, single.outcome)
            if number % SLICE == 0:
                await asyncio.sleep(0)
        return response

    async def _record_in_turn(self, request: Parts, caller: str, share: "Share") -> pb2.UploadPurchasesResponse:
        async with share.taken(len(request)):
            return await self._record(request, caller)

    async def _record(self, request: Parts, caller: str) -> pb2.UploadPurchasesResponse:
        """Store the sales of one message. One that is refused does not affect its neighbours."""
        opened = []  # all of it before anything is recorded: the gate may refuse any of it
        for first, last in _slices(request.sizes):
            async with self._turn():
                opened.append(_opened(request, first, last))
        under_way = []
        for sales in opened:
            async with self._turn():
                under_way.append(self._take_in_slice(sales, caller))
        await asyncio.gather(*(each.call.answered for each in under_way if each.call))
        response = pb2.UploadPurchasesResponse()
        for sales, each in zip(opened, under_way, strict=True):
            async with self._turn():
                for upload, outcome in zip(sales, each.outcomes(), strict=True):
                    self._add(response, upload, outcome)
        return response

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Time for one slice of a backlog: of all streams, one has it in each pass of the loop. A message takes
        milliseconds to read and to answer, and there may be thousands in hand; who brings one sale must not wait.
        """
        async with self._slicing:
            yield
            await asyncio.sleep(0)

    def _take_in_slice(self, uploads: Sequence[pb2.PurchaseUpload], caller: str) -> "UnderWay":
        try:
            self._recorder.require_room(caller, len(uploads))  # before anything is made of them
        except ServiceError as error:
            return UnderWay(dict.fromkeys(range(len(uploads)), error.with_traceback(None)))
        refused: dict[int, ServiceError] = {}
        sales: dict[int, Sale] = {}
        spans = _spans(uploads)
        for place, upload in enumerate(uploads):
            try:
                sales[place] = self._recorder.ours(messages.parse_sale(upload.create_purchase))
            except ServiceError as error:
                refused[place] = error.with_traceback(None)  # which would keep all that it was made of
                _end(filter(None, [spans.pop(place, None)]), error)
        if not sales:
            return UnderWay(refused)
        taken = {number: spans[place] for number, place in enumerate(sales) if place in spans}
        try:
            call = self._recorder.take_in(list(sales.values()), caller, taken)
        except ServiceError as error:  # none was taken in
            _end(spans.values(), error)
            return UnderWay(refused | dict.fromkeys(sales, error.with_traceback(None)))
        _end_when_answered(call, taken)
        return UnderWay(refused, list(sales), call)

    def _add(self, response: pb2.UploadPurchasesResponse, upload: pb2.PurchaseUpload, outcome: Outcome) -> None:
        result = response.results.add(sequence_number=upload.sequence_number)
        if isinstance(outcome, Recorded):
            result.created.CopyFrom(messages.answer(upload.create_purchase, outcome))
        else:
            refusal = grpc_guard.explain(outcome, "UploadPurchases")
            result.error.CopyFrom(to_status(refusal, self._host.domain))


class Share:
    """What one caller may have in hand; its messages take their part of it in the order in which they come."""

    def __init__(self) -> None:
        self._turn, self._room = asyncio.Lock(), asyncio.Semaphore(SALES_OF_CALLER_MAX)

    @asynccontextmanager
    async def taken(self, sales: int) -> AsyncIterator[None]:
        taken = 0
        try:
            async with self._turn:
                while taken < sales:
                    await self._room.acquire()
                    taken += 1
            yield
        finally:
            for _ in range(taken):
                self._room.release()


class UnderWay(NamedTuple):
    """A slice of a message, by the places of its sales: why some were refused at once, and the call of the others."""

    refused: Mapping[int, ServiceError]
    places: Sequence[int] = ()
    call: Call | None = None

    def outcomes(self) -> list[Outcome]:
        """Of each sale, once the call is answered."""
        outcomes = {**self.refused, **dict(zip(self.places, self.call.outcomes if self.call else (), strict=True))}
        return [outcomes[place] for place in sorted(outcomes)]


def _spans(uploads: Sequence[pb2.PurchaseUpload]) -> dict[int, Span]:
    """Of the sales that are traced, by their place: a stream is nobody's own, so each sale on it brings its own."""
    if traces.tracer is None:
        return {}
    begun = ((place, traces.of_request(METHOD, upload.traceparent)) for place, upload in enumerate(uploads))
    return {place: span for place, span in begun if span}


def _end_when_answered(call: Call, spans: Mapping[int, Span]) -> None:
    def end(answered: "asyncio.Future[None]") -> None:
        for place, span in spans.items():
            _end([span], None if answered.cancelled() else call.outcomes[place])

    if spans:
        call.answered.add_done_callback(end)


def _end(spans: Iterable[Span], outcome: Outcome | None) -> None:
    """None: the caller has left."""
    for span in spans:
        if isinstance(outcome, Exception):
            error = outcome if isinstance(outcome, ServiceError) else Internal("")
            span.answered(error.code.name, error.reason)
        else:
            span.answered("OK" if outcome else "CANCELLED")
        span.end()


def _opened(request: Parts, first: int, last: int) -> Sequence[pb2.PurchaseUpload]:
    if (largest := max(request.sizes[first:last])) > messages.SALE_BYTES_MAX:
        raise MessageTooLarge(
            f"a sale may have at most {messages.SALE_BYTES_MAX:,} bytes; one of these has {largest:,}",
            metadata={"bytes_max": str(messages.SALE_BYTES_MAX), "bytes": str(largest)},
        )
    uploads: Sequence[pb2.PurchaseUpload] = request.open(first, last).uploads
    return uploads


def _slices(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where each begins, and where it is over."""
    first = in_it = 0
    for place, size in enumerate(sizes):
        if place > first and (place - first == SLICE or in_it + size > SLICE_BYTES):
            yield first, place
            first, in_it = place, 0
        in_it += size
    yield first, len(sizes)
