"""Settings are environment variables, read once into a frozen dataclass; every problem is reported at once.

@dataclass(frozen=True)
class Settings:
    database_url: str = setting("PURCHASES_DATABASE_URL", postgres_url, "URL", "where purchases are kept")
    batch_max: int = setting("PURCHASES_BATCH_MAX", integer(1, 10_000), "sales", "in one transaction", default=500)

settings = load(Settings)
"""

import dataclasses
import os
import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")

# What of a URL names a file, and what is a whole number; libpq looks at either when it connects, at the earliest.
POSTGRES_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
POSTGRES_NUMBERS = (
    "connect_timeout",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_count",
    "tcp_user_timeout",
)
NOWHERE = "/nowhere"  # no directory that has a server's socket


class SettingsError(Exception):
    """One line per wrong setting."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Setting(NamedTuple):
    """What there is to know about a setting, whatever its value is."""

    name: str
    parse: Callable[[str], Any]
    unit: str  # or the kind of value
    meaning: str
    default: str | None  # None: it must be set

    def shown(self, environ: Mapping[str, str]) -> tuple[str, str]:
        """Its present value without what is secret, and what is wrong with it; both empty when it is not set."""
        raw = environ.get(self.name, "").strip()
        if not raw:
            return "", ""
        try:
            self.parse(raw)
        except ValueError as error:
            return "(hidden)" if "://" in raw else raw, str(error)
        return without_secrets(raw), ""


def setting(
    name: str, parse: Callable[[str], Any], unit: str, meaning: str, *, default: Any = dataclasses.MISSING
) -> Any:
    """A field read from the variable `name`. An empty variable counts as not set; no default means required."""
    declared = Setting(name, parse, unit, meaning, _text_of(default))
    return dataclasses.field(default=default, metadata={"setting": declared})


def _text_of(default: Any) -> str | None:
    """What one would set to have the default."""
    if default is dataclasses.MISSING:
        return None
    if isinstance(default, bool):
        return str(int(default))
    if isinstance(default, tuple):
        return ",".join(default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def settings_of(cls: type) -> list[Setting]:
    """In the order of their declaration."""
    return [field.metadata["setting"] for field in dataclasses.fields(cls)]


def without_secrets(value: str) -> str:
    """A URL without its user, password and options; anything else as it is."""
    if "://" not in value:
        return value
    parts = urlsplit(value)
    user, _, hosts = parts.netloc.rpartition("@")
    hidden = "…@" if user else ""
    return f"{parts.scheme}://{hidden}{hosts}{parts.path}{'?…' if parts.query else ''}"


def load(cls: type[T], environ: Mapping[str, str] = os.environ) -> T:
    """Read every field of `cls`.

    Raises:
        SettingsError: naming each variable that is missing or wrong.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        declared: Setting = field.metadata["setting"]
        name = declared.name
        raw = environ.get(name, "").strip()
        if not raw:
            if field.default is dataclasses.MISSING:
                problems.append(f"{name} is not set")
            continue
        try:
            values[field.name] = declared.parse(raw)
        except ValueError as error:
            shown = "(hidden)" if "://" in raw else repr(raw)  # URLs carry passwords
            problems.append(f"{name}={shown}: {error}")
    if problems := [*problems, *beyond(cls, environ)]:
        raise SettingsError(problems)
    return cls(**values)


def beyond(cls: type, environ: Mapping[str, str] = os.environ) -> list[str]:
    """What would leave this machine in plaintext; a line for each setting that says so. Wrong values are left out."""
    from chassis import plaintext  # which knows the kinds below

    declared, values = settings_of(cls), {}
    for each in declared:
        with suppress(ValueError):
            values[each.name] = each.parse(environ.get(each.name, "").strip() or each.default or "")
    return plaintext.problems(declared, values)


def text(raw: str) -> str:
    return raw


def log_level(default: str = "INFO") -> Any:
    levels = ("DEBUG", "INFO", "WARNING", "ERROR")
    meaning = f"what is logged: {', '.join(levels)}; DEBUG writes the texts of refusals, which may name customers"
    return setting("LOG_LEVEL", choice(*levels), "level", meaning, default=default)


def integer(least: int, most: int) -> Callable[[str], int]:
    def parse(raw: str) -> int:
        if not (raw.isascii() and raw.lstrip("-").isdigit() and least <= int(raw) <= most):
            raise ValueError(f"must be a whole number from {least} to {most}")
        return int(raw)

    return parse


def number(least: float, most: float, what: str = "a number") -> Callable[[str], float]:
    def parse(raw: str) -> float:
        try:
            value = float(raw)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise ValueError(f"must be {what} from {least:g} to {most:g}")
        return value

    return parse


def seconds(least: float, most: float) -> Callable[[str], float]:
    return number(least, most, "a number of seconds")


def choice(*allowed: str) -> Callable[[str], str]:
    def parse(raw: str) -> str:
        if raw not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return raw

    return parse


def switch(raw: str) -> bool:
    if raw not in ("0", "1"):
        raise ValueError("must be 0 or 1")
    return raw == "1"


def address(raw: str) -> str:
    """`host:port`; port 0 lets the system choose."""
    host, _, port = raw.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ValueError("must be host:port, such as 127.0.0.1:50051")
    return raw


def listen_address(raw: str) -> str:
    """`host:port` on which gRPC listens: in plaintext within this machine only, see `chassis.plaintext`."""
    return address(raw)


def target(raw: str) -> str:
    """`host:port`, or another name that gRPC resolves, such as dns:///host:port; in plaintext as above."""
    return raw if ":///" in raw or raw.startswith("unix:") else address(raw)


def _url(raw: str, schemes: tuple[str, ...], example: str) -> str:
    """A URL of one server, or of several of one cluster: user:password@host:port,host:port."""
    scheme, authority, rest = pieces(raw)
    try:
        hosts = [urlsplit(f"//{host}") for host in authority.rpartition("@")[2].split(",")]
        ports = [host.port for host in hosts]
        for host in hosts:
            (host.hostname or "").encode("idna")
    except ValueError:  # a port that is no number, a name that no host can have
        ports = [0]
    if scheme not in schemes or not (authority or "?" in rest) or 0 in ports:
        raise ValueError(f"must be a URL such as {example}")
    return raw


def pieces(url: str) -> tuple[str, str, str]:
    """The scheme, the authority and the rest. For urlsplit, in some versions of Python, a `[` opens the only host."""
    scheme, _, after = url.partition("://")
    end = min((after.index(sign) for sign in "/?#" if sign in after), default=len(after))
    return scheme.lower(), after[:end], after[end:]


def postgres_url(raw: str) -> str:
    """A URL that libpq takes; several hosts are tried in turn, or as `load_balance_hosts` says."""
    from psycopg import ProgrammingError, conninfo  # not there where only a till runs

    example = "postgresql://user:password@host:5432,host:5432/database"
    _url(raw, ("postgresql", "postgres"), example)
    try:
        options = conninfo.conninfo_to_dict(raw)
    except ProgrammingError as error:
        reason = str(error).strip()  # others may show a part of the password
        raise ValueError(reason if "query parameter" in reason else f"must be a URL such as {example}") from None
    for name in POSTGRES_NUMBERS:
        if not str(options.get(name, 0)).removeprefix("-").isdecimal():
            raise ValueError(f"{name} must be a whole number")
    if refusal := _refusal_of_libpq(options):
        raise ValueError(refusal)
    for name in POSTGRES_FILES:
        if (path := str(options.get(name, "system"))) != "system":
            _require_readable(name, path)
    return raw


def _refusal_of_libpq(options: Mapping[str, Any]) -> str:
    """What libpq has against options, if anything. It tells when it connects, so it gets sockets that are not there."""
    from psycopg import conninfo, pq

    hosts = str(options.get("host") or options.get("hostaddr") or "").split(",")
    elsewhere = {name: value for name, value in options.items() if name not in ("hostaddr", "service")}
    elsewhere["host"] = ",".join(NOWHERE for _ in hosts)
    connection = pq.PGconn.connect_start(conninfo.make_conninfo(**elsewhere).encode())
    said = connection.error_message.decode().partition("\n")[0]
    connection.finish()
    return "" if said.startswith("connection to server") else said


def _require_readable(name: str, path: str) -> None:
    try:
        with open(path, "rb"):
            pass
        if name == "sslrootcert":
            ssl.create_default_context(cafile=path)
    except OSError as error:
        raise ValueError(f"{name}: {error}") from None


def amqp_url(raw: str) -> str:
    """A URL of a broker's node, or of several of one cluster; options after `?` are pika's."""
    from chassis import amqp  # not there where only a till runs

    _url(raw, ("amqp", "amqps"), "amqp://user:password@host:5672,host:5672/%2F")
    amqp.nodes(raw)
    return raw


def collector_url(raw: str) -> str:
    """Where traces are sent; in plaintext within this machine only, see `chassis.plaintext`."""
    scheme, authority, rest = pieces(raw)
    host, _, port = authority.rpartition(":")
    if scheme not in ("http", "https") or not host or not port.isdigit() or "@" in host or rest not in ("", "/"):
        raise ValueError("must be a URL such as http://127.0.0.1:4317, or https://collector.example:4317")
    return raw


def time_zone(raw: str) -> str:
    """The IANA name of a time zone, but none that SQL takes for an abbreviation."""
    from chassis import zones  # whose data is not there where only a till runs

    if instead := zones.ABBREVIATIONS.get(raw):
        raise ValueError(f"{raw} has no summer time in SQL; write {instead}, which means the same and is not mistaken")
    if raw not in zones.names():
        raise ValueError("must be an IANA time zone name, such as UTC or Europe/Berlin")
    return raw
