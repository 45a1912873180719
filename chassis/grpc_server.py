"""The gRPC shell around every server of ours: handlers raise, and here, in one place, errors become statuses.

Each handler is wrapped once, when its service is added, rather than by an interceptor on each call: the wrapper
then also sees bytes that are no message (gRPC deserializes before interceptors' handlers run), and costs less.
"""

import asyncio
import inspect
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, NoReturn

import grpc
import structlog
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from prometheus_client import Counter, Histogram, start_http_server

from chassis import errors, postgres
from chassis.errors import ServiceError

MESSAGE_BYTES_MAX = 1 << 20  # received; gRPC's own default is 4 MiB
REPLY_BYTES_MAX = 16 << 20  # a page of 500 purchases of 2,000 items each stays below it
CALL_TIMEOUT_S = 30.0  # for callers that set no deadline
DRAIN_TIMEOUT_S = 20.0  # how long a stopping server waits for the calls in flight
SLOW_CALL_S = 1.0

OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", REPLY_BYTES_MAX),
    ("grpc.max_concurrent_streams", 1_000),  # per connection
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 20_000),  # clients may ping every 30 s
    ("grpc.so_reuseport", 0),  # on by default on Linux: two servers would silently share one port
]

HANDLED = Counter("grpc_server_handled_total", "Calls answered.", ["grpc_method", "grpc_code"])
SECONDS = Histogram(
    "grpc_server_handling_seconds",
    "Time to answer a call.",
    ["grpc_method"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
STATUS_VALUES: Mapping[grpc.StatusCode, int] = {code: code.value[0] for code in grpc.StatusCode}

log = structlog.get_logger()


class Service(NamedTuple):
    """A servicer, the generated function that adds it to a server, and its full name."""

    add: Callable[[Any, Any], None]
    servicer: Any
    name: str


class PortTaken(Exception):
    """Another process listens there."""


class Server:
    """State that the process shares with its handlers: whether it drains, and what is in flight."""

    def __init__(self, domain: str) -> None:
        self.domain = domain
        self.draining = asyncio.Event()
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._health = health.aio.HealthServicer()

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self._health.set(name, status)

    @asynccontextmanager
    async def listening(self, address: str, services: list[Service]) -> AsyncIterator[None]:
        """Listen until the block ends, then drain. Health is NOT_SERVING until `set_serving`.

        Raises:
            PortTaken: the address is in use.
        """
        self._names = ["", *(service.name for service in services)]
        await self.set_serving(False)
        server = grpc.aio.server(options=OPTIONS)
        for service in services:
            service.add(service.servicer, _WrappingServer(server, self, CALL_TIMEOUT_S))
        # Health and reflection answer while draining and count as nothing in flight: a health watch never ends.
        health_pb2_grpc.add_HealthServicer_to_server(self._health, _WrappingServer(server, None, None))  # type: ignore[no-untyped-call]
        reflected = [s.name for s in services] + [health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(  # type: ignore[no-untyped-call]
            reflection.aio.ReflectionServicer(reflected), _WrappingServer(server, None, None)
        )
        try:
            server.add_insecure_port(address)
        except RuntimeError as error:
            raise PortTaken(f"cannot listen on {address}: the port is taken, or the address is not ours") from error
        await server.start()
        try:
            yield
        finally:
            await self._health.enter_graceful_shutdown()
            self.draining.set()
            try:
                await asyncio.wait_for(self._idle.wait(), DRAIN_TIMEOUT_S)
            except TimeoutError:
                log.warning("calls were cut off by the end of the drain", calls=self._in_flight)
            await server.stop(grace=0.5)  # lets the last answers leave; health watches are cut

    def enter(self) -> None:
        if self.draining.is_set():
            raise errors.ShuttingDown("this server is shutting down; try another one")
        self._in_flight += 1
        self._idle.clear()

    def leave(self) -> None:
        self._in_flight -= 1
        if not self._in_flight:
            self._idle.set()


class _WrappingServer:
    """What generated `add_…_to_server` functions see as the server: it wraps each handler on its way."""

    def __init__(self, server: grpc.aio.Server, shared: Server | None, timeout_s: float | None) -> None:
        self._server, self._shared, self._timeout_s = server, shared, timeout_s

    def add_registered_method_handlers(self, service: str, handlers: dict[str, grpc.RpcMethodHandler]) -> None:
        wrapped = {n: _wrap(f"/{service}/{n}", h, self._shared, self._timeout_s) for n, h in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, wrapped),))

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Generated code registers everything twice; the wrapped handlers above are enough."""


def serve_metrics(address: str) -> None:
    """Answer Prometheus on `address`, from a thread of its own.

    Raises:
        PortTaken: the address is in use.
    """
    host, _, port = address.rpartition(":")
    try:
        start_http_server(int(port), host)
    except OSError as error:
        raise PortTaken(f"cannot listen on {address} (metrics): {error.strerror}") from error


def _wrap(method: str, handler: Any, shared: Server | None, timeout_s: float | None) -> grpc.RpcMethodHandler:
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    behavior = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )  # exactly one is set
    domain = shared.domain if shared else "retail.example"
    parse = _parse_stream if handler.request_streaming else _parse
    seconds = SECONDS.labels(method)
    succeeded = HANDLED.labels(method, "OK")

    async def guarded(work: Awaitable[Any], context: Any) -> Any:
        """Run one call: count it, and turn whatever it raises into a status."""
        started = time.perf_counter()
        entered = False
        try:
            if shared:
                shared.enter()
                entered = True
            result = await work
        except BaseException as error:
            failure = _failure(error, method)
            if failure is None:
                raise  # cancelled by the caller: nobody waits for an answer
            HANDLED.labels(method, failure.code.name).inc()
            log.info("call refused", method=method, code=failure.code.name, reason=failure.reason, error=str(failure))
            await _abort(context, failure, domain)
        else:
            succeeded.inc()
            return result
        finally:
            if inspect.iscoroutine(work):
                work.close()  # it was never awaited when `enter` refused; otherwise this does nothing
            elapsed = time.perf_counter() - started
            seconds.observe(elapsed)
            if elapsed > SLOW_CALL_S and not handler.response_streaming:
                log.warning("slow call", method=method, seconds=round(elapsed, 3))
            if entered and shared:
                shared.leave()

    if not handler.response_streaming:

        async def answer(request: Any, context: Any) -> Any:
            parsed = parse(handler.request_deserializer, request)
            async with asyncio.timeout(timeout_s):
                return await behavior(parsed, context)

        async def unary(request: Any, context: Any) -> Any:
            return await guarded(answer(request, context), context)

        return make(unary, response_serializer=handler.response_serializer)

    async def send(request: Any, context: Any) -> None:
        outcome = behavior(parse(handler.request_deserializer, request), context)
        if inspect.isawaitable(outcome):  # the health service writes to the context itself
            await outcome
            return
        async for reply in outcome:
            await context.write(reply)

    async def stream(request: Any, context: Any) -> None:
        await guarded(send(request, context), context)

    return make(stream, response_serializer=handler.response_serializer)


def _parse(deserialize: Callable[[bytes], Any], raw: bytes) -> Any:
    try:
        return deserialize(raw)
    except message.DecodeError:
        raise errors.MalformedMessage("the bytes are not a message of the expected type") from None


async def _parse_stream(deserialize: Callable[[bytes], Any], raw: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for item in raw:
        yield _parse(deserialize, item)


def _failure(error: BaseException, method: str) -> ServiceError | None:
    """What the caller is told; None when the caller itself cancelled the call."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, asyncio.CancelledError):
        # A task that was asked to cancel: the caller gave up. Otherwise something inside was cancelled, and gRPC
        # would leave the caller without any status until its deadline.
        task = asyncio.current_task()
        return None if task and task.cancelling() else errors.ShuttingDown("the call was interrupted; try again")
    if not isinstance(error, Exception):
        return None
    if isinstance(error, TimeoutError):
        return errors.DeadlineExceeded("the call took longer than the server allows")
    if (known := postgres.meaning(error)) is not None:
        log.warning("database trouble", method=method, error=str(error).strip())
        return known
    error_id = str(uuid.uuid4())
    log.error("bug", method=method, error_id=error_id, exc_info=error)
    return _Internal("internal error", metadata={"error_id": error_id})


class _Internal(ServiceError):
    """A bug. Its text is fixed, so that nothing of the inside leaks out."""

    code = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"


async def _abort(context: Any, error: ServiceError, domain: str) -> NoReturn:
    await context.abort(
        error.code,
        error.message,
        trailing_metadata=(("grpc-status-details-bin", to_status(error, domain).SerializeToString()),),
    )
    raise AssertionError("abort always raises")


def to_status(error: ServiceError, domain: str) -> status_pb2.Status:
    """The rich form of an error: ErrorInfo always, BadRequest and RetryInfo where they apply."""
    details: list[message.Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=domain, metadata=error.metadata)
    ]
    if error.violations:
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
                    for v in error.violations
                ]
            )
        )
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1_000_000_000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=STATUS_VALUES[error.code], message=error.message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


assert code_pb2.OK == STATUS_VALUES[grpc.StatusCode.OK]  # google.rpc and gRPC number their codes alike
