"""Who calls. A certificate says so by its one URI, in the form of SPIFFE, within the chain's trust domain:

    spiffe://retail.example/branch/12/till/POS-3      …/branch/12/manager/anna
    spiffe://retail.example/reader/hq                 …/operator/kim                …/service/consumer

Whatever else the certificate holds is not looked at. People and services may have tokens instead: `tokens.py`. Where
there are no certificates, as on a developer's machine, callers are known by their connections only.
"""

import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import NamedTuple

ROLES = ("till", "manager", "reader", "operator", "service")
OF_A_BRANCH = ("till", "manager")
CALLERS_MAX = 20_000  # remembered by their URIs, half a kilobyte each

_NAME = r"(?!\.{1,2}(?:/|$))[A-Za-z0-9._-]{1,64}"  # SPIFFE: no path segment is `.` or `..`
_PATH = re.compile(
    rf"/branch/(?P<branch>[1-9][0-9]{{0,9}})/(?P<kind>{'|'.join(OF_A_BRANCH)})/(?P<name>{_NAME})"
    rf"|/(?P<role>reader|operator|service)/(?P<of_chain>{_NAME})"
)


class Caller(NamedTuple):
    """`name` is what records show and what is counted: the URI, or the connection of a caller without one."""

    name: str
    role: str = ""  # one of ROLES; empty: not known, and not asked for
    branch_id: int | None = None  # None: of the whole chain
    pos_id: str | None = None  # of a till
    until: float | None = None  # Unix time at which its token ends
    path: str = ""  # of its URI, within the trust domain; empty for who has a token
    service: str = ""  # its name, if it is one


NOBODY = Caller("")
_current: ContextVar[Caller] = ContextVar("caller", default=NOBODY)


def current() -> Caller:
    """Who made the call that is being answered."""
    return _current.get()


def set_current(caller: Caller) -> None:
    _current.set(caller)


def of_uri(uri: str, trust_domain: str) -> Caller | None:
    """None for what is no identity of ours."""
    prefix = f"spiffe://{trust_domain}"
    match = _PATH.fullmatch(uri, len(prefix)) if uri.startswith(prefix) else None
    if match is None:
        return None
    if match["role"]:
        return Caller(
            uri, match["role"], path=match[0], service=match["of_chain"] if match["role"] == "service" else ""
        )
    pos_id = match["name"] if match["kind"] == "till" else None
    return Caller(uri, match["kind"], int(match["branch"]), pos_id, path=match[0])


class Certificates:
    """Reads callers from what gRPC knows of their verified certificates."""

    def __init__(self, trust_domain: str) -> None:
        self._trust_domain = trust_domain
        self._known: dict[bytes, Caller | None] = {}

    def caller(self, connection: Mapping[str, Sequence[bytes]]) -> Caller | None:
        """Of a connection's `auth_context`; None unless there is exactly one URI, and an identity of ours."""
        uris = connection.get("peer_uri", ())
        if len(uris) != 1:
            return None
        uri = uris[0]
        if uri not in self._known:
            if len(self._known) >= CALLERS_MAX:
                self._known.clear()
            self._known[uri] = of_uri(uri.decode(errors="replace"), self._trust_domain)
        return self._known[uri]
