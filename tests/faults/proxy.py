"""TCP proxies between the parts of the system, where connections are cut, delayed, deafened or broken off in mid-frame.

All proxies run on one event loop in a thread of their own; their methods may be called from any thread.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

CHUNK = 1 << 16
RESET = struct.pack("ii", 1, 0)  # SO_LINGER of no seconds: closing sends RST instead of FIN


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="proxies", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@dataclass(eq=False)
class _Link:
    """One connection: the client's end and the server's."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    tasks: list["asyncio.Task[None]"] = field(default_factory=list)
    swallowing: bytes | None = None  # answers go nowhere until one holds this; then the connection is cut

    def cut(self) -> None:
        for writer in (self.client, self.server):
            if writer is not None and not writer.transport.is_closing():
                end: socket.socket = writer.get_extra_info("socket")
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                writer.transport.abort()


class Proxy:
    """Listens on a port of its own and passes everything on to `target`, as long as nobody interferes."""

    def __init__(self, loop: Loop, name: str, target: tuple[str, int]) -> None:
        self.name, self._target, self._loop = name, target, loop.loop
        self._links: set[_Link] = set()
        self._hearing = asyncio.Event()
        self._hearing.set()
        self._refusing = False
        self._delay_s = 0.0
        self._break_after: int | None = None  # bytes of the next chunk that still pass before the cut
        self._swallow: tuple[bytes, bytes] | None = None  # what a request holds, and what its answer holds
        self._hit = threading.Event()
        self.passed = 0  # pieces of data
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._accept, "127.0.0.1", 0), self._loop
        ).result(10)
        self.port: int = self._server.sockets[0].getsockname()[1]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def lead_to(self, target: tuple[str, int]) -> None:
        """From now on new connections go there; those that are open are reset."""
        self._target = target
        self.cut()

    # --- faults ---

    def cut(self) -> None:
        """Reset all connections; new ones are let through."""
        self._do(self._cut)

    def deafen(self) -> None:
        """Nothing passes either way any more, while connections stay open and are accepted: a dead network."""
        self._do(self._hearing.clear)

    def refuse(self, refusing: bool) -> None:
        """Reset all connections, and each new one at once: a server that is down."""

        def change() -> None:
            self._refusing = refusing
            if refusing:
                self._cut()

        self._do(change)

    def delay(self, seconds: float) -> None:
        """Every piece of data takes that much longer."""
        self._do(lambda: setattr(self, "_delay_s", seconds))

    def break_frame(self, after: int, within_s: float) -> bool:
        """Cut the connection on which data comes next, when `after` bytes of that have passed; False: none came."""
        self._hit.clear()
        self._do(lambda: setattr(self, "_break_after", after))
        return self._hit.wait(within_s)

    def lose_answer(self, request: bytes, answer: bytes, within_s: float) -> bool:
        """Wait for a request that holds `request`, swallow the server's answer up to `answer`, then cut the connection.

        So the server has done what it was asked for, and the client does not learn it. False: no such request came.
        """
        self._hit.clear()
        self._do(lambda: setattr(self, "_swallow", (request, answer)))
        return self._hit.wait(within_s)

    def heal(self) -> None:
        self._do(self._heal)

    def close(self) -> None:
        self._do(self._close)

    # --- on the loop ---

    def _do(self, what: Callable[[], None]) -> None:
        async def on_loop() -> None:
            what()

        asyncio.run_coroutine_threadsafe(on_loop(), self._loop).result(10)

    def _cut(self) -> None:
        for link in list(self._links):
            link.cut()

    def _heal(self) -> None:
        self._hearing.set()
        self._refusing = False
        self._delay_s, self._break_after, self._swallow = 0.0, None, None

    def _close(self) -> None:
        self._server.close()
        self._heal()
        self._cut()
        for link in list(self._links):
            for task in link.tasks:
                task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(writer)
        self._links.add(link)
        try:
            if self._refusing:
                return
            try:
                server_reader, link.server = await asyncio.open_connection(*self._target)
            except OSError:
                return
            link.tasks = [
                asyncio.ensure_future(self._pass(link, reader, link.server, from_client=True)),
                asyncio.ensure_future(self._pass(link, server_reader, writer, from_client=False)),
            ]
            await asyncio.wait(link.tasks)
        finally:
            link.cut()
            self._links.discard(link)

    async def _pass(
        self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, from_client: bool
    ) -> None:
        try:
            while data := await reader.read(CHUNK):
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                await self._hearing.wait()
                if self._break_after is not None:
                    writer.write(data[: self._break_after])
                    await writer.drain()
                    self._break_after = None
                    self._hit.set()
                    link.cut()
                    return
                if from_client:
                    if self._swallow and self._swallow[0] in data:
                        link.swallowing, self._swallow = self._swallow[1], None
                elif link.swallowing is not None:
                    if link.swallowing in data:
                        self._hit.set()
                        link.cut()
                        return
                    continue
                writer.write(data)
                await writer.drain()
                self.passed += 1
            if not writer.transport.is_closing():
                writer.write_eof()  # the sender has finished: the other end learns it, and may still answer
        except OSError:
            link.cut()
