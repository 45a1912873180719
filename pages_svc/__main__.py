"""The command `retail-pages`, or `python -m pages_svc`: the wiring."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from chassis import cli, lifecycle, logs, metrics, settings, tls, tokens, traces
from chassis.errors import PortTaken
from pages_svc.live import Live
from pages_svc.operations.page import OperationsPage
from pages_svc.operations.state import StateReader
from pages_svc.owner.figures import Reader
from pages_svc.owner.page import OwnerPage
from pages_svc.settings import ServeSettings, check, served_with
from pages_svc.sign_in import SignIn
from pages_svc.till import assortment
from pages_svc.till.clients import Clients
from pages_svc.till.page import TillPage
from pages_svc.upstream.bell import Bell
from pages_svc.upstream.insides import Insides
from pages_svc.upstream.sales import Sales
from pages_svc.upstream.services import Services
from pages_svc.upstream.watch import Watch
from pages_svc.web import Guard, Static, Templates, on_error

TILL = "/till"
PAGES = {"/": "Sales", TILL: "Till", "/operations": "Operations"}
CONNECTIONS_MAX = 2_000  # more are answered with 503
DRAIN_TIMEOUT_S = 10  # for what is being answered when the process is told to stop

log = structlog.get_logger()


class _Server(uvicorn.Server):
    """Signals are `lifecycle`'s."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listening(address: str) -> socket.socket:
    """Raises PortTaken: the address is in use."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        return socket.create_server((host, int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise PortTaken(f"cannot listen on {address}: {error.strerror}") from error


async def serve(config: ServeSettings, stop: asyncio.Event) -> None:
    """Serve until `stop`, then answer what has been asked."""
    credentials, accepted = tls.credentials(config), tokens.tokens(config)
    check(config, tokens=accepted is not None, certified=credentials is not None)
    services = Services(config, credentials)
    watch, static = Watch(services), Static()
    # Who is somebody's till shows a certificate, not a token: beyond this machine there is no till among the pages.
    templates = Templates(static, PAGES if accepted is None else {name: PAGES[name] for name in PAGES if name != TILL})
    sales, insides = Sales(services), Insides(services)
    reader = Reader(sales, watch)
    owner = OwnerPage(reader, watch, templates)
    operations = OperationsPage(StateReader(sales, insides, reader, watch), insides, templates)
    owner.live = Live(owner.render, watch.bell, static.version, viewers_max=config.viewers_max)
    operations.live = Live(operations.render, watch.bell, static.version, viewers_max=config.viewers_max)

    certificates = Path(config.till_certificates) if config.till_certificates else None
    clients = Clients(lambda: services.cells, credentials, certificates)
    journals = Path(config.journals) if config.journals and accepted is None else None
    till = TillPage(clients, assortment.sample(), templates, reader.zone, journals)
    till.live = Live(till.render, Bell(), static.version, viewers_max=config.viewers_max)

    async def health(_: Request) -> PlainTextResponse:
        return PlainTextResponse("SERVING\n")

    app = Starlette(
        routes=[
            *owner.routes(),
            *(till.routes() if accepted is None else SignIn(accepted, templates).routes()),
            *operations.routes(),
            Route("/static/{name:path}", static.answer),
            Route("/health", health),
        ],
        exception_handlers={HTTPException: on_error(templates)},
    )
    certificate_file, key_file = served_with(config)
    server = _Server(
        uvicorn.Config(
            Guard(app, templates, accepted),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS_MAX,
            timeout_graceful_shutdown=DRAIN_TIMEOUT_S,
            ssl_certfile=certificate_file,
            ssl_keyfile=key_file,
        )
    )
    try:
        with listening(config.listen) as listener:
            lives = (owner.live, operations.live, till.live)
            work = [watch.run(), till.run(), services.follow(), *(live.run() for live in lives)]
            if accepted is not None:
                work.append(accepted.keys.follow(accepted.forget))
            async with metrics.serving_metrics(config.metrics_listen), lifecycle.beside(*work):
                await _serve_until(server, listener, stop, *(live.drain for live in lives))
    finally:
        till.close()
        await services.close()
    log.info("stopped")


async def _serve_until(
    server: _Server, listener: socket.socket, stop: asyncio.Event, *drains: Callable[[], None]
) -> None:
    serving = asyncio.create_task(server.serve([listener]))
    stopping = asyncio.create_task(stop.wait())
    log.info("serving", listen=listener.getsockname()[:2])
    await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    for drain in drains:
        drain()
    server.should_exit = True
    await serving


commands = cli.Commands(
    "retail-pages",
    "The pages for people: the owner's numbers as they change.",
    {"serve": (ServeSettings, "pages")},
    failures=(PortTaken,),
)


@commands.command("serve")
def _serve() -> None:
    """Serve the pages until SIGTERM."""
    config = settings.load(ServeSettings)
    logs.configure("pages", config.log_level)
    with traces.exported(config, "pages"):
        lifecycle.run(lambda stop: serve(config, stop))


main = commands.run

if __name__ == "__main__":
    main()
