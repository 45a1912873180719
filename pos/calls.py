"""How the till's side calls a service: a well-set-up channel, a deadline on everything, patient retries."""

import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc

from chassis import grpc_client, traces
from chassis.tls import Credentials
from pos import errors, service_config
from pos.errors import PosError, Status
from pos.service_config import BACKOFF_FACTOR, FIRST_BACKOFF_S, MOST_BACKOFF_S, TOTAL_TIMEOUT_S

ATTEMPT_TIMEOUT_S = 5.0  # a healthy service answers within milliseconds

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.service_config", service_config.TEXT),
    ("grpc.service_config_disable_resolution", 1),  # DNS must not replace the line above
    ("grpc.enable_retries", 0),  # retries are ours: patient, as the same file says, and each with its own deadline
    ("grpc.enable_http_proxy", 0),  # http_proxy is meant for the web, not for the chain's own network
    ("grpc.use_local_subchannel_pool", 1),  # a connection per channel, or all channels would share one
    ("grpc.keepalive_time_ms", 30_000),  # a dead peer is noticed; servers allow a ping every 20 s
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),  # time given to one attempt to connect
    ("grpc.max_reconnect_backoff_ms", 2_000),  # the default of 120 s would outlast most outages
    ("grpc.max_receive_message_length", 16 << 20),  # what servers send at most; gRPC's default is 4 MiB
]

Request = TypeVar("Request")
Reply = TypeVar("Reply")
Pause = Callable[[float, PosError], object]


def connect(target: str, credentials: Credentials | None = None) -> grpc.Channel:
    """A channel to `host:port`: every address that DNS knows for the name gets its share of the calls.

    `credentials` is who the till is; new certificates in its files take effect by themselves. Without them, all is
    in plaintext: within a machine, or where a mesh sees to it.
    """
    return grpc_client.connect_blocking(target if ":///" in target else f"dns:///{target}", credentials, _OPTIONS)


def sleep(pause_s: float, _: PosError) -> None:
    time.sleep(pause_s)


def pause_before_retry(status: Status, backoff_s: float, room_s: float) -> float | None:
    """How long to wait, within `room_s` seconds; None when a retry is of no use, or would come too late.

    Full jitter, over at least the delay that the service asks for: tills that failed together must not come back
    together.
    """
    if status.code not in errors.RETRYABLE:
        return None
    delay_s = status.retry_delay_s or 0.0
    spread_s = max(delay_s, backoff_s)
    if delay_s > MOST_BACKOFF_S:  # not a rush, but a time to wait for: it is not missed for the sake of the jitter
        spread_s = min(spread_s, (room_s - delay_s) / 2)
    pause_s = delay_s + random.uniform(0, spread_s)
    return pause_s if pause_s < room_s else None


class Calls:
    """Makes unary calls and repeats those that meet passing troubles."""

    def __init__(
        self,
        *,
        attempt_timeout_s: float = ATTEMPT_TIMEOUT_S,
        total_timeout_s: float = TOTAL_TIMEOUT_S,
        pause: Pause = sleep,
    ) -> None:
        """`pause(seconds, why)` waits between two attempts; what it raises ends the call."""
        self._attempt_timeout_s = attempt_timeout_s
        self._total_timeout_s = total_timeout_s
        self._pause = pause
        traces.adopt()

    def __call__(
        self,
        method: Callable[..., Reply],
        request: Request,
        meaning: Callable[[Status], PosError] = errors.of_call,
        within_s: float = math.inf,
    ) -> Reply:
        """Call `method`, a stub's or what is called like one, until it answers, `within_s` and the total timeout.

        Raises:
            PosError: as `meaning` translates the last status.
        """
        if (span := traces.calling(request)) is None:
            return self._patiently(method, request, meaning, within_s)
        with span:
            try:
                reply = self._patiently(method, request, meaning, within_s, span)
            except PosError as error:
                span.note({"rpc.response.status_code": error.status.code.name})
                raise
            span.answered("OK")
            return reply

    def _patiently(
        self,
        method: Callable[..., Reply],
        request: Request,
        meaning: Callable[[Status], PosError],
        within_s: float,
        span: traces.Span | None = None,
    ) -> Reply:
        traced = {"metadata": ((traces.TRACEPARENT, span.traceparent),)} if span else {}
        timeout_s = max(min(self._total_timeout_s, within_s), 0.0)
        deadline = time.monotonic() + timeout_s
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                return method(request, timeout=min(self._attempt_timeout_s, timeout_s), **traced)
            except grpc.RpcError as error:
                status = errors.read_status(error)
            except PosError as error:
                status = error.status
            except ValueError as error:  # how gRPC says that the channel is closed, as by another thread
                raise meaning(Status(grpc.StatusCode.CANCELLED, str(error))) from None
            failure = meaning(status)
            pause_s = pause_before_retry(status, backoff_s, deadline - time.monotonic())
            if pause_s is None:
                raise failure
            if span:
                span.tell("retry", {"rpc.response.status_code": status.code.name, "error.type": status.reason})
            self._pause(pause_s, failure)
            timeout_s = deadline - time.monotonic()
            if timeout_s <= 0:  # the pause took longer than asked for
                raise failure
            backoff_s = min(BACKOFF_FACTOR * backoff_s, MOST_BACKOFF_S)

    def pages(self, method: "grpc.UnaryUnaryMultiCallable[Any, Reply]", request: Any) -> Iterator[Reply]:
        """The pages of a listing, each fetched when it is asked for, each within the total timeout."""
        while True:
            page: Any = self(method, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token
