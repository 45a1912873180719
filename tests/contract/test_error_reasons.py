"""The catalogue of errors in proto/ is what the services raise: no more, no less, with the codes and pauses it says."""

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

import chassis
from chassis.errors import FieldReason, ServiceError

ROOT = Path(__file__).parent.parent.parent
SERVICES = {"purchases_svc": "purchases", "relay_svc": "relay", "analytics_svc": "analytics"}


def catalogue(package: str, enum_name: str) -> Mapping[str, str]:
    """The values of an enum and what the contract says of each, but for the first, which is not used."""
    image = FileDescriptorSet.FromString((ROOT / "proto" / "image.binpb").read_bytes())
    for file in image.file:
        for n, enum in enumerate(file.enum_type):
            if (file.package, enum.name) == (f"retail.{package}.v1", enum_name):
                comments = {
                    tuple(at.path): " ".join(at.leading_comments.split()) for at in file.source_code_info.location
                }
                return {value.name: comments[5, n, 2, i] for i, value in enumerate(enum.value) if value.number}
    raise AssertionError(f"no {enum_name} in {package}")


def sources(*packages: str) -> Iterator[ast.AST]:
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield ast.parse(path.read_text())


def raised(service: str) -> list[type[ServiceError]]:
    """The errors that this service or the chassis makes somewhere. A class that is only declared is none of them."""
    for package in (importlib.import_module(service), chassis):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__") and ".commands" not in module.name:  # these answer no calls
                importlib.import_module(module.name)
    made = {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for tree in sources(service, "chassis")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }
    found, classes = [], list(ServiceError.__subclasses__())
    for error in classes:
        classes += error.__subclasses__()
        if error.__module__.split(".")[0] in (service, "chassis") and error.__name__ in made:
            found.append(error)
    return found


@pytest.mark.parametrize("service", SERVICES)
def test_every_reason_is_in_the_contract_and_the_other_way_round(service: str) -> None:
    """What is raised has a value; what has a value is raised."""
    assert {error.reason for error in raised(service)} == set(catalogue(SERVICES[service], "ErrorReason"))


@pytest.mark.parametrize("service", SERVICES)
def test_contract_tells_code_and_pause(service: str) -> None:
    """Each value's comment begins with its codes, and says whether a retry helps, after the pause that is sent."""
    values = catalogue(SERVICES[service], "ErrorReason")
    for error in raised(service):
        codes, verdict, pause = re.match(
            r"(.+?)\. (Final|Retry)(?: after ([\d.]+) s)?: ", values[error.reason]
        ).groups()  # type: ignore[union-attr]
        assert error.code.name in re.findall(r"[A-Z_]{3,}", codes), error
        assert float(pause or 0) == (error.retry_after_s or 0), error
        assert (verdict == "Retry") == (error.code.name in RETRYABLE), error


RETRYABLE = {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED", "DEADLINE_EXCEEDED"}


def test_field_reasons_are_those_of_the_contract() -> None:
    """Each is a value of FieldReason, and each is used somewhere."""
    assert [str(reason) for reason in FieldReason] == list(catalogue("errors", "FieldReason"))
    used = {
        node.attr
        for tree in sources("chassis", *SERVICES)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "FieldReason"
    }
    assert used == {reason.name for reason in FieldReason}
