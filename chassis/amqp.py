"""Opening a RabbitMQ connection on the running asyncio loop; pika's callbacks end here as awaitables."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any, TypeAlias

import pika
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.channel import Channel
from pika.exceptions import AMQPError

CONNECT_TIMEOUT_S = 10.0
HEARTBEAT_S = 20  # a dead peer is noticed within two of them
BLOCKED_TIMEOUT_S = 60  # a broker out of memory or disk blocks its publishers; longer than this: reconnect

Connection: TypeAlias = AsyncioConnection


class BrokerUnavailable(Exception):
    """The broker cannot be reached, or closed the connection or channel; the text says why."""


async def connect(url: str, name: str, on_close: Callable[[str], None]) -> Connection:
    """An open connection; `name` is shown in the broker's management tools, `on_close` gets the reason of a loss.

    Raises:
        BrokerUnavailable: it did not open in time.
    """
    parameters = pika.URLParameters(url)
    parameters.heartbeat = HEARTBEAT_S
    parameters.blocked_connection_timeout = BLOCKED_TIMEOUT_S
    parameters.socket_timeout = CONNECT_TIMEOUT_S
    parameters.stack_timeout = CONNECT_TIMEOUT_S
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
        return await asyncio.wait_for(opened, CONNECT_TIMEOUT_S)
    except BaseException as error:
        close(connection)
        if isinstance(error, TimeoutError):
            raise BrokerUnavailable(f"no connection within {CONNECT_TIMEOUT_S:g} s") from None
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
