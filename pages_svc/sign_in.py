"""`/sign-in` and `/sign-out`, for who has a token, where no proxy in front of the pages sends it."""

from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from chassis.tokens import Tokens
from pages_svc.person import COOKIE_SET, of_request
from pages_svc.web import Templates

FIELDS_MAX = 4


class SignIn:
    """The routes."""

    def __init__(self, tokens: Tokens, templates: Templates) -> None:
        self._tokens, self._templates = tokens, templates

    def routes(self) -> list[Route]:
        return [
            Route("/sign-in", self.show),
            Route("/sign-in", self.enter, methods=["POST"]),
            Route("/sign-out", self.leave, methods=["POST"]),
        ]

    async def show(self, _: Request) -> Response:
        return self._templates.page("sign_in.html", path="/sign-in", title="Sign in", refused=False)

    async def enter(self, request: Request) -> Response:
        form = dict(parse_qsl((await request.body()).decode(errors="replace"), max_num_fields=FIELDS_MAX))
        token = form.get("token", "").strip()
        if of_request({"authorization": f"Bearer {token}"}, self._tokens) is None:
            return self._templates.page("sign_in.html", status=401, path="/sign-in", title="Sign in", refused=True)
        return RedirectResponse("/", 303, headers={"set-cookie": COOKIE_SET.format(token)})

    async def leave(self, _: Request) -> Response:
        return RedirectResponse("/sign-in", 303, headers={"set-cookie": f"{COOKIE_SET.format('')}; Max-Age=0"})
