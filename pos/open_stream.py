"""An open stream for sales as they happen: each costs the service a fraction of what a call of its own would.

Whatever a sale meets, it meets as in a call: an attempt on the stream is an attempt like any other, with the same
patience around it, the same errors, the same key. While there is no stream to be had, attempts are calls.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import count
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

import grpc

from chassis.traces import TRACEPARENT
from pos import errors
from pos.calls import Calls, pause_before_retry
from pos.cells import Cells
from pos.errors import OutcomeUnknown, PosError, Status
from pos.sale import Sale, create_request
from pos.service_config import BACKOFF_FACTOR, FIRST_BACKOFF_S, MOST_BACKOFF_S
from pos.upload import MESSAGE_BYTES
from retail.purchases.v1 import purchases_service_pb2 as pb2

IN_FLIGHT_MAX = 500  # half of what the service lets one connection have on its way; more wait for room
SALES_PER_MESSAGE = 20  # of so many at most, the service answers each by itself
# How long a stream takes sales; the next one may go to a server that has joined or come back since. Not the same for
# all, lest branches that were cut off together come back together once a minute for ever.
STREAM_S = (30.0, 60.0)
REFUSED_S = 60.0  # how long to make do with calls when a stream was refused for good, as by a service that has none

A = TypeVar("A")  # the answer to a sale

Answer = Future[pb2.CreatePurchaseResponse]


class OpenStream(Generic[A]):
    """Records sales of any number of threads over one stream; see `PosClient.open_stream`."""

    def __init__(
        self,
        upload: Any,
        cells: Cells,
        call: Calls,
        decode: Callable[[pb2.CreatePurchaseResponse], A],
        *,
        answer_timeout_s: float,
    ) -> None:
        """`upload` is the method of the service at which the client begins; `call` is patient with each sale."""
        self._upload, self._cells, self._call, self._decode = upload, cells, call, decode
        self._answer_timeout_s = answer_timeout_s
        self._lock = threading.Lock()
        self._all_answered = threading.Condition(self._lock)
        self._in_hand = 0  # sales that somebody waits for
        self._open = True  # takes sales
        self._ended = False  # makes no attempts any more
        self._stream: _Stream | None = None  # that takes sales
        self._streams: set[_Stream] = set()  # those that do not any more, but have answers to come, among them
        self._backoff_s = FIRST_BACKOFF_S
        self._not_before = 0.0  # when to try a stream again

    def record(self, sale: Sale, *, register_customer: bool = False) -> A:
        """Send a sale; when this returns, it is stored for good. Sending it again, in whatever way, changes nothing.

        `register_customer` registers the sale's customer with it, if it is a new one.

        Raises:
            SaleRefused, OutcomeUnknown, CallFailed: as `PosClient.create_purchase`. OutcomeUnknown also when this is
                closed, or was before the answer came.
        """
        request = create_request(sale, register_customer)
        with self._waited_for():
            reply = self._call(self._attempt, request, errors.of_sale)
        with errors.reading(OutcomeUnknown):
            return self._decode(reply)

    def close(self, drain_s: float | None = None) -> None:
        """Take no more sales, wait until all have their answers, and end the stream.

        Whoever has none after `drain_s` seconds (as long as one attempt may take, unless told) gets OutcomeUnknown.
        """
        until = time.monotonic() + (self._answer_timeout_s if drain_s is None else drain_s)
        with self._lock:
            self._open = False
            self._all_answered.wait_for(lambda: not self._in_hand, until - time.monotonic())
            self._ended = True
            streams = list(self._streams)
        for stream in streams:
            stream.finish()
        for stream in streams:
            stream.end(until)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _waited_for(self) -> Iterator[None]:
        with self._lock:
            if not self._open:
                raise OutcomeUnknown(Status(grpc.StatusCode.CANCELLED, "the stream is closed"))
            self._in_hand += 1
        try:
            yield
        finally:
            with self._lock:
                self._in_hand -= 1
                if not self._in_hand:
                    self._all_answered.notify_all()

    def _attempt(
        self, request: pb2.CreatePurchaseRequest, timeout: float, metadata: Sequence[tuple[str, str]] = ()
    ) -> pb2.CreatePurchaseResponse:
        """What left the stream without an answer, by no fault of its own, goes on as a call, in the same attempt.

        Raises:
            PosError, grpc.RpcError: what came instead of an answer.
            ValueError: the channel is closed, or this is.
        """
        deadline = time.monotonic() + timeout
        with suppress(_Unanswered):
            if not self._cells.is_elsewhere(request.purchase.branch_id) and (stream := self._current()):
                try:
                    return stream.send(request, timeout, dict(metadata).get(TRACEPARENT, ""))
                except PosError as error:
                    if error.status.reason != errors.WRONG_CELL:
                        raise  # otherwise a call finds out where it belongs
        if self._ended:
            raise ValueError("the stream is closed")
        return self._cells.create(request, timeout=max(deadline - time.monotonic(), 0.0), metadata=metadata)

    def _current(self) -> "_Stream | None":
        with self._lock:
            now = time.monotonic()
            if self._stream and self._stream.takes_until > now:
                return self._stream
            if self._ended or now < self._not_before:
                return None
            self._stream = _Stream(self._upload, random.uniform(*STREAM_S), self._answer_timeout_s, self._has_ended)
            self._streams.add(self._stream)
            return self._stream

    def _has_ended(self, stream: "_Stream", trouble: Status | None) -> None:
        with self._lock:
            self._streams.discard(stream)
            if stream is not self._stream:
                return
            self._stream = None
            if trouble is None:
                return
            if stream.has_answered:
                self._backoff_s = FIRST_BACKOFF_S
            pause_s = pause_before_retry(trouble, self._backoff_s, REFUSED_S)
            if pause_s is None:  # refused for good; or just one of its sales was, and it ended by that
                least_s, most_s = (0, FIRST_BACKOFF_S) if stream.has_answered else (REFUSED_S / 2, REFUSED_S)
                pause_s = random.uniform(least_s, most_s)
            self._not_before = time.monotonic() + pause_s
            self._backoff_s = min(BACKOFF_FACTOR * self._backoff_s, MOST_BACKOFF_S)


class _Unanswered(Exception):
    """The stream has ended, or does not take the sale: nobody has said anything about it."""


class _Waiting(NamedTuple):
    number: int
    request: pb2.CreatePurchaseRequest
    traceparent: str


class _Stream:
    """One stream. Sales that wait while a message is on its way out leave together in the next one."""

    def __init__(
        self,
        upload: Any,
        lasts_s: float,
        answer_timeout_s: float,
        has_ended: Callable[["_Stream", Status | None], None],
    ) -> None:
        """Raises ValueError: the channel is closed."""
        self.takes_until = time.monotonic() + lasts_s
        self._has_ended = has_ended
        self._lock = threading.Lock()
        self._something_to_send, self._room = threading.Condition(self._lock), threading.Condition(self._lock)
        self._takes = True
        self._numbers = count(1)
        self._waiting = deque[_Waiting]()  # to be sent
        self._unanswered: dict[int, Answer] = {}  # by sequence number
        self._last_answer = 0.0
        self._call = upload(iter(self._next_message, None), timeout=lasts_s + answer_timeout_s)
        self._reader = threading.Thread(target=self._read, name="answers of an open stream", daemon=True)
        self._reader.start()

    @property
    def has_answered(self) -> bool:
        return self._last_answer > 0

    def send(
        self, request: pb2.CreatePurchaseRequest, timeout_s: float, traceparent: str = ""
    ) -> pb2.CreatePurchaseResponse:
        """Send a sale and wait for its answer; `traceparent` is of its trace, if it has one.

        Raises:
            PosError: it was refused, or there was no answer in time.
            _Unanswered
        """
        began = time.monotonic()
        answer = Answer()
        with self._lock:
            self._room.wait_for(lambda: not self._takes or len(self._unanswered) < IN_FLIGHT_MAX, timeout_s)
            if not self._takes or len(self._unanswered) >= IN_FLIGHT_MAX:
                raise _Unanswered
            number = next(self._numbers)
            self._unanswered[number] = answer
            self._waiting.append(_Waiting(number, request, traceparent))
            self._something_to_send.notify()
        try:
            return answer.result(began + timeout_s - time.monotonic())
        except TimeoutError:
            self._cut_if_silent(since=began)
            status = Status(grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer on the stream for {timeout_s:g} s")
            raise PosError(status) from None
        finally:
            self._forget(number)

    def finish(self) -> None:
        """Take no more sales; the stream ends when those that it has are answered."""
        with self._lock:
            self._take_no_more()

    def end(self, until: float) -> None:
        """Wait until the stream has ended, and cut it off if it has not by then."""
        self._reader.join(max(until - time.monotonic(), 0))
        self._call.cancel()

    def _take_no_more(self) -> None:
        self._takes = False
        self._something_to_send.notify_all()
        self._room.notify_all()

    def _forget(self, number: int) -> None:
        """Nobody waits for that answer any more."""
        with self._lock:
            if self._unanswered.pop(number, None):
                self._room.notify()

    def _cut_if_silent(self, *, since: float) -> None:
        """A stream that has said nothing at all for as long as an answer may take is dead."""
        if self._last_answer < since:
            self._call.cancel()

    # In gRPC's thread for the requests.

    def _next_message(self) -> pb2.UploadPurchasesRequest | None:
        """Called when the one before is out; None: there will be no more."""
        message = pb2.UploadPurchasesRequest()
        while not message.uploads:
            sales = self._gathered()
            if not sales:
                return None
            for number, request, trace in sales:
                if number in self._unanswered:  # whoever gave up before it was sent sends it in another way
                    message.uploads.add(sequence_number=number, create_purchase=request, traceparent=trace)
        return message

    def _gathered(self) -> list[_Waiting]:
        with self._lock:
            while not self._waiting:
                left_s = self.takes_until - time.monotonic()
                if left_s <= 0:
                    self._take_no_more()
                if not self._takes:
                    return []
                self._something_to_send.wait(left_s)
            sales: list[_Waiting] = []
            size = 0
            while self._waiting and len(sales) < SALES_PER_MESSAGE and size < MESSAGE_BYTES:
                sales.append(self._waiting.popleft())
                size += sales[-1].request.ByteSize()
            return sales

    # In a thread for the answers.

    def _read(self) -> None:
        trouble = None
        try:
            for response in self._call:
                self._settle(response)
        except grpc.RpcError as error:
            trouble = errors.read_status(error)
        finally:
            self._end(trouble)

    def _end(self, trouble: Status | None) -> None:
        with self._lock:
            if self._unanswered and trouble is None:
                trouble = Status(grpc.StatusCode.UNAVAILABLE, "the stream ended before everything was answered")
        self._has_ended(self, trouble)  # first, so that nobody comes back too soon
        with self._lock:
            unanswered, self._unanswered = self._unanswered, {}
            self._waiting.clear()
            self._take_no_more()
        for answer in unanswered.values():
            answer.set_exception(_Unanswered())

    def _settle(self, response: pb2.UploadPurchasesResponse) -> None:
        with self._lock:
            self._last_answer = time.monotonic()
            answers = [self._unanswered.pop(result.sequence_number, None) for result in response.results]
            self._room.notify(len(answers))
        for answer, result in zip(answers, response.results, strict=True):
            if answer is None:
                continue  # nobody waits for it
            if result.WhichOneof("outcome") == "created":
                answer.set_result(result.created)
            else:
                answer.set_exception(PosError(errors.parse_status(result.error)))
