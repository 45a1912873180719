"""Opening a RabbitMQ connection on the running asyncio loop; pika's callbacks end here as awaitables."""

import asyncio
import random
import socket
import ssl
from collections.abc import Callable
from typing import Any, TypeAlias

import pika
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.channel import Channel
from pika.exceptions import AMQPError

from chassis.settings import pieces

CONNECT_TIMEOUT_S = 10.0
NODE_TIMEOUT_S = 3.0  # instead, while there are others to try: a host that is off answers nothing at all
HEARTBEAT_S = 5  # who stands still or is cut off has no answer in two of them: what it was given goes to the next
SHORT_STRING_MAX = 255  # bytes; of AMQP
BLOCKED_TIMEOUT_S = 60  # a broker out of memory or disk blocks its publishers; longer than this: reconnect

Connection: TypeAlias = AsyncioConnection


class BrokerUnavailable(Exception):
    """The broker cannot be reached, or closed the connection or channel; the text says why."""


def nodes(url: str) -> list[pika.URLParameters]:
    """One for each host of amqp://user:password@host:port,host:port/virtual-host?options.

    Raises:
        ValueError: the URL or one of its options is wrong, or a file that it names cannot be read.
    """
    scheme, authority, rest = pieces(url)
    user, at, hosts = authority.rpartition("@")
    if "/" in rest.partition("?")[0][1:]:
        raise ValueError("write / as %2F in the virtual host; several hosts are one list: host,host/%2F")
    if at and ":" not in user:
        raise ValueError("the user is without a password: user:password@host")
    if "," in hosts and not all(hosts.split(",")):
        raise ValueError("a host in the list is empty")
    try:
        found = [pika.URLParameters(f"{scheme}://{user}{at}{host}{rest}") for host in hosts.split(",")]
    except Exception as error:  # whatever pika and ssl make of an option
        raise ValueError(f"an option is wrong: {type(error).__name__}: {error}") from None
    if len(found[0].virtual_host.encode()) > SHORT_STRING_MAX:
        raise ValueError(f"the virtual host has more than {SHORT_STRING_MAX} bytes")
    return found


def is_verified(node: pika.URLParameters) -> bool:
    """Whether it is reached by TLS 1.2 or newer, and only with a certificate of a CA that we believe, for its name."""
    context = node.ssl_options.context if node.ssl_options else None
    return (
        context is not None
        and context.verify_mode is ssl.CERT_REQUIRED
        and context.check_hostname
        and context.minimum_version >= ssl.TLSVersion.TLSv1_2
    )


async def connect(url: str, name: str, on_close: Callable[[str], None]) -> Connection:
    """An open connection to any node that answers, tried in random order; `name` is shown in the broker's management
    tools, `on_close` gets the reason of a loss.

    Raises:
        BrokerUnavailable: none opened in time.
    """
    left = nodes(url)
    random.shuffle(left)
    timeout_s = CONNECT_TIMEOUT_S if len(left) == 1 else NODE_TIMEOUT_S
    reasons: list[str] = []
    for node in left:
        try:
            return await _connect(node, timeout_s, name, on_close)
        except BrokerUnavailable as error:
            reasons.append(f"{node.host}:{node.port}: {error}" if len(left) > 1 else str(error))
    raise BrokerUnavailable("; ".join(reasons))


async def _connect(
    parameters: pika.URLParameters, timeout_s: float, name: str, on_close: Callable[[str], None]
) -> Connection:
    parameters.heartbeat = HEARTBEAT_S
    parameters.blocked_connection_timeout = BLOCKED_TIMEOUT_S
    parameters.socket_timeout = timeout_s
    parameters.stack_timeout = timeout_s
    parameters.client_properties = {"connection_name": name}
    # Without it a peer that vanished in mid-write is noticed only after the kernel's quarter of an hour.
    parameters.tcp_options = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        parameters.tcp_options["TCP_USER_TIMEOUT"] = 20_000
    opened: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
    connection = AsyncioConnection(
        parameters,
        on_open_callback=lambda c: _settle(opened, c),
        on_open_error_callback=lambda _, error: _settle(opened, BrokerUnavailable(describe(error))),
        on_close_callback=lambda _, error: on_close(describe(error)),
    )
    try:
        return await asyncio.wait_for(opened, timeout_s)
    except BaseException as error:
        close(connection)
        if isinstance(error, TimeoutError):
            raise BrokerUnavailable(f"no connection within {timeout_s:g} s") from None
        raise


async def open_channel(connection: Connection, on_close: Callable[[str], None]) -> Channel:
    """An open channel; `on_close` gets the reason when the broker closes it, or the connection is lost."""
    opened: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()

    def start(channel: Channel) -> None:
        channel.add_on_close_callback(lambda _, error: on_close(describe(error)))
        _settle(opened, channel)

    connection.channel(on_open_callback=start)
    return await _within(opened)


async def call(channel: Channel, method: Callable[..., Any], **arguments: Any) -> Any:
    """Call a channel method such as `channel.queue_declare` and wait for the broker's answer.

    Raises:
        BrokerUnavailable: the channel was closed instead, or no answer came in time.
    """
    answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    channel.add_on_close_callback(lambda _, error: _settle(answered, BrokerUnavailable(describe(error))))
    method(callback=lambda answer: _settle(answered, answer), **arguments)
    return await _within(answered)


def close(connection: Connection) -> None:
    """Close politely if it is still open; a connection that is lost already is no error."""
    try:
        if not (connection.is_closing or connection.is_closed):
            connection.close()
    except AMQPError:
        pass


def describe(error: BaseException) -> str:
    """What happened, without the errors that pika wraps around the one that says it."""
    while inner := [e for e in _wrapped(error) if isinstance(e, BaseException)]:
        error = inner[-1]
    if isinstance(error, BrokerUnavailable):
        return str(error)
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _wrapped(error: BaseException) -> list[object]:
    return [*error.args, getattr(error, "exception", None), *getattr(error, "exceptions", ())]


def _settle(future: "asyncio.Future[Any]", value: Any) -> None:
    if future.done():
        return
    if isinstance(value, BaseException):
        future.set_exception(value)
    else:
        future.set_result(value)


async def _within(future: "asyncio.Future[Any]") -> Any:
    try:
        return await asyncio.wait_for(future, CONNECT_TIMEOUT_S)
    except TimeoutError:
        raise BrokerUnavailable(f"no answer within {CONNECT_TIMEOUT_S:g} s") from None
