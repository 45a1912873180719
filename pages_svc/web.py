"""What every page is made with: templates, files for the browser, headers, and what is refused before any page."""

import hashlib
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

import jinja2
import structlog
from markupsafe import Markup
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chassis.plaintext import is_local
from chassis.tokens import Tokens
from pages_svc import person, words
from pages_svc.upstream.services import Problem

FORM_BYTES_MAX = 64 << 10
FOR_ANYBODY = ("/static/", "/health", "/sign-in")
STATIC_LASTS_S = 31_536_000  # its address changes with its content

# No code and no style but our own files; nobody frames us, and forms go nowhere else.
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

log = structlog.get_logger()


class Static:
    """The files for the browser, read once. A file's address has a hash of its content in it."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[bytes, str]] = {}
        self._addresses: dict[str, str] = {}
        for file in resources.files("pages_svc").joinpath("static").iterdir():
            content, kind = file.read_bytes(), TYPES[PurePath(file.name).suffix]
            name = f"{hashlib.sha256(content).hexdigest()[:12]}/{file.name}"
            self._files[name], self._addresses[file.name] = (content, kind), f"/static/{name}"
        self.version = hashlib.sha256("".join(sorted(self._files)).encode()).hexdigest()[:12]

    def address(self, name: str) -> str:
        return self._addresses[name]

    async def answer(self, request: Request) -> Response:
        found = self._files.get(request.path_params["name"])
        if found is None:
            raise HTTPException(404)
        content, kind = found
        return Response(content, media_type=kind, headers={"cache-control": f"max-age={STATIC_LASTS_S}, immutable"})


class Templates:
    """Renders; whatever a template does not know is an error, and whatever is no markup is escaped."""

    def __init__(self, static: Static, pages: Mapping[str, str]) -> None:
        """`pages` are the addresses of the navigation, and their names."""
        self._environment = jinja2.Environment(
            loader=jinja2.PackageLoader("pages_svc"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._environment.globals |= {
            "static": static.address,
            "version": static.version,
            "pages": pages,
            "words": words,
            "person": person.current,
        }
        for name in self._environment.list_templates():  # now, and not while the first one looks
            self._environment.get_template(name)

    def page(self, name: str, *, status: int = 200, **values: Any) -> HTMLResponse:
        text = self._environment.get_template(name).render(values)
        return HTMLResponse(text, status, headers={"cache-control": "no-store"})

    def part(self, name: str, **values: Any) -> Markup:
        return Markup(self._environment.get_template(name).render(values))  # noqa: S704 # it is escaped already

    def problem(self, problem: Problem, path: str, status: int = 503) -> HTMLResponse:
        return self.page("problem.html", status=status, path=path, title="No answer", problem=problem)


class Guard:
    """Before any page: refuses whom a browser sends here from elsewhere; adds the headers; turns bugs into a page."""

    def __init__(self, app: ASGIApp, templates: Templates, tokens: Tokens | None = None) -> None:
        """Without `tokens` nobody is asked who they are: then only this machine's own names are called here, so that no
        name of somebody's leads here."""
        self._app, self._templates, self._tokens = app, templates, tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        refusal = self._refusal(scope)
        try:
            await (refusal or self._app)(scope, receive, send_with_headers)
        except Exception as error:
            log.exception("a page has a fault", path=scope["path"], error=error)
            if not begun:
                fault = Problem("This page has a fault.", "It is in the log of retail-pages. Nothing was changed.")
                await self._templates.problem(fault, scope["path"], 500)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        person.set_current(person.of_request(headers, self._tokens) if self._tokens else None)
        if self._tokens is None and not is_local(re.sub(r":\d+$", "", host)):
            return PlainTextResponse("Call this machine by its own name: 127.0.0.1 or localhost.\n", 421)
        if self._tokens and person.current() is None and not scope["path"].startswith(FOR_ANYBODY):
            return self._templates.page("sign_in.html", status=401, path="/sign-in", title="Sign in", refused=False)
        if scope["method"] in ("GET", "HEAD"):
            return None
        origin = headers.get("origin", "")
        if urlsplit(origin).netloc != host or not host:
            return PlainTextResponse("This was sent from another site, or by something that is no browser.\n", 403)
        if int(headers.get("content-length") or -1) not in range(FORM_BYTES_MAX + 1):
            return PlainTextResponse(f"A form has at most {FORM_BYTES_MAX:,} bytes.\n", 413)
        return None


def on_error(templates: Templates) -> Any:
    """Answers what Starlette refuses by itself."""

    async def answer(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        if error.status_code == 404:
            missing = Problem("There is no such page.", "The pages that there are stand above.")
            return templates.page("problem.html", status=404, path=path, title="No such page", problem=missing)
        return PlainTextResponse(f"{error.detail}\n", error.status_code, headers=error.headers)

    return answer
