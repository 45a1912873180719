"""UploadPurchases: the backlog of a till that was offline, message by message, and sales as they happen, one by one."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from chassis import grpc_server
from chassis.errors import (
    FieldReason,
    InvalidRequest,
    ServiceError,
    ShuttingDown,
    Violation,
    to_status,
)
from purchases_svc import messages
from purchases_svc.answers import Outcome, Recorded
from purchases_svc.in_hand import InHand, Single
from purchases_svc.record import Recorder
from purchases_svc.sale import Sale
from retail.purchases.v1 import purchases_service_pb2 as pb2

UPLOADS_PER_MESSAGE_MAX = 500
# Of so few sales in a message, each is answered by itself: they come from tills that sell right now, perhaps from
# several on one stream, and who has to wait for something holds up nobody else. More are a backlog.
SINGLES_PER_MESSAGE_MAX = 20
IN_ONE_GO = 20  # sales, before anybody else has a turn


class Uploads:
    """Answers upload streams until the server drains."""

    def __init__(self, recorder: Recorder, host: grpc_server.Server) -> None:
        self._recorder, self._host = recorder, host

    async def answer(
        self, requests: AsyncIterator[pb2.UploadPurchasesRequest], caller: str
    ) -> AsyncGenerator[pb2.UploadPurchasesResponse, None]:
        """Each sale is answered once, after it is durable, in whatever order that comes.

        When the server drains, what was read is still answered; then the stream ends with SHUTTING_DOWN.
        """
        hand = InHand(self._host.in_flight, caller)
        reader = asyncio.create_task(self._read(requests, caller, hand))
        draining = asyncio.create_task(self._host.draining.wait())
        draining.add_done_callback(lambda _: reader.cancel())
        try:
            async with aclosing(hand.answerable()) as answerable:
                async for part in answerable:
                    yield await part if isinstance(part, asyncio.Task) else await self._answer(part)
            await reader  # raises why the reading ended, if not by the client's own will
        finally:
            draining.cancel()  # and the reader with it
            hand.close()

    async def _read(self, requests: AsyncIterator[pb2.UploadPurchasesRequest], caller: str, hand: InHand) -> None:
        iterator = aiter(requests)
        try:
            while True:
                await hand.room()
                request = await anext(iterator, None)  # chassis ends a stream that is idle for long
                if request is None:
                    return  # the client has sent everything
                if not 1 <= len(request.uploads) <= UPLOADS_PER_MESSAGE_MAX:
                    rule = f"must have 1 to {UPLOADS_PER_MESSAGE_MAX} sales"
                    reason = FieldReason.TOO_MANY if request.uploads else FieldReason.REQUIRED
                    raise InvalidRequest([Violation("uploads", rule, reason)])
                if len(request.uploads) > SINGLES_PER_MESSAGE_MAX:
                    hand.take_batch(asyncio.create_task(self._record(request, caller)))
                    continue
                for upload in request.uploads:
                    self._take_in(upload, caller, hand)
        except asyncio.CancelledError:
            if self._host.draining.is_set():
                raise ShuttingDown("this server is shutting down; send what was not answered to another one") from None
            raise
        finally:
            hand.all_read()

    def _take_in(self, upload: pb2.PurchaseUpload, caller: str, hand: InHand) -> None:
        single = hand.take_single(upload, upload.ByteSize())
        try:
            self._recorder.require_room(caller, 1)  # before anything is made of it
            single.call = self._recorder.take_in([messages.parse_sale(upload.create_purchase)], caller)
        except ServiceError as error:
            single.refusal = error
            hand.settled(single)
        else:
            single.call.answered.add_done_callback(lambda _: hand.settled(single))

    async def _answer(self, singles: Sequence[Single]) -> pb2.UploadPurchasesResponse:
        response = pb2.UploadPurchasesResponse()
        for place, single in enumerate(singles):
            await _let_others(place)
            self._add(response, single.upload, single.outcome)
        return response

    async def _record(self, request: pb2.UploadPurchasesRequest, caller: str) -> pb2.UploadPurchasesResponse:
        """Store the sales of one message. One that is refused does not affect its neighbours."""
        try:
            self._recorder.require_room(caller, len(request.uploads))
        except ServiceError as error:
            return self._all_refused(request, error)
        refused: dict[int, ServiceError] = {}
        sales: dict[int, Sale] = {}
        for place, upload in enumerate(request.uploads):
            await _let_others(place)
            try:
                sales[place] = messages.parse_sale(upload.create_purchase)
            except ServiceError as error:
                refused[place] = error
        try:
            outcomes = await self._recorder.record_all(list(sales.values()), caller) if sales else []
        except ServiceError as error:  # none was taken in
            return self._all_refused(request, error)
        recorded = dict(zip(sales, outcomes, strict=True))
        response = pb2.UploadPurchasesResponse()
        for place, upload in enumerate(request.uploads):
            await _let_others(place)
            self._add(response, upload, refused.get(place) or recorded[place])
        return response

    def _add(self, response: pb2.UploadPurchasesResponse, upload: pb2.PurchaseUpload, outcome: Outcome) -> None:
        result = response.results.add(sequence_number=upload.sequence_number)
        if isinstance(outcome, Recorded):
            result.created.CopyFrom(messages.answer(upload.create_purchase, outcome))
        else:
            refusal = grpc_server.explain(outcome, "UploadPurchases")
            result.error.CopyFrom(to_status(refusal, self._host.domain))

    def _all_refused(self, request: pb2.UploadPurchasesRequest, error: ServiceError) -> pb2.UploadPurchasesResponse:
        status = to_status(error, self._host.domain)
        response = pb2.UploadPurchasesResponse()
        for upload in request.uploads:
            response.results.add(sequence_number=upload.sequence_number, error=status)
        return response


async def _let_others(place: int) -> None:
    """A message may take tens of milliseconds to read and to answer: others have their turn in between."""
    if place % IN_ONE_GO == IN_ONE_GO - 1:
        await asyncio.sleep(0)
