"""The gRPC shell around every server of ours: handlers raise, and here, in one place, errors become statuses.

Each handler is wrapped once, when its service is added, rather than by an interceptor on each call: the wrapper
then also sees bytes that are no message (gRPC deserializes before interceptors' handlers run), and costs less.
"""

import asyncio
import inspect
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, NamedTuple, TypeAlias, TypeVar

import grpc
import structlog
from google.protobuf import message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import Counter, Gauge, Histogram

from chassis import access, errors, postgres, reflection, tls
from chassis.access import AccessSettings, Gate
from chassis.errors import AccessRefused, PortTaken, ServiceError
from chassis.grpc_client import REPLY_BYTES_MAX
from chassis.identity import Caller
from chassis.in_flight import CALLS_MAX, InFlight, Stream
from chassis.logs import Sampled
from chassis.rules import Rule, rules_of

MESSAGE_BYTES_MAX = 64 << 10  # received, unless a service says otherwise: a thousand ids have 38 KB
# gRPC refuses what is larger than its own limit with a code that invites retries, and without a word to programs. So
# its limit is higher, and ours is checked first: few mistakes are more than this many times too large.
GRPC_LIMIT_FACTOR = 4
CALL_TIMEOUT_S = 30.0  # for callers that set no deadline, or a later one
DRAIN_TIMEOUT_S = 20.0  # how long a stopping server waits for the calls in flight
SLOW_CALL_S = 1.0
CALLS_OF_CONNECTION_MAX = 1_000  # at once; more wait at the client
IDLE_TIMEOUT_S = 300.0  # of a stream that its caller neither feeds nor ends
METHOD_LENGTH_MAX = 200  # of a method that is not there, as it is repeated to the caller
# A stream whose reader takes nothing for so long is cut. Shorter than PostgreSQL's patience with an idle transaction.
READER_TIMEOUT_S = 20.0

# A connection takes no new calls after the first, which go on another one; what is under way on it then has the second.
# So tills find servers that came later, and what was opened with a certificate that has ended since ends, too.
CONNECTION_AGE_S = 600.0
CONNECTION_GRACE_S = 1_860.0  # longer than any call may take: gRPC cuts it off without a word
STREAM_TIMEOUT_S = 1_800.0  # then its caller is told to come again
SIDE_STREAM_TIMEOUT_S = 600.0  # of health and reflection, which wait for nobody's work

OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", REPLY_BYTES_MAX),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 20_000),  # clients may ping every 30 s
    # gRPC throws calls away with CANCELLED before anybody sees them, at random from 1,000 that wait to be taken in, and
    # all that wait for 30 s. Our own limits are lower, and say when to come again.
    ("grpc.server.max_pending_requests", 100_000),
    ("grpc.server.max_pending_requests_hard_limit", 100_000),
    ("grpc.server_max_unrequested_time_in_server", 300),  # seconds
    ("grpc.max_connection_idle_ms", 30 * 60_000),  # a client that calls again connects again
]

HANDLED = Counter("grpc_server_handled_total", "Calls answered.", ["grpc_service", "grpc_method", "grpc_code"])
SECONDS = Histogram(
    "grpc_server_handling_seconds",
    "Time to answer a call.",
    ["grpc_service", "grpc_method"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)

CERTIFICATE_DAYS = Gauge("tls_certificate_days_left", "Until the certificate in use ends.", ["file"])
CERTIFICATE_REFUSED = Gauge(
    "tls_certificate_refused", "1 while what the files hold is broken, so that older ones are in use.", ["file"]
)
REFUSED = Counter("grpc_server_refused_total", "Refusals.", ["grpc_service", "grpc_method", "reason"])

UNKNOWN = "/unknown/unknown"  # callers must not make up values of a metric's label

T = TypeVar("T", bound=Callable[..., Any])
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

log = structlog.get_logger()
_refusals = Sampled("info", "call refused")
_slow = Sampled("warning", "slow call")
_trouble = Sampled("warning", "database trouble")
_bugs = Sampled("error", "bug")


class Service(NamedTuple):
    """A servicer, the generated function that adds it to a server, its full name, and the most that a call may take."""

    add: Callable[[Any, Any], None]
    servicer: Any
    name: str
    timeout_s: float = CALL_TIMEOUT_S
    message_bytes_max: int = MESSAGE_BYTES_MAX


def reading(deserialize: Callable[[bytes], Any]) -> Callable[[T], T]:
    """A handler whose requests are made of bytes by `deserialize`, such as not to read all of a large one in one go."""

    def mark(handler: T) -> T:
        handler.deserialize = deserialize  # type: ignore[attr-defined]
        return handler

    return mark


class Server:
    """State that the process shares with its handlers: whether it drains, and what is in flight."""

    def __init__(
        self,
        domain: str,
        config: AccessSettings = AccessSettings(),
        credentials: tls.Credentials | None = None,
    ) -> None:
        """`domain` is that of errors. Without `credentials` callers are not known, and everything is permitted.

        Raises:
            SettingsError
        """
        self.domain = domain
        self._credentials, self._reflection, self._tokens_address = credentials, config.reflection, config.jwt_listen
        self._gate = access.gate(config, certificates=credentials is not None)
        self.in_flight = InFlight()
        self.draining = self.in_flight.draining
        self._health = health.aio.HealthServicer()

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self._health.set(name, status)

    @asynccontextmanager
    async def listening(
        self,
        address: str,
        services: list[Service],
        *,
        share_port: bool = False,
        calls_of_connection_max: int = CALLS_OF_CONNECTION_MAX,
    ) -> AsyncIterator[None]:
        """Listen until the block ends, then drain. Health is NOT_SERVING until `set_serving`.

        `share_port` lets several processes listen there; see that no stranger does. gRPC takes in calls in the order in
        which they come, so what one connection may have at once is what others wait for.

        Raises:
            PortTaken: the address is in use.
            RuleMissing: there is a method that nobody has decided about.
        """
        rules = rules_of([*(s.name for s in services), health.SERVICE_NAME, reflection.V1, reflection.V1ALPHA])
        self._names = ["", *(service.name for service in services)]
        await self.set_serving(False)
        options = [
            *OPTIONS,
            ("grpc.max_concurrent_streams", calls_of_connection_max),
            ("grpc.http.overload_protection", 0),
            ("grpc.max_receive_message_length", GRPC_LIMIT_FACTOR * max(s.message_bytes_max for s in services)),
            # Shared by default on Linux: then two servers would have one port without noticing.
            ("grpc.so_reuseport", int(share_port)),
            ("grpc.max_connection_age_ms", int(1_000 * CONNECTION_AGE_S)),
            ("grpc.max_connection_age_grace_ms", int(1_000 * CONNECTION_GRACE_S)),
        ]
        # The last of all limits, without a word to programs; ours come first.
        server = grpc.aio.server(options=options, maximum_concurrent_rpcs=2 * CALLS_MAX)
        for service in services:
            door = Door(
                self.domain,
                self._gate,
                rules,
                self.in_flight,
                service.timeout_s,
                STREAM_TIMEOUT_S,
                service.message_bytes_max,
            )
            service.add(service.servicer, _WrappingServer(server, door))
        # Health and reflection answer while draining, so they are counted apart: a health watch does not end then.
        door = Door(
            self.domain, self._gate, rules, InFlight(), CALL_TIMEOUT_S, SIDE_STREAM_TIMEOUT_S, MESSAGE_BYTES_MAX
        )
        shell = _WrappingServer(server, door)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, shell)  # type: ignore[arg-type]
        if self._reflection:
            reflection.add_to_server([*(s.name for s in services), health.SERVICE_NAME], shell)
        server.add_generic_rpc_handlers((_UnknownMethods(self.domain),))
        self._add_port(server, address)
        await server.start()
        try:
            async with self._gate.following():
                yield
        finally:
            await self._health.enter_graceful_shutdown()
            self.draining.set()
            try:
                await asyncio.wait_for(self.in_flight.idle.wait(), DRAIN_TIMEOUT_S)
            except TimeoutError:
                log.warning("calls were cut off by the end of the drain", calls=self.in_flight.calls)
            await server.stop(grace=0.5)  # lets the last answers leave; health watches are cut

    def _add_port(self, server: grpc.aio.Server, address: str) -> None:
        try:
            if self._credentials is None:
                log.warning(
                    "plaintext: there are no certificates; callers are not known, and may do everything", listen=address
                )
                server.add_insecure_port(address)
                return
            server.add_secure_port(address, tls.server_credentials(self._credentials))
            if self._tokens_address:
                address = self._tokens_address
                server.add_secure_port(address, tls.server_credentials(self._credentials, ask_callers=False))
        except RuntimeError as error:
            raise PortTaken(f"cannot listen on {address}: the port is taken, or the address is not ours") from error
        file, credentials = self._credentials.name, self._credentials
        CERTIFICATE_DAYS.labels(file).set_function(lambda: tls.days_left(credentials.now()))
        CERTIFICATE_REFUSED.labels(file).set_function(lambda: credentials.broken)


class Door(NamedTuple):
    """What the methods of a service have in common: who may come in, and how much of it."""

    domain: str  # of errors
    gate: Gate
    rules: Mapping[str, Rule]  # by method
    in_flight: InFlight
    timeout_s: float  # of a call with one answer, and for the request of others
    stream_timeout_s: float
    message_bytes_max: int


class _WrappingServer:
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


class _UnknownMethods(grpc.GenericRpcHandler):
    """Asked last: answers calls of methods that no service has."""

    def __init__(self, domain: str) -> None:
        self._domain = domain

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler:
        method = handler_call_details.method[:METHOD_LENGTH_MAX]

        async def refuse(_: object, context: Any) -> None:
            error = errors.UnknownMethod(f"this server has no method {method}", metadata={"method": method})
            await _abort(context, UNKNOWN, error, self._domain)

        return grpc.stream_stream_rpc_method_handler(refuse)


class _Guard:
    """One method's handler, with everything around it that all methods share."""

    def __init__(self, method: str, handler: Any, door: Door) -> None:
        self._method, self._domain, self._in_flight = method, door.domain, door.in_flight
        self._gate, self._rule = door.gate, door.rules[method]
        self._timeout_s, self._stream_timeout_s = door.timeout_s, door.stream_timeout_s
        self._message_bytes_max = door.message_bytes_max
        self._behavior = (  # exactly one is set
            handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        )
        self._takes_stream = handler.request_streaming
        self._deserialize = getattr(self._behavior, "deserialize", handler.request_deserializer)
        _, service, name = method.split("/")
        self._seconds = SECONDS.labels(service, name)
        self._succeeded = HANDLED.labels(service, name, "OK")
        HANDLED.labels(service, name, "INTERNAL")  # there before the first one, which alarms would not notice

    async def unary(self, requests: AsyncIterator[bytes], context: Any) -> Any:
        started = time.perf_counter()
        try:
            remaining = context.time_remaining()
            cap = self._timeout_s
            if remaining is not None and remaining <= cap:  # nearly always; gRPC ends it in time
                reply = await self._reply(requests, context)
            else:
                async with asyncio.timeout(cap):
                    reply = await self._reply(requests, context)
        except BaseException as error:
            failure = self._explain(error)
        else:
            self._succeeded.inc()
            return reply
        finally:
            elapsed = time.perf_counter() - started
            self._seconds.observe(elapsed)
            if elapsed > SLOW_CALL_S:
                _slow(self._method, method=self._method, seconds=round(elapsed, 3))
        await _abort(context, self._method, failure, self._domain)

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
        try:
            caller = self._gate.admit(self._rule, context)
            async with self._gate.while_accepted(self._rule, caller), self._in_time():
                await self._stream(caller, requests, context)
        except BaseException as error:
            failure = self._explain(error)
        else:
            self._succeeded.inc()
            return
        await _abort(context, self._method, failure, self._domain)

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
        async with aclosing(replies):  # what the handler holds is freed now, not at some collection
            async for reply in replies:
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
        request = self._parse(raw)
        self._gate.check(self._rule, caller, request)
        return request

    def _parse(self, raw: bytes) -> Any:
        if len(raw) > self._message_bytes_max:
            raise errors.MessageTooLarge(
                f"a message may have at most {self._message_bytes_max:,} bytes; this one has {len(raw):,}",
                metadata={"bytes_max": str(self._message_bytes_max), "bytes": str(len(raw))},
            )
        try:
            return self._deserialize(raw)
        except message.DecodeError:
            raise errors.MalformedMessage("the bytes are not a message of the expected type") from None

    def _explain(self, error: BaseException) -> ServiceError:
        if isinstance(error, grpc.aio.AbortError):
            raise error  # gRPC's own services answer for themselves
        if isinstance(error, Exception):
            return explain(error, self._method)
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and not (task and task.cancelling()):
            # Not the caller gave up, but something inside was cancelled. Without a status, it would wait for nothing.
            return errors.ShuttingDown("the call was interrupted; try again")
        raise error


async def _abort(context: Any, method: str, error: ServiceError, domain: str) -> None:
    """End the call; the handler has to return then."""
    _, service, name = method.split("/")
    HANDLED.labels(service, name, error.code.name).inc()
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
