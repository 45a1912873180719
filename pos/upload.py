"""Sending a backlog: hundreds of sales a message, a few messages on their way, and after any break on with the rest."""

import math
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Any, Generic, TypeAlias, TypeVar

import grpc

from pos import errors
from pos.calls import Pause, pause_before_retry
from pos.errors import ClockAhead, OutcomeUnknown, PosError, Status
from pos.service_config import BACKOFF_FACTOR, FIRST_BACKOFF_S, MOST_BACKOFF_S
from retail.purchases.v1 import purchases_service_pb2 as pb2

SALES_PER_MESSAGE = 500  # the most that the service takes
MESSAGE_BYTES = 900_000  # the last sale may exceed it: the biggest has 100,000, and the service takes 1 MiB
# The service reads two messages of a stream ahead of its answers; the next is on its way to it meanwhile.
IN_FLIGHT = 2 * SALES_PER_MESSAGE + 1
# A stream takes messages for so long; the next one may go to a server that has joined or come back since.
STREAM_S = 20.0

S = TypeVar("S")  # a sale, whatever the caller calls one
A = TypeVar("A")  # the answer to it

Requests: TypeAlias = "queue.SimpleQueue[pb2.UploadPurchasesRequest | None]"


class Uploader(Generic[S, A]):
    """Sends sales over streams, one stream after the other, until each sale has its answer.

    A stream that breaks, or a sale that is told to come again, costs a pause and a new stream. What was sent and not
    answered is sent again, which the sales' keys make safe.
    """

    def __init__(
        self,
        method: Any,
        encode: Callable[[S], pb2.CreatePurchaseRequest],
        decode: Callable[[pb2.CreatePurchaseResponse], A],
        *,
        answer_timeout_s: float,
        total_timeout_s: float,
        pause: Pause,
    ) -> None:
        """`encode` may raise a PosError, which is the sale's outcome then; `pause` is as in `pos.calls`.

        `total_timeout_s` is how long to go on without any answer.
        """
        self._method, self._encode, self._decode, self._pause = method, encode, decode, pause
        self._answer_timeout_s, self._total_timeout_s = answer_timeout_s, total_timeout_s
        self._until = math.inf

    def send(self, sales: Iterable[S], within_s: float = math.inf) -> Iterator[tuple[S, A | PosError]]:
        """Each sale with its answer, or with why it was refused, in any order. Sales are taken as they are needed.

        A sale whose time is a little ahead of the service's clock is sent again when that time has come, at the end.

        Raises:
            PosError: no answer for too long, or not all of them `within_s`, or the service does not let this client
                send sales. All sales that were not yielded are to be sent again.
        """
        self._until = time.monotonic() + within_s
        with errors.sending():
            source = iter(sales)
        early: list[tuple[S, ClockAhead]] = []
        for sale, outcome in self._send(source):
            if isinstance(outcome, ClockAhead) and time.monotonic() + _time_left_s(outcome) < self._give_up_at():
                early.append((sale, outcome))
            else:
                yield sale, outcome
        if early:
            latest = max((outcome for _, outcome in early), key=_time_left_s)
            self._pause(_time_left_s(latest), latest)
            yield from self._send(sale for sale, _ in early)

    def _send(self, source: Iterator[S]) -> Iterator[tuple[S, A | PosError]]:
        again = deque[S]()

        def take() -> S | _End:
            return again.popleft() if again else next(source, _End.END)

        backoff_s = FIRST_BACKOFF_S
        give_up_at = self._give_up_at()
        while True:
            stream = _Stream(self._encode, take)
            for sale, result in stream.run(self._method, self._answer_timeout_s, self._until):
                backoff_s = FIRST_BACKOFF_S
                give_up_at = self._give_up_at()
                yield sale, self._outcome(result)
            if stream.finished:
                return
            again.extendleft(reversed(stream.open.values()))
            if stream.trouble is None:
                continue  # its time was up
            failure = errors.of_sale(stream.trouble)
            pause_s = pause_before_retry(stream.trouble, backoff_s, give_up_at - time.monotonic())
            if pause_s is None:
                raise failure
            self._pause(pause_s, failure)
            backoff_s = min(BACKOFF_FACTOR * backoff_s, MOST_BACKOFF_S)

    def _give_up_at(self) -> float:
        """If no answer comes from now on."""
        return min(time.monotonic() + self._total_timeout_s, self._until)

    def _outcome(self, result: pb2.PurchaseUploadResult | PosError) -> A | PosError:
        if isinstance(result, PosError):
            return result
        if result.WhichOneof("outcome") != "created":
            return errors.of_sale(errors.parse_status(result.error))
        try:
            with errors.reading(OutcomeUnknown):
                return self._decode(result.created)
        except OutcomeUnknown as unreadable:
            return unreadable


def _time_left_s(outcome: ClockAhead) -> float:
    """Until the service takes the sale."""
    return outcome.status.retry_delay_s or 0.0


class _End(Enum):
    """What is taken when there is nothing left; a caller's sales may be anything, None among them."""

    END = "no more sales"


class _Stream(Generic[S]):
    """One stream over a backlog. When it has run, it tells what it took and left open, and why."""

    def __init__(self, encode: Callable[[S], pb2.CreatePurchaseRequest], take: Callable[[], S | _End]) -> None:
        self._encode, self._take = encode, take
        self._exhausted = False
        self._numbers = 0
        self._again = 0  # sales that are told to come again
        self._unfit: list[tuple[S, PosError]] = []  # sales that cannot be sent, and why
        self.open: dict[int, S] = {}  # taken from the backlog and not answered for good, by sequence number
        self.trouble: Status | None = None  # of the stream, or of a sale that is to come again

    @property
    def finished(self) -> bool:
        return self._exhausted and not self.open

    def run(
        self, method: Any, answer_timeout_s: float, until: float
    ) -> Iterator[tuple[S, pb2.PurchaseUploadResult | PosError]]:
        """The results, but for sales that are told to come again."""
        requests: Requests = queue.SimpleQueue()
        timeout_s = min(STREAM_S + answer_timeout_s, max(until - time.monotonic(), 0.0))
        try:
            call = method(iter(requests.get, None), timeout=timeout_s)
        except ValueError as error:  # how gRPC says that the channel is closed, as by another thread
            raise errors.of_sale(Status(grpc.StatusCode.CANCELLED, str(error))) from None
        ends = time.monotonic() + STREAM_S
        try:
            while True:
                while self._in_flight < IN_FLIGHT and not self.trouble and time.monotonic() < ends:
                    request = self._next_message()
                    if not request.uploads:
                        break
                    requests.put(request)
                while self._unfit:
                    yield self._unfit.pop()
                if not self._in_flight:
                    requests.put(None)
                response = next(call, None)
                if response is None:
                    break
                for result in response.results:
                    if result.sequence_number not in self.open:
                        continue  # answered already
                    refusal = errors.parse_status(result.error) if result.HasField("error") else None
                    if refusal and refusal.code in errors.RETRYABLE and refusal.reason != errors.TIME_AHEAD:
                        self._again += 1
                        self.trouble = refusal
                    else:
                        yield self.open.pop(result.sequence_number), result
        except grpc.RpcError as error:
            self.trouble = errors.read_status(error)
        else:
            if self._in_flight:
                self.trouble = Status(grpc.StatusCode.UNAVAILABLE, "the stream ended before everything was answered")
        finally:
            requests.put(None)  # ends the thread of gRPC that waits for more
            call.cancel()

    @property
    def _in_flight(self) -> int:
        return len(self.open) - self._again

    def _next_message(self) -> pb2.UploadPurchasesRequest:
        message, size = pb2.UploadPurchasesRequest(), 0
        while len(message.uploads) < SALES_PER_MESSAGE and size < MESSAGE_BYTES:
            sale = self._take()
            if sale is _End.END:
                self._exhausted = True
                break
            try:
                request = self._encode(sale)
            except PosError as error:
                self._unfit.append((sale, error))
                continue
            message.uploads.add(sequence_number=self._numbers, create_purchase=request)
            self.open[self._numbers] = sale
            self._numbers += 1
            size += request.ByteSize()
        return message
