"""TLS before a PostgreSQL that has none of its own, as that of the wheel: it answers SSLRequest, and nothing else."""

import asyncio
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SSL_REQUEST = (8).to_bytes(4, "big") + (80877103).to_bytes(4, "big")
CHUNK = 1 << 16


class TlsProxy:
    """Counts what came in by TLS, and what was turned away as it did not ask for it."""

    def __init__(self, context: ssl.SSLContext, host: str, port: int) -> None:
        self._context, self._server = context, (host, port)
        self.encrypted = self.refused = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError, ssl.SSLError):
            if await reader.readexactly(len(SSL_REQUEST)) != SSL_REQUEST:
                self.refused += 1
                writer.close()
                return
            writer.write(b"S")
            await writer.drain()
            await writer.start_tls(self._context)
            self.encrypted += 1
            upstream, downstream = await asyncio.open_connection(*self._server)
            await asyncio.gather(_copy(reader, downstream), _copy(upstream, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


@contextmanager
def tls_proxy(certificate: Path, key: Path, host: str, port: int) -> Iterator[tuple[TlsProxy, int]]:
    """The proxy and its port on the loopback, in a thread of its own."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    proxy = TlsProxy(context, host, port)
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(proxy.serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield proxy, server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
