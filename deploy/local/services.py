"""The processes of the system and what each of them is told: a table, and the environments made from it."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from deploy.local.machine import MARK, StackError

BROKER_SETTING = "AMQP_URL"
TLS_SETTING = "TLS"  # 1: with certificates, made for the purpose
CELLS_SETTING = "CELLS"  # how many
CELLS_MAX = 4  # with more, their ports would meet others'

# The caller's variables that configure us, so that whoever restarts one process must give it the same ones.
SETTING_PREFIXES = (
    "PURCHASES_",
    "RELAY_",
    "CONSUMER_",
    "ANALYTICS_",
    "PAGES_",
    "AMQP_",
    "BUSINESS_",
    "LOG_",
    "TLS",
    "TRUST_DOMAIN",
    "ALLOW_PLAINTEXT",
    "OTEL_",
    "CELL",
)

# Here, where no till has a flat battery: the demo replays sales of any year.
LOCAL_SETTINGS = {"PURCHASES_BACKLOG_MONTHS": "0"}


@dataclass(frozen=True)
class Address:
    """Where a process listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, setting: str, text: str) -> "Address":
        host, _, port = text.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise StackError(f"{setting}={text}: must be host:port, such as 127.0.0.1:50051")
        return cls(host.strip("[]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def target(self) -> str:
        """Where clients on this machine reach it."""
        return str(Address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host), self.port))


@dataclass(frozen=True)
class OfCell:
    """What each cell has one of, of the same `kind`; what all share counts to the first cell.

    The stack knows it by its name, with which the caller's settings for it begin: PURCHASES_2_LISTEN. What the process
    itself reads is PURCHASES_LISTEN in every cell.
    """

    kind: str
    cell: int = field(default=1, kw_only=True)

    @property
    def name(self) -> str:
        return self.kind if self.cell == 1 else f"{self.kind}-{self.cell}"

    @property
    def prefix(self) -> str:
        return self.name.upper().replace("-", "_")


@dataclass(frozen=True)
class Database(OfCell):
    """A database, its owner, and the command (after `python -m`) that brings it to the newest schema."""

    owner: str
    migrate: tuple[str, ...]

    @property
    def setting(self) -> str:
        """What its processes read."""
        return f"{self.kind.upper()}_DATABASE_URL"

    @property
    def callers_setting(self) -> str:
        """Where the caller's own is, if it is not on the stack's server."""
        return f"{self.prefix}_DATABASE_URL"


@dataclass(frozen=True)
class Program(OfCell):
    """A process of the stack; `command` follows `python -m`, `calls` names services."""

    command: tuple[str, ...]
    port: int
    metrics_port: int
    calls: tuple[str, ...] = field(default=(), kw_only=True)
    per_cell: bool = field(default=False, kw_only=True)

    def addresses(self, settings: Mapping[str, str]) -> dict[str, Address]:
        """The caller's settings that name an address to listen on, and their values: its own first, then metrics."""
        ports = {f"{self.prefix}_LISTEN": self.port, f"{self.prefix}_METRICS_LISTEN": self.metrics_port}
        return {key: Address.parse(key, settings.get(key) or f"127.0.0.1:{ports[key]}") for key in ports}

    def target(self, settings: Mapping[str, str]) -> str:
        return self.addresses(settings)[f"{self.prefix}_LISTEN"].target

    def in_cell(self, cell: int) -> Self:
        """The first cell's, or another's."""
        further = PORTS_PER_CELL * (cell - 1)
        return replace(self, cell=cell, port=self.port + further, metrics_port=self.metrics_port + further)


@dataclass(frozen=True)
class Service(Program):
    """One that answers by gRPC, also whether it serves."""

    database: Database
    role: str  # made by the migrations; the process logs in as a member of it
    uses_broker: bool = False

    @property
    def login(self) -> str:
        return f"local_{self.name.replace('-', '_')}"

    def in_cell(self, cell: int) -> Self:
        return replace(super().in_cell(cell), database=replace(self.database, cell=cell))


@dataclass(frozen=True)
class Pages(Program):
    """One that answers browsers. It asks the services with the rights of whoever runs the stack."""


PORTS_PER_CELL = 10

PURCHASES = Database("purchases", "purchases_owner", ("purchases_svc", "migrate"))
ANALYTICS = Database("analytics", "analytics_owner", ("analytics_svc", "migrate"))

SERVICES = (
    Service("purchases", ("purchases_svc", "serve"), 50051, 9464, PURCHASES, "purchases_service", per_cell=True),
    Service(
        "relay", ("relay_svc", "serve"), 50053, 9466, PURCHASES, "purchases_relay", uses_broker=True, per_cell=True
    ),
    Service(
        "consumer",
        ("analytics_svc", "consume"),
        50054,
        9467,
        ANALYTICS,
        "analytics_consumer",
        uses_broker=True,
        calls=("purchases", "relay"),
    ),
    Service("analytics", ("analytics_svc", "serve"), 50052, 9465, ANALYTICS, "analytics_server"),
)
PAGES = Pages("pages", ("pages_svc", "serve"), 8080, 9468, calls=("purchases", "analytics", "relay", "consumer"))
STACK: tuple[Program, ...] = (*SERVICES, PAGES)


def programs_of(cells: int, table: Sequence[Program] = STACK) -> tuple[Program, ...]:
    """The processes of a chain with so many cells: `table` has those of one."""
    return tuple(
        program.in_cell(cell) if program.per_cell else program
        for program in table
        for cell in range(1, cells + 1 if program.per_cell else 2)
    )


def settings_of(environ: Mapping[str, str]) -> dict[str, str]:
    """What of a caller's environment configures us. As in the services, empty means not set."""
    return {name: value for name, value in environ.items() if name.startswith(SETTING_PREFIXES) and value}


def targets(programs: Sequence[Program], settings: Mapping[str, str]) -> dict[str, str]:
    """The settings that say where each service is found; of those that each cell has, the first cell's."""
    services = [it for it in programs if isinstance(it, Service) and it.cell == 1]
    found = {f"{it.prefix}_TARGET": it.target(settings) for it in services}
    return {name: settings.get(name, target) for name, target in found.items()}


def common_environ(home: Path) -> dict[str, str]:
    """What every process of the stack that lives in `home` gets."""
    return {MARK: str(home), "PYTHONUNBUFFERED": "1"}


def service_environ(
    program: Program, programs: Sequence[Program], settings: Mapping[str, str], urls: Mapping[str, str]
) -> dict[str, str]:
    """The settings of one program: the caller's, its own URLs, and the targets that it needs."""
    found = targets(programs, settings)
    needed = dict(urls)
    needed |= {name: found[name] for name in (f"{called.upper()}_TARGET" for called in program.calls)}
    own, metrics = map(str, program.addresses(settings).values())
    needed |= {f"{program.kind.upper()}_LISTEN": own, f"{program.kind.upper()}_METRICS_LISTEN": metrics}
    secrets = {BROKER_SETTING, *(other.database.callers_setting for other in programs if isinstance(other, Service))}
    return LOCAL_SETTINGS | {name: value for name, value in settings.items() if name not in secrets} | needed


def export_lines(environ: Mapping[str, str]) -> str:
    """A file for `. FILE` in any shell."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(environ.items()))
