"""The gate of a server: who calls, and whether the contract permits it. Denied is whatever no rule permits.

Every refusal has the same text, whether what was asked for exists or not, and is on record; so is each change that an
operator makes, before it is done.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import structlog
from google.protobuf import text_format
from prometheus_client import Counter

from chassis import identity, tokens
from chassis.errors import AccessRefused, PermissionDenied, RateExceeded, Unauthenticated
from chassis.followed import Followed
from chassis.identity import Caller
from chassis.logs import Sampled
from chassis.rates import Rates
from chassis.rules import Rule
from chassis.settings import SettingsError, integer, setting, switch, text
from chassis.tokens import Tokens, TokenSettings

CERTIFICATE = "x509_pem_cert"  # gRPC's name for the one that a caller showed
REQUEST_TEXT_MAX = 1_000  # characters of a change that is put on record

REFUSED = Counter(
    "grpc_server_access_refused_total", "Calls refused for who made them.", ["grpc_service", "grpc_method", "what"]
)

log = structlog.get_logger()
_refusals = Sampled("warning", "access refused")
_hasty = Sampled("warning", "a caller makes more calls than one may")


def trust_domain(raw: str) -> str:
    if not re.fullmatch(r"[a-z0-9._-]{1,255}", raw):
        raise ValueError("must be small letters, digits, points, hyphens and underscores, such as retail.example")
    return raw


@dataclass(frozen=True, kw_only=True)
class AccessSettings(TokenSettings):
    """Of every server."""

    trust_domain: str = setting(
        "TRUST_DOMAIN", trust_domain, "name", "of the chain, in the URIs of certificates", default="retail.example"
    )
    banned_file: str = setting(
        "TLS_BANNED_FILE",
        text,
        "path",
        "of a list of URIs, one a line, that are refused though their certificates are valid; followed without restart",
        default="",
    )
    calls_per_s: int = setting(
        "CALLER_CALLS_PER_S",
        integer(0, 1_000_000),
        "calls/s",
        "of one caller who is known, with twice as many at once; more are refused with RATE_EXCEEDED, and messages of "
        "streams wait; each process counts for itself; 0: no limit",
        default=500,
    )
    reflection: bool = setting(
        "GRPC_REFLECTION", switch, "0 or 1", "1: operators may ask a server for its contract", default=True
    )


def banned_names(said: str) -> frozenset[str]:
    """One a line; `#` after a space begins a comment."""
    lines = (re.split(r"(?:^|\s)#", line)[0].strip() for line in said.splitlines())
    return frozenset(filter(None, lines))


class Gate:
    """Decides for one server who is let in. Without `certificates` nobody knows who calls: everything is permitted."""

    def __init__(
        self,
        certificates: identity.Certificates | None = None,
        tokens: Tokens | None = None,
        bans: Followed[frozenset[str]] | None = None,
        rates: Rates | None = None,
    ) -> None:
        self._rates = rates
        self._certificates, self._tokens, self._bans = certificates, tokens, bans
        self._open: dict[asyncio.Timeout, str] = {}  # streams, by the names of their callers

    def admit(self, rule: Rule, context: Any) -> Caller:
        """Who calls, before anything of the request is read.

        Raises:
            Unauthenticated, PermissionDenied, RateExceeded
        """
        if self._certificates is None:
            caller = Caller(context.peer())
        else:
            caller = self._known(self._certificates, rule, context)
            if not rule.permits(caller):
                raise _on_record(PermissionDenied(), rule, caller.name, "role")
            if self._rates and self._rates.pause_s(caller.name):
                _hasty(caller.name, caller=caller.name, method=rule.method)
                raise RateExceeded("this caller makes more calls than one may; come again a little later")
        identity.set_current(caller)
        return caller

    def _known(self, certificates: identity.Certificates, rule: Rule, context: Any) -> Caller:
        connection = context.auth_context()
        caller = certificates.caller(connection)
        token = _bearer(context) if self._tokens else None
        if caller is None and (token is None or CERTIFICATE in connection):
            raise _on_record(Unauthenticated(), rule, context.peer(), "identity", uris=_shown(connection))
        if caller is not None:  # also if it brings a token
            self._require_accepted(rule, caller)
        if self._tokens and token is not None:
            brought_by = caller.name if caller else context.peer()
            caller = self._tokens.caller(token)
            if caller is None:
                raise _on_record(Unauthenticated(), rule, brought_by, "token")
            self._require_accepted(rule, caller)
        assert caller is not None
        return caller

    @property
    def knows_callers(self) -> bool:
        """Not in plaintext: there, callers are not known, and may do everything."""
        return self._certificates is not None

    def check(self, rule: Rule, caller: Caller, request: Any) -> None:
        """Whether a request is for this caller. It is then put on record, if it is an operator's change.

        Raises:
            Unauthenticated: the caller was banned meanwhile, or its token has ended.
            PermissionDenied
        """
        if self._certificates is None:
            return
        self._require_accepted(rule, caller)
        if what := rule.oversteps(caller, request):
            raise _on_record(PermissionDenied(), rule, caller.name, what)
        if rule.changes and caller.role == "operator":
            asked = text_format.MessageToString(request, as_one_line=True)[:REQUEST_TEXT_MAX]
            log.warning("change by an operator", audit=True, caller=caller.name, method=rule.method, request=asked)

    async def in_turn(self, caller: Caller) -> None:
        """Wait until another message of a caller's stream may be read."""
        if self._rates and (pause_s := self._rates.pause_s(caller.name, will_wait=True)):
            await asyncio.sleep(pause_s)

    @asynccontextmanager
    async def while_accepted(self, rule: Rule, caller: Caller) -> AsyncIterator[None]:
        """The time of a stream: it ends as soon as its caller is banned, or with its caller's token.

        Raises:
            Unauthenticated
        """
        if self._certificates is None:
            yield
            return
        limit = asyncio.timeout(None if caller.until is None else max(caller.until - time.time(), 0))
        try:
            async with limit:
                self._open[limit] = caller.name
                self._require_accepted(rule, caller)  # it may have been banned on the way here
                yield
        except TimeoutError:
            if limit.expired():
                self._require_accepted(rule, caller)
                raise _on_record(Unauthenticated(), rule, caller.name, "expired") from None
            raise
        finally:
            self._open.pop(limit, None)

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Take in changes of the files while the block lasts."""
        tasks = []
        if self._bans is not None:
            tasks.append(asyncio.create_task(self._bans.follow(self._end_banned)))
        if self._tokens is not None:
            tasks.append(asyncio.create_task(self._tokens.keys.follow(self._tokens.forget)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()

    def _end_banned(self) -> None:
        assert self._bans is not None
        log.warning("bans have changed", audit=True, banned=len(self._bans.value))
        now = asyncio.get_running_loop().time()
        for limit, name in self._open.items():
            if name in self._bans.value and not limit.expired():
                limit.reschedule(now)

    def _require_accepted(self, rule: Rule, caller: Caller) -> None:
        if self._bans is not None and caller.name in self._bans.value:
            raise _on_record(Unauthenticated(), rule, caller.name, "banned")
        if caller.until is not None and caller.until <= time.time():
            raise _on_record(Unauthenticated(), rule, caller.name, "expired")


def gate(config: AccessSettings, *, certificates: bool) -> Gate:
    """As the settings have it; without `certificates` of the server's own, nobody is asked.

    Raises:
        SettingsError
    """
    accepted = tokens.tokens(config)
    if certificates:
        bans = Followed("TLS_BANNED_FILE", config.banned_file, banned_names) if config.banned_file else None
        rates = Rates(config.calls_per_s) if config.calls_per_s else None
        return Gate(identity.Certificates(config.trust_domain), accepted, bans, rates)
    problems = []
    if accepted:
        problems.append("JWT_ISSUER is set, but no certificate: tokens must not travel in plaintext")
    if config.banned_file:
        problems.append("TLS_BANNED_FILE is set, but no certificate: without them, nobody would be recognised")
    if problems:
        raise SettingsError(problems)
    return Gate()


def _bearer(context: Any) -> str | None:
    """The token that comes with a call; empty for what is none."""
    brought = [value for name, value in context.invocation_metadata() or () if name == "authorization"]
    if not brought:
        return None
    kind, _, token = brought[0].partition(" ")
    return token.strip() if len(brought) == 1 and kind.lower() == "bearer" else ""


def _on_record(error: AccessRefused, rule: Rule, caller: str, what: str, **more: Any) -> AccessRefused:
    _, service, method = rule.method.split("/")
    REFUSED.labels(service, method, what).inc()
    known = "" if what == "identity" else caller  # connections are as many as somebody makes
    _refusals((rule.method, known, what), audit=True, method=rule.method, caller=caller, what=what, **more)
    return error


def _shown(connection: Mapping[str, Any]) -> list[str]:
    return [uri[:100].decode(errors="replace") for uri in connection.get("peer_uri", ())][:3]
