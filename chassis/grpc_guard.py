"""What is around each handler: raw bytes become requests, callers and sizes are checked, and errors become statuses.

Each handler is wrapped once, when its service is added, rather than by an interceptor on each call: the wrapper
then also sees bytes that are no message (gRPC deserializes before interceptors' handlers run), and costs less.
"""

import asyncio
import inspect
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import grpc
import structlog
from google.protobuf import message
from prometheus_client import Counter, Histogram

from chassis import errors, postgres, traces
from chassis.access import Gate
from chassis.errors import AccessRefused, ServiceError
from chassis.identity import Caller
from chassis.in_flight import InFlight, Stream
from chassis.logs import Sampled
from chassis.parts import Parts
from chassis.rules import Rule

SLOW_CALL_S = 1.0
LATE_S = 0.1  # before a caller's deadline: its own clock may end the call first
IDLE_TIMEOUT_S = 300.0  # of a stream that its caller neither feeds nor ends
METHOD_LENGTH_MAX = 200  # of a method that is not there, as it is repeated to the caller
# A stream whose reader takes nothing for so long is cut. Shorter than PostgreSQL's patience with an idle transaction.
READER_TIMEOUT_S = 20.0

STARTED = Counter("grpc_server_started_total", "Calls that came.", ["grpc_type", "grpc_service", "grpc_method"])
HANDLED = Counter(
    "grpc_server_handled_total", "Calls answered.", ["grpc_type", "grpc_service", "grpc_method", "grpc_code"]
)
SECONDS = Histogram(
    "grpc_server_handling_seconds",
    "Time to answer a call.",
    ["grpc_type", "grpc_service", "grpc_method"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
REFUSED = Counter("grpc_server_refused_total", "Refusals.", ["grpc_service", "grpc_method", "reason"])

UNKNOWN = "/unknown/unknown"  # callers must not make up values of a metric's label
_KINDS = {  # by whether requests, and whether answers, are streams
    (False, False): "unary",
    (True, False): "client_stream",
    (False, True): "server_stream",
    (True, True): "bidi_stream",
}

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

log = structlog.get_logger()
_refusals = Sampled("info", "call refused")
_slow = Sampled("warning", "slow call")
_trouble = Sampled("warning", "database trouble")
_bugs = Sampled("error", "bug")


class Door(NamedTuple):
    """What the methods of a service have in common: who may come in, and how much of it."""

    domain: str  # of errors
    gate: Gate
    rules: Mapping[str, Rule]  # by method
    in_flight: InFlight
    timeout_s: float  # of a call with one answer, and for the request of others
    stream_timeout_s: float
    message_bytes_max: int
    streamed_bytes_max: int  # of each message, where requests are a stream


class WrappingServer:
    """What generated `add_…_to_server` functions see as the server: it wraps each handler on its way."""

    def __init__(self, server: grpc.aio.Server, door: Door) -> None:
        self._server, self._door = server, door

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Handler]) -> None:
        wrapped = {name: self._wrap(f"/{service}/{name}", handler) for name, handler in handlers.items()}
        self._server.add_registered_method_handlers(service, wrapped)

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Generated code registers everything twice. Registered by method, calls are cheaper."""

    def _wrap(self, method: str, handler: Any) -> Handler:
        guard = _Guard(method, handler, self._door)
        # Registered as if every method took a stream, of which we read the one message: gRPC itself leaves a call that
        # ends without a message unanswered for ever. And without a deserializer, to parse where a failure can be
        # answered.
        serializer = handler.response_serializer
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(guard.stream, response_serializer=serializer)
        return grpc.stream_unary_rpc_method_handler(guard.unary, response_serializer=serializer)


class UnknownMethods(grpc.GenericRpcHandler):
    """Asked last: answers calls of methods that no service has."""

    def __init__(self, domain: str) -> None:
        self._domain = domain

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler:
        method = handler_call_details.method[:METHOD_LENGTH_MAX]

        async def refuse(_: object, context: Any) -> None:
            error = errors.UnknownMethod(f"this server has no method {method}", metadata={"method": method})
            await _abort(context, UNKNOWN, "bidi_stream", error, self._domain)

        return grpc.stream_stream_rpc_method_handler(refuse)


class _Guard:
    """One method's handler, with everything around it that all methods share."""

    def __init__(self, method: str, handler: Any, door: Door) -> None:
        self._method, self._domain, self._in_flight = method, door.domain, door.in_flight
        self._gate, self._rule = door.gate, door.rules[method]
        self._timeout_s, self._stream_timeout_s = door.timeout_s, door.stream_timeout_s
        self._behavior = (  # exactly one is set
            handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        )
        self._takes_stream = handler.request_streaming
        self._message_bytes_max = door.streamed_bytes_max if self._takes_stream else door.message_bytes_max
        self._deserialize = handler.request_deserializer
        self._unopened: type[message.Message] | None = getattr(self._behavior, "unopened", None)  # see `parts.py`
        self._kind = _KINDS[handler.request_streaming, handler.response_streaming]
        _, service, name = method.split("/")
        # What takes a stream makes a span for each thing that comes on it; health and reflection are of no interest.
        self._traced = "" if self._takes_stream or service.startswith("grpc.") else f"{service}/{name}"
        self._started = STARTED.labels(self._kind, service, name)
        self._seconds = SECONDS.labels(self._kind, service, name)
        self._succeeded = HANDLED.labels(self._kind, service, name, "OK")
        HANDLED.labels(self._kind, service, name, "INTERNAL")  # before the first one, which alarms would not notice

    async def unary(self, requests: AsyncIterator[bytes], context: Any) -> Any:
        started = time.perf_counter()
        self._started.inc()
        span = self._span(context) if traces.tracer else None
        try:
            remaining = context.time_remaining()
            cap = self._timeout_s
            if remaining is not None and remaining <= cap:  # nearly always; gRPC ends it in time
                reply = await self._reply(requests, context)
            else:
                async with asyncio.timeout(cap):
                    reply = await self._reply(requests, context)
        except BaseException as error:
            failure = self._explain(error, span, context)
        else:
            self._succeeded.inc()
            if span:
                span.answered("OK")
            return reply
        finally:
            elapsed = time.perf_counter() - started
            self._seconds.observe(elapsed, span.ids if span else None)
            if span:
                span.end()
            if elapsed > SLOW_CALL_S:
                _slow(self._method, method=self._method, seconds=round(elapsed, 3))
        await _abort(context, self._method, self._kind, failure, self._domain)

    def _span(self, context: Any) -> traces.Span | None:
        span = traces.of_call(self._traced, context) if self._traced else None
        if span:
            traces.set_current(span)
        return span

    async def _reply(self, requests: AsyncIterator[bytes], context: Any) -> Any:
        caller = self._gate.admit(self._rule, context)
        raw = await self._read(context)
        size = len(raw)
        self._in_flight.enter(caller.name, size)
        try:
            request = self._permitted(caller, raw)
            del raw
            return await self._behavior(request, context)
        finally:
            self._in_flight.leave(caller.name, size)

    async def stream(self, requests: AsyncIterator[bytes], context: Any) -> None:
        self._started.inc()
        span = self._span(context) if traces.tracer else None
        try:
            caller = self._gate.admit(self._rule, context)
            async with self._gate.while_accepted(self._rule, caller), self._in_time():
                await self._stream(caller, requests, context)
        except BaseException as error:
            failure = self._explain(error, span, context)
        else:
            self._succeeded.inc()
            if span:
                span.answered("OK")
            return
        finally:
            if span:
                span.end()
        await _abort(context, self._method, self._kind, failure, self._domain)

    async def _stream(self, caller: Caller, requests: AsyncIterator[bytes], context: Any) -> None:
        raw = b""
        if not self._takes_stream:
            async with asyncio.timeout(self._timeout_s):
                raw = await self._read(context)
        self._in_flight.enter(caller.name, size := len(raw))
        stream = Stream(self._in_flight, caller.name)
        try:
            request = self._parsed(caller, stream, requests) if self._takes_stream else self._permitted(caller, raw)
            await self._answer(self._behavior(request, context), context)
        finally:
            stream.close()
            self._in_flight.leave(caller.name, size)

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._stream_timeout_s) as limit:
                yield
        except TimeoutError:
            if limit.expired():
                text = f"a stream lasts {self._stream_timeout_s:,g} s at most; call again for what comes after that"
                raise errors.ShuttingDown(text) from None
            raise

    async def _answer(self, replies: Any, context: Any) -> None:
        if inspect.isawaitable(replies):  # the health service writes to the context itself
            await replies
            return
        begun = False
        async with aclosing(replies):  # what the handler holds is freed now, not at some collection
            async for reply in replies:
                if not begun:  # apart: with a first message that nobody reads, gRPC could not end the call any more
                    await context.send_initial_metadata(())
                    begun = True
                await _write(context, reply)

    async def _read(self, context: Any) -> bytes:
        raw = await context.read()
        if raw is grpc.aio.EOF:
            raise errors.MalformedMessage("the call ended without a message")
        received: bytes = raw
        return received

    async def _parsed(self, caller: Caller, stream: Stream, requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        iterator = aiter(requests)
        while True:
            await self._gate.in_turn(caller)
            try:
                async with asyncio.timeout(IDLE_TIMEOUT_S):
                    raw = await anext(iterator)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise errors.DeadlineExceeded(f"no message for {IDLE_TIMEOUT_S:g} s") from None
            stream.take(len(raw))
            yield self._permitted(caller, raw)

    def _permitted(self, caller: Caller, raw: bytes) -> Any:
        if len(raw) > self._message_bytes_max:
            raise errors.MessageTooLarge(
                f"a message may have at most {self._message_bytes_max:,} bytes; this one has {len(raw):,}",
                metadata={"bytes_max": str(self._message_bytes_max), "bytes": str(len(raw))},
            )
        if self._unopened is None:
            return self._opened(caller, raw)
        return Parts(_parsed(self._unopened.FromString, raw), partial(self._opened, caller))

    def _opened(self, caller: Caller, raw: bytes) -> Any:
        """What the handler gets is what the gate has looked at."""
        request = _parsed(self._deserialize, raw)
        self._gate.check(self._rule, caller, request)
        return request

    def _explain(self, error: BaseException, span: traces.Span | None, context: Any) -> ServiceError:
        try:
            failure = self._meaning(error)
        except asyncio.CancelledError:
            self._count_unanswered(context)
            raise
        if span:
            span.answered(failure.code.name, failure.reason)
        return failure

    def _count_unanswered(self, context: Any) -> None:
        """Its caller is told nothing any more. That its deadline has passed says more of us than of the caller."""
        remaining = context.time_remaining()
        late = remaining is not None and remaining < LATE_S
        _, service, name = self._method.split("/")
        HANDLED.labels(self._kind, service, name, "DEADLINE_EXCEEDED" if late else "CANCELLED").inc()

    def _meaning(self, error: BaseException) -> ServiceError:
        if isinstance(error, grpc.aio.AbortError):
            raise error  # gRPC's own services answer for themselves
        if isinstance(error, Exception):
            return explain(error, self._method)
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and not (task and task.cancelling()):
            # Not the caller gave up, but something inside was cancelled. Without a status, it would wait for nothing.
            return errors.ShuttingDown("the call was interrupted; try again")
        raise error


def _parsed(deserialize: Callable[[bytes], Any], raw: bytes) -> Any:
    try:
        return deserialize(raw)
    except message.DecodeError:
        raise errors.MalformedMessage("the bytes are not a message of the expected type") from None


async def _abort(context: Any, method: str, kind: str, error: ServiceError, domain: str) -> None:
    """End the call; the handler has to return then."""
    _, service, name = method.split("/")
    HANDLED.labels(kind, service, name, error.code.name).inc()
    REFUSED.labels(service, name, error.reason).inc()
    if not isinstance(error, AccessRefused):  # that is on record already
        _refusals((method, error.reason), method=method, code=error.code.name, reason=error.reason)
    log.debug("refusal in full", method=method, error=error.message)  # which may name a customer
    trailers = [("grpc-status-details-bin", errors.to_status(error, domain).SerializeToString())]
    if error.retry_after_s is not None:  # what the retries built into gRPC's clients read instead of RetryInfo
        trailers.append(("grpc-retry-pushback-ms", str(round(error.retry_after_s * 1_000))))
    try:
        await context.abort(error.code, error.message, trailing_metadata=tuple(trailers))
    except grpc.aio.AbortError as raised:
        # gRPC keeps it with the call, and raises it again by itself. The frames that these errors came through hold
        # them and the call, and are held by them: rings that only collections take apart, while everybody waits.
        error.__traceback__ = error.__context__ = error.__cause__ = raised.__traceback__ = None


async def _write(context: Any, reply: Any) -> None:
    try:
        async with asyncio.timeout(READER_TIMEOUT_S):
            await context.write(reply)  # returns when HTTP/2's window lets the message out
    except TimeoutError:
        raise errors.DeadlineExceeded(f"nothing of the answer was read for {READER_TIMEOUT_S:g} s") from None


def explain(error: Exception, method: str) -> ServiceError:
    """What a caller is told about an error; what it is not told is logged."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, TimeoutError):
        return errors.DeadlineExceeded("the call took longer than the server allows")
    if (known := postgres.meaning(error)) is not None:
        _trouble((method, type(error)), method=method, error=error)
        return known
    return errors.Internal("internal error", metadata={"error_id": _bug(error, method)})


def _bug(error: Exception, method: str) -> str:
    """The id of its entry in the log. Calls that meet one bug within a second share it: they may be thousands."""
    place = error.__traceback__
    while place and place.tb_next:
        place = place.tb_next
    kind = (method, type(error), place and (place.tb_frame.f_code, place.tb_lineno))
    error_id: str = _bugs(kind, method=method, error_id=str(uuid.uuid4()), exc_info=error)["error_id"]
    return error_id
