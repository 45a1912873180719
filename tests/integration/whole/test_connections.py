"""Connections and streams end, which no call notices but those that are told of it; and there are only so many."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from analytics_svc.proof.audit_server import CALL_TIMEOUT_S as AUDIT_TIMEOUT_S
from chassis import grpc_server
from tests.conftest import WAIT_S, eventually
from tests.integration.conftest import free_address
from tests.integration.sales import Refusal

ASK = HealthCheckRequest()


@asynccontextmanager
async def serving(address: str, **limits: Any) -> AsyncIterator[grpc_server.Server]:
    """A server of health and reflection only."""
    server = grpc_server.Server("test.retail.example")
    service = grpc_server.Service(lambda *_: None, None, "retail.relay.v1.OutboxService")
    async with server.listening(address, [service], **limits):
        await server.set_serving(True)
        yield server


def health(channel: grpc.aio.Channel) -> Any:
    return HealthStub(channel)


def connect(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])


@asynccontextmanager
async def counted(address: str) -> AsyncIterator[tuple[str, list[asyncio.Task[None]]]]:
    """An address that leads there, and the connections that were made to it."""
    host, _, port = address.rpartition(":")
    links: list[asyncio.Task[None]] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def link(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        links.append(asyncio.ensure_future(pump(there, writer)))
        await asyncio.gather(pump(reader, back), links[-1], return_exceptions=True)

    async with await asyncio.start_server(link, "127.0.0.1", 0) as listening:
        yield f"127.0.0.1:{listening.sockets[0].getsockname()[1]}", links


async def test_no_call_notices_that_a_connection_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """New calls go on a new one; a stream goes on where it is, and its connection ends with it."""
    monkeypatch.setattr(grpc_server, "CONNECTION_AGE_S", 0.2)
    address = free_address()
    async with serving(address) as server, counted(address) as (proxied, links), connect(proxied) as channel:
        stub = health(channel)
        watch: Any = stub.Watch(ASK)
        assert (await watch.read()).status == HealthCheckResponse.SERVING

        async def renewed() -> bool:
            await stub.Check(ASK, timeout=WAIT_S)
            return len(links) >= 4

        await eventually(renewed, "calls go on a fourth connection")
        await server.set_serving(False)
        assert (await watch.read()).status == HealthCheckResponse.NOT_SERVING
        assert not links[0].done()
        watch.cancel()
        await asyncio.wait_for(links[0], WAIT_S)


async def watch(channel: grpc.aio.Channel) -> None:
    async for _ in health(channel).Watch(ASK):
        pass


async def reflect(channel: grpc.aio.Channel) -> None:
    stub: Any = ServerReflectionStub(channel)  # type: ignore[arg-type]
    call = stub.ServerReflectionInfo()
    await call.write(ServerReflectionRequest(list_services=""))
    while await call.read() is not grpc.aio.EOF:
        pass


@pytest.mark.parametrize("stream", [watch, reflect])
async def test_streams_beside_the_services_end(
    monkeypatch: pytest.MonkeyPatch, stream: Callable[[grpc.aio.Channel], Awaitable[None]]
) -> None:
    """However their callers keep them; these are told to come again."""
    monkeypatch.setattr(grpc_server, "SIDE_STREAM_TIMEOUT_S", 0.5)
    address = free_address()
    async with serving(address), connect(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await asyncio.wait_for(stream(channel), WAIT_S)
        refusal = Refusal(error.value)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")


async def test_calls_of_a_process_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no other limit counts, such as health watches of many connections: beyond the last one they are refused."""
    monkeypatch.setattr(grpc_server, "CALLS_MAX", 5)
    address = free_address()
    async with serving(address), AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(connect(address)) for _ in range(3)]
        watches: list[Any] = [health(channels[n % 3]).Watch(ASK) for n in range(10)]
        for held in watches:
            await held.read()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await health(channels[0]).Check(ASK, timeout=WAIT_S)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        watches[0].cancel()

        async def answered() -> bool:
            try:
                await health(channels[1]).Check(ASK, timeout=WAIT_S)
            except grpc.aio.AioRpcError:
                return False
            return True

        await eventually(answered, "there is room again")


async def test_streams_of_a_connection_are_limited() -> None:
    """One call more than a connection may have waits at its client for one of them to end; others do not notice."""
    address = free_address()
    async with serving(address, calls_of_connection_max=3), connect(address) as crowded, connect(address) as other:
        await health(crowded).Check(ASK, timeout=WAIT_S)  # from here on, the client knows the limit
        watches: list[Any] = [health(crowded).Watch(ASK) for _ in range(3)]
        for held in watches:
            await held.read()
        late = asyncio.ensure_future(health(crowded).Check(ASK, timeout=WAIT_S))
        for _ in range(20):
            await health(other).Check(ASK, timeout=WAIT_S)
        assert not late.done()
        watches[0].cancel()
        assert (await late).status == HealthCheckResponse.SERVING


def test_a_connection_outlives_its_calls() -> None:
    """None is cut off without a word: whatever may take longest is over before."""
    longest_s = max(grpc_server.STREAM_TIMEOUT_S, grpc_server.SIDE_STREAM_TIMEOUT_S, AUDIT_TIMEOUT_S)
    assert longest_s < grpc_server.CONNECTION_GRACE_S
