"""Describes the contracts for those who call them: `reference.py DESCRIPTORS IMAGE PAGE`.

From a descriptor set with comments it makes the image that other languages generate code from (the comments of google's
files left out: they are two thirds of it), and a page to read.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from google.api import field_behavior_pb2
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    MethodOptions,
    ServiceDescriptorProto,
)

from retail.access.v1 import access_pb2

HEAD = """\
# Reference of the gRPC services

Made by `make proto` of the comments in [`proto/`](../proto), which are the contract itself. How to call the services
from any language: [clients.md](clients.md).
"""
LEVELS = {MethodOptions.NO_SIDE_EFFECTS: "only reads", MethodOptions.IDEMPOTENT: "safe to repeat"}
BOUND = {
    access_pb2.BINDING_ANY: "",
    access_pb2.BINDING_NAMES_OWN_BRANCH: "; each request names the caller's own branch",
    access_pb2.BINDING_FINDS_OWN_BRANCH: "; finds the caller's own branch's only",
    access_pb2.BINDING_NAMES_OWN_TILL: "; each sale is of the caller's own branch and till",
}
BEHAVIORS = {field_behavior_pb2.REQUIRED: "required", field_behavior_pb2.OUTPUT_ONLY: "output only"}


class Commented(NamedTuple):
    """A file and its comments by the path of what they belong to, as descriptor.proto numbers it."""

    file: FileDescriptorProto
    comments: dict[tuple[int, ...], str]

    @classmethod
    def read(cls, file: FileDescriptorProto) -> "Commented":
        return cls(file, {tuple(at.path): at.leading_comments for at in file.source_code_info.location})

    def text(self, *path: int) -> str:
        """Its paragraphs, each on one line, as Markdown."""
        paragraphs = self.comments.get(path, "").strip().split("\n\n")
        return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs).replace("<", "&lt;")

    def cell(self, *path: int) -> str:
        return self.text(*path).replace("\n\n", "<br>").replace("|", "\\|")


def image(descriptors: FileDescriptorSet) -> bytes:
    """The descriptors without the comments of others' files, and without what is no comment."""
    for file in descriptors.file:
        commented = [at for at in file.source_code_info.location if at.leading_comments]
        del file.source_code_info.location[:]
        if not file.name.startswith("google/"):
            file.source_code_info.location.extend(commented)
    return descriptors.SerializeToString(deterministic=True)


def page(descriptors: FileDescriptorSet) -> str:
    packages: dict[str, list[Commented]] = {}
    for file in descriptors.file:
        if file.package.startswith("retail."):
            packages.setdefault(file.package, []).append(Commented.read(file))
    parts = [HEAD, *_contents(packages)]
    for package, files in sorted(packages.items()):
        parts.append(f"## {package}")
        for commented in files:
            for n, service in enumerate(commented.file.service):
                parts += _service(commented, n, service)
        for commented in files:
            for n, message in enumerate(commented.file.message_type):
                parts += _message(commented, n, message)
        for commented in files:
            for n, enum in enumerate(commented.file.enum_type):
                parts += _enum(commented, n, enum)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _contents(packages: dict[str, list[Commented]]) -> Iterator[str]:
    for package, files in sorted(packages.items()):
        services = [service for commented in files for service in commented.file.service]
        rows = [
            f"- {_link(f'.{package}.{service.name}')}: "
            + ", ".join(_link(f".{package}.{service.name}.{method.name}") for method in service.method)
            for service in services
        ]
        if rows:
            yield "\n".join(rows)


def _service(commented: Commented, n: int, service: ServiceDescriptorProto) -> Iterator[str]:
    name = f"{commented.file.package}.{service.name}"
    yield _heading(3, name)
    yield commented.text(6, n)
    for m, method in enumerate(service.method):
        yield _heading(4, f"{name}.{method.name}")
        yield _signature(method)
        yield _callers(method)
        yield commented.text(6, n, 2, m)


def _signature(method: MethodDescriptorProto) -> str:
    takes = ("stream of " if method.client_streaming else "") + _link(method.input_type)
    gives = ("stream of " if method.server_streaming else "") + _link(method.output_type)
    return f"{takes} → {gives}; {LEVELS[method.options.idempotency_level]}"


def _callers(method: MethodDescriptorProto) -> str:
    rule = method.options.Extensions[access_pb2.rule]
    roles = [access_pb2.Role.Name(role).removeprefix("ROLE_").lower() for role in rule.roles]
    if rule.services:
        roles[roles.index("service")] = " or ".join(f"service {name}" for name in rule.services)
    return f"[Callers](#retail.access.v1.Rule): {', '.join(roles)}{BOUND[rule.binding]}."


def _message(commented: Commented, n: int, message: DescriptorProto) -> Iterator[str]:
    yield _heading(3, f"{commented.file.package}.{message.name}")
    yield commented.text(4, n)
    if message.field:
        rows = [
            f"| {field.number} | `{field.name}` | {_type(message, field)} | {commented.cell(4, n, 2, f)} |"
            for f, field in enumerate(message.field)
        ]
        yield "\n".join(["| # | field | type | |", "|---|---|---|---|", *rows])


def _enum(commented: Commented, n: int, enum: EnumDescriptorProto) -> Iterator[str]:
    yield _heading(3, f"{commented.file.package}.{enum.name}")
    yield commented.text(5, n)
    rows = [f"| {v.number} | `{v.name}` | {commented.cell(5, n, 2, i)} |" for i, v in enumerate(enum.value)]
    yield "\n".join(["| # | value | |", "|---|---|---|", *rows])


def _type(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    type_name = field.type_name
    name = _link(type_name) if type_name else FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    notes = [BEHAVIORS[b] for b in field.options.Extensions[field_behavior_pb2.field_behavior] if b in BEHAVIORS]
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        name = f"repeated {name}"
    elif field.proto3_optional:
        name = f"optional {name}"
    elif field.HasField("oneof_index"):
        notes.append(f"one of `{message.oneof_decl[field.oneof_index].name}`")
    return ", ".join([name, *notes])


def _heading(level: int, full_name: str) -> str:
    return f'<a id="{full_name}"></a>\n\n{"#" * level} {full_name.rpartition(".")[2]}'


def _link(full_name: str) -> str:
    """To what is on this page. Google's types are known by their names."""
    name = full_name.lstrip(".")
    return f"[{name.rpartition('.')[2]}](#{name})" if name.startswith("retail.") else name


def main(arguments: Sequence[str]) -> None:
    source, image_path, page_path = map(Path, arguments)
    descriptors = FileDescriptorSet.FromString(source.read_bytes())
    page_path.write_text(page(descriptors))
    image_path.write_bytes(image(descriptors))


if __name__ == "__main__":
    main(sys.argv[1:])
