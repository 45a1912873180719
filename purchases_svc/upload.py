"""UploadPurchases: the backlog of a till that was offline, message by message, with a bounded number in flight."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from chassis import grpc_server
from chassis.errors import (
    DeadlineExceeded,
    FieldReason,
    InvalidRequest,
    ServiceError,
    ShuttingDown,
    Violation,
    to_status,
)
from purchases_svc import messages
from purchases_svc.answers import Recorded
from purchases_svc.record import Recorder
from purchases_svc.sale import Sale
from retail.purchases.v1 import purchases_service_pb2 as pb2

UPLOADS_PER_MESSAGE_MAX = 500
# Messages of one stream that are being stored or wait for their answer to be read. While so many are, no more are
# read: the client is slowed down by HTTP/2, and whoever does not read answers holds up nobody else.
MESSAGES_IN_FLIGHT_MAX = 2
IDLE_TIMEOUT_S = 300.0
IN_ONE_GO = 20  # sales, before anybody else has a turn

Answer = asyncio.Task[pb2.UploadPurchasesResponse]


class Uploads:
    """Answers upload streams until the server drains."""

    def __init__(self, recorder: Recorder, host: grpc_server.Server) -> None:
        self._recorder, self._host = recorder, host

    async def answer(
        self, requests: AsyncIterator[pb2.UploadPurchasesRequest], caller: str
    ) -> AsyncGenerator[pb2.UploadPurchasesResponse, None]:
        """One response for each message, in their order, each after its sales are durable.

        When the server drains, what was read is still answered; then the stream ends with SHUTTING_DOWN.
        """
        answers: asyncio.Queue[Answer | None] = asyncio.Queue()
        room = asyncio.Semaphore(MESSAGES_IN_FLIGHT_MAX)
        reader = asyncio.create_task(self._read(requests, caller, answers, room))
        answer: Answer | None = None
        try:
            while (answer := await answers.get()) is not None:
                yield await answer
                room.release()
            await reader  # raises why the reading ended, if not by the client's own will
        finally:
            # What is being stored goes on: only the waiting for it ends.
            for task in (reader, answer, *(answers.get_nowait() for _ in range(answers.qsize()))):
                if task is not None:
                    task.cancel()

    async def _read(
        self,
        requests: AsyncIterator[pb2.UploadPurchasesRequest],
        caller: str,
        answers: "asyncio.Queue[Answer | None]",
        room: asyncio.Semaphore,
    ) -> None:
        iterator = aiter(requests)
        draining: asyncio.Future[Any] = asyncio.ensure_future(self._host.draining.wait())
        message: asyncio.Future[Any] = draining
        try:
            while True:
                await room.acquire()
                message = asyncio.ensure_future(anext(iterator, None))
                await asyncio.wait({message, draining}, timeout=IDLE_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
                if not message.done():
                    if draining.done():
                        raise ShuttingDown("this server is shutting down; send what was not answered to another one")
                    raise DeadlineExceeded(f"no message for {IDLE_TIMEOUT_S:g} s")
                request = message.result()
                if request is None:
                    return  # the client has sent everything
                if not 1 <= len(request.uploads) <= UPLOADS_PER_MESSAGE_MAX:
                    rule = f"must have 1 to {UPLOADS_PER_MESSAGE_MAX} sales"
                    reason = FieldReason.TOO_MANY if request.uploads else FieldReason.REQUIRED
                    raise InvalidRequest([Violation("uploads", rule, reason)])
                answers.put_nowait(asyncio.create_task(self._record(request, caller)))
        finally:
            draining.cancel()
            message.cancel()
            answers.put_nowait(None)

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
            result = response.results.add(sequence_number=upload.sequence_number)
            outcome = refused.get(place) or recorded[place]
            if isinstance(outcome, Recorded):
                result.created.CopyFrom(messages.answer(upload.create_purchase, outcome))
            else:
                refusal = grpc_server.explain(outcome, "UploadPurchases")
                result.error.CopyFrom(to_status(refusal, self._host.domain))
        return response

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
