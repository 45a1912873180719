"""Who looks. Within this machine nobody is asked; elsewhere everybody brings a token of the chain's identity provider.

It comes in the header `Authorization`, as a proxy that signs people in sends it, or in a cookie that `/sign-in` sets.
The services are asked with that token, so that their rules hold for this person, and what an operator does is on
record under the operator's own name.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from http.cookies import CookieError, SimpleCookie
from typing import NamedTuple

from chassis.identity import Caller
from chassis.tokens import Tokens

COOKIE = "__Host-retail-token"  # of this host alone, over TLS alone
COOKIE_SET = f"{COOKIE}={{}}; Path=/; Secure; HttpOnly; SameSite=Strict"


class Person(NamedTuple):
    token: str
    caller: Caller

    @property
    def name(self) -> str:
        return self.caller.name.rpartition("#")[2]

    @property
    def scope(self) -> tuple[object, ...]:
        """Who has the same may see the same."""
        return self.caller.role, self.caller.branch_id


_current: ContextVar[Person | None] = ContextVar("person", default=None)


def current() -> Person | None:
    """Who asks for what is being made; None where nobody is asked who they are."""
    return _current.get()


def set_current(person: Person | None) -> None:
    _current.set(person)


def scope() -> tuple[object, ...]:
    person = current()
    return person.scope if person else ()


def metadata() -> tuple[tuple[str, str], ...]:
    """What tells a service who asks."""
    person = current()
    return (("authorization", f"Bearer {person.token}"),) if person else ()


def of_request(headers: Mapping[str, str], tokens: Tokens) -> Person | None:
    """None for who brings no token, or none that is accepted."""
    kind, _, token = headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer":
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return None
        token = cookies[COOKIE].value if COOKIE in cookies else ""
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable():
        return None
    caller = tokens.caller(token)
    return Person(token, caller) if caller else None
