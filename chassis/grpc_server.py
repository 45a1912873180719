"""A gRPC server of ours: what it serves, its limits, health and reflection, and its end."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import Gauge

from chassis import access, reflection, tls
from chassis.access import AccessSettings
from chassis.errors import PortTaken
from chassis.grpc_client import REPLY_BYTES_MAX
from chassis.grpc_guard import Door, UnknownMethods, WrappingServer
from chassis.in_flight import CALLS_MAX, InFlight
from chassis.rules import rules_of

MESSAGE_BYTES_MAX = 64 << 10  # received, unless a service says otherwise: a thousand ids have 38 KB
# gRPC refuses what is larger than its own limit with a code that invites retries, and without a word to programs. So
# its limit is higher, and ours is checked first: few mistakes are more than this many times too large.
GRPC_LIMIT_FACTOR = 4
CALL_TIMEOUT_S = 30.0  # for callers that set no deadline, or a later one
DRAIN_TIMEOUT_S = 20.0  # how long a stopping server waits for the calls in flight
CALLS_OF_CONNECTION_MAX = 1_000  # at once; more wait at the client
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

CERTIFICATE_DAYS = Gauge("tls_certificate_days_left", "Until the certificate in use ends.", ["file"])
CERTIFICATE_REFUSED = Gauge(
    "tls_certificate_refused", "1 while what the files hold is broken, so that older ones are in use.", ["file"]
)

log = structlog.get_logger()


class Service(NamedTuple):
    """A servicer, the generated function that adds it to a server, its full name, and the most that a call may take."""

    add: Callable[[Any, Any], None]
    servicer: Any
    name: str
    timeout_s: float = CALL_TIMEOUT_S
    message_bytes_max: int = MESSAGE_BYTES_MAX
    streamed_bytes_max: int = 0  # of each message where requests are a stream, if that is more

    @property
    def received_bytes_max(self) -> int:
        return max(self.message_bytes_max, self.streamed_bytes_max)


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
            ("grpc.max_receive_message_length", GRPC_LIMIT_FACTOR * max(s.received_bytes_max for s in services)),
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
                service.received_bytes_max,
            )
            service.add(service.servicer, WrappingServer(server, door))
        # Health and reflection answer while draining, so they are counted apart: a health watch does not end then.
        door = Door(
            self.domain,
            self._gate,
            rules,
            InFlight(),
            CALL_TIMEOUT_S,
            SIDE_STREAM_TIMEOUT_S,
            MESSAGE_BYTES_MAX,
            MESSAGE_BYTES_MAX,
        )
        shell = WrappingServer(server, door)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, shell)  # type: ignore[arg-type]
        if self._reflection:
            reflection.add_to_server([*(s.name for s in services), health.SERVICE_NAME], shell)
        server.add_generic_rpc_handlers((UnknownMethods(self.domain),))
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
