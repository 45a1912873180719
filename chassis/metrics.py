"""The page that Prometheus reads, from a thread of its own: over few connections, none of which can be held."""

import asyncio
import importlib.metadata
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import Gauge, make_wsgi_app

from chassis.errors import PortTaken

CONNECTIONS_MAX = 8  # at once; more are closed unanswered, and Prometheus comes again
TIMEOUT_S = 5.0  # for a request to come, and for its answer to be taken

BUILD = Gauge("retail_build_info", "Always 1; the labels say what runs.", ["version"])


class _Handler(WSGIRequestHandler):
    timeout = TIMEOUT_S  # of each read and write

    def log_message(self, *args: Any) -> None:
        """A scrape is no event."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._room = threading.BoundedSemaphore(CONNECTIONS_MAX)
        super().__init__(*args, **kwargs)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            request.settimeout(TIMEOUT_S)
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever does not ask, or does not read, has gone."""


@asynccontextmanager
async def serving_metrics(address: str) -> AsyncIterator[None]:
    """Answer Prometheus on `address` while the block lasts.

    Raises:
        PortTaken: the address is in use.
    """
    host, _, port = address.rpartition(":")
    try:
        server = make_server(host, int(port), make_wsgi_app(), _Server, _Handler)
    except OSError as error:
        raise PortTaken(f"cannot listen on {address} (metrics): {error.strerror}") from error
    BUILD.labels(importlib.metadata.version("retail-backbone")).set(1)
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        thread.join()
