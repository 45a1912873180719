"""Who may call what. The contracts say it, by an option of each method; here they are held to it: denied is whatever
no rule permits, and no server starts with a method that has no rule.

`Gate` knows who calls, and decides. Every refusal has the same text, whether what was asked for exists or not, and is
on record; so is each change that an operator makes, before it is done.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import structlog
from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.message import Message
from prometheus_client import Counter

from chassis import identity
from chassis.errors import AccessRefused, PermissionDenied, Unauthenticated
from chassis.identity import OF_A_BRANCH, ROLES, Caller
from chassis.logs import Sampled
from chassis.settings import SettingsError, setting, switch, text
from retail.access.v1 import access_pb2

BANS_EVERY_S = 2.0
REQUEST_TEXT_MAX = 1_000  # characters of a change that is put on record

REFUSED = Counter("grpc_server_access_refused_total", "Calls refused for who made them.", ["grpc_method", "what"])

# What gRPC's own packages bring has no rules of ours in its contract.
RULES_OF_OTHERS: Mapping[str, tuple[str, ...]] = {
    "grpc.health.v1.Health": ROLES,
    "grpc.reflection.v1.ServerReflection": ("operator",),
    "grpc.reflection.v1alpha.ServerReflection": ("operator",),
}

log = structlog.get_logger()
_refusals = Sampled("warning", "access refused")

Field = tuple[FieldDescriptor, ...]  # the way to a field, through the messages around it


class RuleMissing(Exception):
    """Methods that nobody has decided about. The server cannot start."""


class Rule(NamedTuple):
    """Of one method."""

    method: str  # /package.Service/Method
    roles: frozenset[str]
    branches: tuple[Field, ...] = ()  # what in a request must be the caller's branch, if the caller has one
    tills: tuple[Field, ...] = ()  # and its till
    names_one: bool = False  # a request that names no branch means them all
    changes: bool = False  # something

    def oversteps(self, caller: Caller, request: Any) -> str:
        """What a request is about that is not the caller's: `branch` or `till`; empty when nothing is."""
        if caller.role not in OF_A_BRANCH:
            return ""
        named = [branch for field in self.branches for branch in _values(request, field)]
        if any(branch != caller.branch_id for branch in named) or (self.names_one and not named):
            return "branch"
        if any(pos_id != caller.pos_id for field in self.tills for pos_id in _values(request, field)):
            return "till"
        return ""


def rules_of(services: Iterable[str]) -> dict[str, Rule]:
    """The rule of every method of these services, by `/package.Service/Method`.

    Raises:
        RuleMissing: naming each method that has none, or one that cannot be kept.
    """
    rules, missing = {}, []
    for service in services:
        others = RULES_OF_OTHERS.get(service)
        for method in descriptor_pool.Default().FindServiceByName(service).methods:
            name = f"/{service}/{method.name}"
            rule = Rule(name, frozenset(others)) if others else _rule(name, method)
            if rule is None:
                missing.append(name)
            else:
                rules[name] = rule
    if missing:
        raise RuleMissing(f"methods without a retail.access.v1.rule that can be kept: {', '.join(missing)}")
    return rules


def _rule(name: str, method: MethodDescriptor) -> Rule | None:
    options = method.GetOptions()
    said = options.Extensions[access_pb2.rule]
    roles = frozenset(access_pb2.Role.Name(role).removeprefix("ROLE_").lower() for role in said.roles)
    if not roles <= set(ROLES):
        return None
    branches = tuple(_fields(method.input_type, ("branch_id", "branch_ids")))
    tills = tuple(_fields(method.input_type, ("pos_id",)))
    changes = options.idempotency_level != MethodOptions.NO_SIDE_EFFECTS
    match said.binding:
        case access_pb2.BINDING_ANY | access_pb2.BINDING_FINDS_OWN_BRANCH:
            return Rule(name, roles, changes=changes)
        case access_pb2.BINDING_NAMES_OWN_BRANCH if branches:
            return Rule(name, roles, branches, names_one=True, changes=changes)
        case access_pb2.BINDING_NAMES_OWN_TILL if branches and tills:
            return Rule(name, roles, branches, tills, changes=changes)
        case _:
            return None


def _fields(kind: Descriptor, names: tuple[str, ...], around: Field = ()) -> Iterator[Field]:
    """The fields of a message, or of the messages in it, that have one of the names."""
    for field in kind.fields:
        way = (*around, field)
        if field.name in names:
            yield way
        elif field.message_type is not None and len(way) < 8:  # a message may hold its own kind
            yield from _fields(field.message_type, names, way)


def _values(request: Message, way: Field) -> Iterator[Any]:
    """What a request has there. An optional field that is not given has no value, any other has its default."""
    field, *rest = way
    value = getattr(request, field.name)
    if field.is_repeated:
        for each in value:
            if rest:
                yield from _values(each, tuple(rest))
            else:
                yield each
    elif rest:
        yield from _values(value, tuple(rest))
    elif not field.has_presence or request.HasField(field.name):
        yield value


@dataclass(frozen=True, kw_only=True)
class AccessSettings:
    """Of every server."""

    trust_domain: str = setting(
        "TRUST_DOMAIN", text, "name", "of the chain, in the URIs of certificates", default="retail.example"
    )
    banned_file: str = setting(
        "TLS_BANNED_FILE",
        text,
        "path",
        "of a list of URIs, one a line, that are refused though their certificates are valid; followed without restart",
        default="",
    )
    reflection: bool = setting(
        "GRPC_REFLECTION", switch, "0 or 1", "1: operators may ask a server for its contract", default=True
    )


class Bans:
    """A file of names that are refused, one a line; `#` begins a comment. Replace it by another, as `mv` does."""

    def __init__(self, path: str) -> None:
        """Raises SettingsError: there is no such file."""
        self._path = Path(path)
        try:
            self.names = self._read()
        except (OSError, ValueError) as error:
            raise SettingsError([f"TLS_BANNED_FILE={path}: {error}"]) from None

    def _read(self) -> frozenset[str]:
        lines = (line.partition("#")[0].strip() for line in self._path.read_text(encoding="utf-8").splitlines())
        return frozenset(filter(None, lines))

    async def follow(self, on_change: Callable[[], None]) -> None:
        """Until it is cancelled. While the file cannot be read, the bans before stay in force."""
        readable = True
        while True:
            await asyncio.sleep(BANS_EVERY_S)
            try:
                names = await asyncio.to_thread(self._read)
            except (OSError, ValueError) as error:
                if readable:
                    log.error("the bans cannot be read; those before stay in force", path=str(self._path), error=error)
                readable = False
                continue
            readable = True
            if names != self.names:
                added, lifted = sorted(names - self.names), sorted(self.names - names)
                log.warning("bans have changed", audit=True, banned=added, lifted=lifted)
                self.names = names
                on_change()


class Gate:
    """Decides for one server who is let in. Without `certificates` nobody knows who calls: everything is permitted."""

    def __init__(self, certificates: identity.Certificates | None = None, bans: Bans | None = None) -> None:
        self._certificates, self._bans = certificates, bans
        self._open: dict[asyncio.Timeout, str] = {}  # streams, by the names of their callers

    def admit(self, rule: Rule, context: Any) -> Caller:
        """Who calls, before anything of the request is read.

        Raises:
            Unauthenticated, PermissionDenied
        """
        if self._certificates is None:
            caller = Caller(context.peer())
        else:
            connection = context.auth_context()
            known = self._certificates.caller(connection)
            if known is None:
                raise _on_record(Unauthenticated(), rule, context.peer(), "identity", uris=_shown(connection))
            caller = known
            self._require_accepted(rule, caller)
            if caller.role not in rule.roles:
                raise _on_record(PermissionDenied(), rule, caller.name, "role")
        identity.set_current(caller)
        return caller

    def check(self, rule: Rule, caller: Caller, request: Any) -> None:
        """Whether a request is for this caller. It is then put on record, if it is an operator's change.

        Raises:
            Unauthenticated: the caller was banned meanwhile.
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

    @asynccontextmanager
    async def while_accepted(self, rule: Rule, caller: Caller) -> AsyncIterator[None]:
        """The time of a stream: it ends as soon as its caller is banned.

        Raises:
            Unauthenticated
        """
        if self._bans is None:
            yield
            return
        limit = asyncio.timeout(None)
        try:
            async with limit:
                self._open[limit] = caller.name
                self._require_accepted(rule, caller)  # it may have been banned on the way here
                yield
        except TimeoutError:
            if limit.expired():
                raise _on_record(Unauthenticated(), rule, caller.name, "banned") from None
            raise
        finally:
            self._open.pop(limit, None)

    async def follow(self) -> None:
        """Follow the bans until it is cancelled."""
        if self._bans is not None:
            await self._bans.follow(self._end_banned)

    def _end_banned(self) -> None:
        now = asyncio.get_running_loop().time()
        for limit, name in self._open.items():
            if self._bans is not None and name in self._bans.names and not limit.expired():
                limit.reschedule(now)

    def _require_accepted(self, rule: Rule, caller: Caller) -> None:
        if self._bans is not None and caller.name in self._bans.names:
            raise _on_record(Unauthenticated(), rule, caller.name, "banned")


def _on_record(error: AccessRefused, rule: Rule, caller: str, what: str, **more: Any) -> AccessRefused:
    REFUSED.labels(rule.method, what).inc()
    known = "" if what == "identity" else caller  # connections are as many as somebody makes
    _refusals((rule.method, known, what), audit=True, method=rule.method, caller=caller, what=what, **more)
    return error


def _shown(connection: Mapping[str, Any]) -> list[str]:
    return [uri[:100].decode(errors="replace") for uri in connection.get("peer_uri", ())][:3]
