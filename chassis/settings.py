"""Settings are environment variables, read once into a frozen dataclass; every problem is reported at once.

@dataclass(frozen=True)
class Settings:
    database_url: str = setting("PURCHASES_DATABASE_URL", postgres_url)
    batch_max: int = setting("PURCHASES_BATCH_MAX", integer(1, 10_000), default=500)

settings = load(Settings)
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

T = TypeVar("T")


class SettingsError(Exception):
    """One line per wrong setting."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def setting(name: str, parse: Callable[[str], Any], *, default: Any = dataclasses.MISSING) -> Any:
    """A field read from the variable `name`. An empty variable counts as not set; no default means required."""
    return dataclasses.field(default=default, metadata={"name": name, "parse": parse})


def load(cls: type[T], environ: Mapping[str, str] = os.environ) -> T:
    """Read every field of `cls`.

    Raises:
        SettingsError: naming each variable that is missing or wrong.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name: str = field.metadata["name"]
        raw = environ.get(name, "").strip()
        if not raw:
            if field.default is dataclasses.MISSING:
                problems.append(f"{name} is not set")
            continue
        try:
            values[field.name] = field.metadata["parse"](raw)
        except ValueError as error:
            shown = "(hidden)" if "://" in raw else repr(raw)  # URLs carry passwords
            problems.append(f"{name}={shown}: {error}")
    if problems:
        raise SettingsError(problems)
    return cls(**values)


def text(raw: str) -> str:
    return raw


def integer(least: int, most: int) -> Callable[[str], int]:
    def parse(raw: str) -> int:
        if not (raw.isascii() and raw.lstrip("-").isdigit() and least <= int(raw) <= most):
            raise ValueError(f"must be a whole number from {least} to {most}")
        return int(raw)

    return parse


def seconds(least: float, most: float) -> Callable[[str], float]:
    def parse(raw: str) -> float:
        try:
            value = float(raw)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise ValueError(f"must be a number of seconds from {least:g} to {most:g}")
        return value

    return parse


def choice(*allowed: str) -> Callable[[str], str]:
    def parse(raw: str) -> str:
        if raw not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return raw

    return parse


def address(raw: str) -> str:
    """`host:port`, as gRPC listens on or connects to it; port 0 lets the system choose."""
    host, _, port = raw.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ValueError("must be host:port, such as 127.0.0.1:50051")
    return raw


def _url(raw: str, schemes: tuple[str, ...], example: str) -> str:
    parts = urlsplit(raw)
    try:
        whole = parts.scheme in schemes and bool(parts.netloc or parts.query) and parts.port != 0
    except ValueError:  # a port that is no number
        whole = False
    if not whole:
        raise ValueError(f"must be a URL such as {example}")
    return raw


def postgres_url(raw: str) -> str:
    return _url(raw, ("postgresql", "postgres"), "postgresql://user:password@host:5432/database")


def amqp_url(raw: str) -> str:
    return _url(raw, ("amqp", "amqps"), "amqp://user:password@host:5672/%2F")


def time_zone(raw: str) -> str:
    """An IANA time zone name that this machine knows."""
    try:
        ZoneInfo(raw)
    except (KeyError, ValueError, OSError):
        raise ValueError("must be an IANA time zone name, such as UTC or Europe/Berlin") from None
    return raw
