"""Who may call what, as the contracts say by an option of each method: `proto/retail/access/v1/access.proto`.

No server starts with a method that has no rule, or one that cannot be kept.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions

from chassis.identity import OF_A_BRANCH, ROLES, Caller
from retail.access.v1 import access_pb2

# What gRPC's own packages bring has no rules of ours in its contract.
RULES_OF_OTHERS: Mapping[str, tuple[str, ...]] = {
    "grpc.health.v1.Health": ROLES,
    "grpc.reflection.v1.ServerReflection": ("operator",),
    "grpc.reflection.v1alpha.ServerReflection": ("operator",),
}

Field = tuple[FieldDescriptor, ...]  # the way to a field, through the messages around it
Reader = Callable[[Any], Iterable[Any]]  # what a request has there


class RuleMissing(Exception):
    """Methods that nobody has decided about. The server cannot start."""


class Rule(NamedTuple):
    """Of one method."""

    method: str  # /package.Service/Method
    roles: frozenset[str]
    branches: tuple[Reader, ...] = ()  # what in a request must be the caller's branch, if the caller has one
    tills: tuple[Reader, ...] = ()  # and its till
    names_one: bool = False  # a request that names no branch means them all
    changes: bool = False  # something
    reserved: tuple[tuple[Reader, str], ...] = ()  # what only one caller may set, and the path of its URI
    services: frozenset[str] = frozenset()  # of services, only these; empty: all

    def permits(self, caller: Caller) -> bool:
        """Whether such a caller may call it at all."""
        return caller.role in self.roles and (
            caller.role != "service" or not self.services or caller.service in self.services
        )

    def oversteps(self, caller: Caller, request: Any) -> str:
        """What a request is about that is not the caller's: `branch`, `till` or `field`; empty when nothing is."""
        if any(path != caller.path and any(read(request)) for read, path in self.reserved):
            return "field"
        if caller.role not in OF_A_BRANCH:
            return ""
        named = {branch for read in self.branches for branch in read(request)}
        if named - {caller.branch_id} or (self.names_one and not named):
            return "branch"
        if {pos_id for read in self.tills for pos_id in read(request)} - {caller.pos_id}:
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
    services = frozenset(said.services)
    if not roles <= set(ROLES) or (services and "service" not in roles):
        return None
    branches = tuple(map(_reader, _fields(method.input_type, ("branch_id", "branch_ids"))))
    tills = tuple(map(_reader, _fields(method.input_type, ("pos_id",))))
    changes = options.idempotency_level != MethodOptions.NO_SIDE_EFFECTS
    reserved = tuple((_reader(way), path) for way, path in _reserved(method.input_type))
    rule = Rule(name, roles, changes=changes, reserved=reserved, services=services)
    match said.binding:
        case access_pb2.BINDING_ANY | access_pb2.BINDING_FINDS_OWN_BRANCH:
            return rule
        case access_pb2.BINDING_NAMES_OWN_BRANCH if branches:
            return rule._replace(branches=branches, names_one=True)
        case access_pb2.BINDING_NAMES_OWN_TILL if branches and tills:
            return rule._replace(branches=branches, tills=tills)
        case _:
            return None


def _fields(kind: Descriptor, names: tuple[str, ...]) -> Iterator[Field]:
    """The fields of a message, or of the messages in it, that have one of the names."""
    return (way for way in _ways(kind) if way[-1].name in names)


def _reserved(kind: Descriptor) -> Iterator[tuple[Field, str]]:
    """The fields that only one caller may set, and who that is."""
    for way in _ways(kind):
        if path := way[-1].GetOptions().Extensions[access_pb2.only_for]:
            yield way, path


def _ways(kind: Descriptor, around: Field = ()) -> Iterator[Field]:
    """To every field of a message, and of the messages in it."""
    for field in kind.fields:
        way = (*around, field)
        yield way
        if field.message_type is not None and len(way) < 8:  # a message may hold its own kind
            yield from _ways(field.message_type, way)


def _reader(way: Field) -> Reader:
    """Reads a field of a request; made once, for speed. An optional field that is not given has no value, any other has
    its default.
    """
    for depth, field in enumerate(way[:-1]):
        if field.is_repeated:
            messages, of_each = _attribute(way[: depth + 1]), _reader(way[depth + 1 :])
            return lambda request: chain.from_iterable(map(of_each, messages(request)))
    value, field = _attribute(way), way[-1]
    if field.is_repeated:
        return value
    if not field.has_presence:
        return lambda request: (value(request),)
    holder = _attribute(way[:-1]) if way[:-1] else lambda request: request
    return lambda request: (value(request),) if holder(request).HasField(field.name) else ()


def _attribute(way: Field) -> Callable[[Any], Any]:
    return attrgetter(".".join(field.name for field in way))
