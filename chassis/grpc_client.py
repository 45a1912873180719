"""How anything of ours asks a process of ours: a channel that notices when its peer is gone, and soon when it is back.

Nobody opens one in another way. It imports gRPC alone, so that commands and health checks start quickly, and tills
need no more.
"""

import asyncio
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import grpc

from chassis import tls
from chassis.tls import Credentials, Pem

REPLY_BYTES_MAX = 16 << 20  # what our servers send at most; gRPC's own limit is 4 MiB
RETIRED_S = 3_600.0  # for the calls that a connection with older certificates still has; the server ends it before

OPTIONS: list[tuple[str, Any]] = [
    ("grpc.enable_http_proxy", 0),  # http_proxy is meant for the web, not for the chain's own network
    ("grpc.service_config_disable_resolution", 1),  # DNS must not replace what we are given
    ("grpc.max_receive_message_length", REPLY_BYTES_MAX),
    ("grpc.keepalive_time_ms", 30_000),  # servers allow a ping every 20 s; some calls have no deadline
    ("grpc.keepalive_timeout_ms", 10_000),
    # Between two attempts to connect every call fails at once, though the peer may be back: gRPC's own pauses grow to
    # two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),  # time given to one attempt to connect
    ("grpc.max_reconnect_backoff_ms", 1_000),
]

Channel = TypeVar("Channel", grpc.Channel, grpc.aio.Channel)


def connect(target: str, service_config: str, credentials: Credentials | None = None) -> grpc.aio.Channel:
    """A channel to `host:port`, which need not be up yet; `service_config` is the JSON that the contract has for every
    client: how long calls may take, which are tried again, and which servers are asked. Without
    `credentials` it is in plaintext."""
    options = [*OPTIONS, ("grpc.service_config", service_config)]
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options)

    def open_one(pem: Pem) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(target, tls.channel_credentials(pem), options=options)

    return cast(grpc.aio.Channel, _Following(credentials, open_one))


def connect_blocking(
    target: str, credentials: Credentials | None = None, options: list[tuple[str, Any]] = OPTIONS
) -> grpc.Channel:
    """A channel without asyncio: for commands and checks, which ask once and want to know at once, and for tills, which
    have options of their own."""
    if credentials is None:
        return grpc.insecure_channel(target, options=options)

    def open_one(pem: Pem) -> grpc.Channel:
        return grpc.secure_channel(target, tls.channel_credentials(pem), options=options)

    return cast(grpc.Channel, _FollowingBlocking(credentials, open_one))


class _Following(Generic[Channel]):
    """What generated stubs see as the channel: each call takes the connection of the newest certificates.

    gRPC's own channels keep theirs for ever. One that has become old is closed when its last call has ended.
    """

    def __init__(self, credentials: Credentials, open_one: Callable[[Pem], Channel]) -> None:
        self._now = credentials.now
        self._pem = credentials.now()
        self._open_one: Callable[[Pem], Channel] = open_one
        self._channel: Channel = open_one(self._pem)
        self._retiring: dict[asyncio.Task[None], Channel] = {}

    def newest(self) -> Channel:
        pem = self._now()
        if pem is not self._pem:
            older, self._channel, self._pem = self._channel, self._open_one(pem), pem
            self._retire(older)
        return self._channel

    def _retire(self, channel: Any) -> None:
        closing = asyncio.get_running_loop().create_task(channel.close(grace=RETIRED_S))
        self._retiring[closing] = channel
        closing.add_done_callback(lambda done: self._retiring.pop(done, None))

    def unary_unary(self, *arguments: Any, **options: Any) -> "_Method":
        return _Method(self, "unary_unary", arguments, options)

    def unary_stream(self, *arguments: Any, **options: Any) -> "_Method":
        return _Method(self, "unary_stream", arguments, options)

    def stream_unary(self, *arguments: Any, **options: Any) -> "_Method":
        return _Method(self, "stream_unary", arguments, options)

    def stream_stream(self, *arguments: Any, **options: Any) -> "_Method":
        return _Method(self, "stream_stream", arguments, options)

    async def close(self, grace: float | None = None) -> None:
        self._stay()
        for closing, channel in list(self._retiring.items()):
            closing.cancel()
            await cast(Any, channel).close(grace)
        await cast(Any, self._channel).close(grace)

    def _stay(self) -> None:
        """Once it is closed, no new certificate opens it again."""
        pem = self._pem
        self._now = lambda: pem

    async def __aenter__(self) -> "_Following[Channel]":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _FollowingBlocking(_Following[grpc.Channel]):
    """The same for threads. A channel that nobody holds any more is closed by its last call's end."""

    def __init__(self, credentials: Credentials, open_one: Callable[[Pem], grpc.Channel]) -> None:
        super().__init__(credentials, open_one)
        self._changing = threading.Lock()

    def newest(self) -> grpc.Channel:
        if self._now() is not self._pem:
            with self._changing:
                return super().newest()
        return self._channel

    def _retire(self, channel: Any) -> None:
        """Closing it would cut off the calls that other threads have."""

    def close(self) -> None:  # type: ignore[override]
        with self._changing:
            self._stay()
            self._channel.close()

    def __enter__(self) -> "_FollowingBlocking":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Method:
    """A method as stubs call it: by itself, or by what else gRPC's has, such as `future`."""

    def __init__(
        self, channel: "_Following[Any]", kind: str, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self._channel, self._kind, self._arguments, self._options = channel, kind, arguments, options
        self._of: tuple[Any, Any] = (None, None)  # a channel, and the method on it

    def _newest(self) -> Any:
        channel = self._channel.newest()
        of, method = self._of
        if of is not channel:
            method = getattr(channel, self._kind)(*self._arguments, **self._options)
            self._of = (channel, method)
        return method

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._newest()(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._newest(), name)
