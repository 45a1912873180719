"""Who may call what, as the contracts say by an option of each method: `proto/retail/access/v1/access.proto`.

No server starts with a method that has no rule, or one that cannot be kept.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.message import Message

from chassis.identity import OF_A_BRANCH, ROLES, Caller
from retail.access.v1 import access_pb2

# What gRPC's own packages bring has no rules of ours in its contract.
RULES_OF_OTHERS: Mapping[str, tuple[str, ...]] = {
    "grpc.health.v1.Health": ROLES,
    "grpc.reflection.v1.ServerReflection": ("operator",),
    "grpc.reflection.v1alpha.ServerReflection": ("operator",),
}

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
    reserved: tuple[tuple[Field, str], ...] = ()  # what only one caller may set, and the path of its URI

    def oversteps(self, caller: Caller, request: Any) -> str:
        """What a request is about that is not the caller's: `branch`, `till` or `field`; empty when nothing is."""
        if any(path != caller.path and any(_values(request, field)) for field, path in self.reserved):
            return "field"
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
    reserved = tuple(_reserved(method.input_type))
    rule = Rule(name, roles, changes=changes, reserved=reserved)
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
