"""How one process of the stack is started: what it is told, with whose rights, and when it is there."""

import signal
import sys
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from chassis import grpc_client
from chassis.tls import Credentials
from deploy import certificates
from deploy.local import cells, machine
from deploy.local.machine import Process, StackError
from deploy.local.postgres import Postgres
from deploy.local.rabbitmq import RabbitMQ, TlsFiles
from deploy.local.services import (
    BROKER_SETTING,
    TLS_SETTING,
    Database,
    Pages,
    Program,
    Service,
    common_environ,
    export_lines,
    service_environ,
    settings_of,
    targets,
)

READY_TIMEOUT_S = 60.0
MIGRATE_TIMEOUT_S = 300.0
HEALTH_TIMEOUT_S = 1.0
OPERATOR = "operator/kim"  # who asks and commands by hand, or by the pages
BROKER = "server/rabbitmq"  # in its certificate: no caller of ours has such a name


@dataclass(frozen=True)
class Launcher:
    """What processes of a stack are started with: its servers, certificates, and the caller's environment."""

    root: Path
    home: Path
    data: Path  # what lasts, but for certificates; each number of cells has its own
    programs: Sequence[Program]
    caller: Mapping[str, str]
    postgres: Postgres
    rabbitmq: RabbitMQ
    log_of: Callable[[str], Path]

    @property
    def certificates(self) -> Path:
        return self.home / "certificates"

    @property
    def cells_file(self) -> Path | None:
        """The file of cells, where there are several."""
        return self.data / "cells.toml" if any(program.cell > 1 for program in self.programs) else None

    @property
    def databases(self) -> Sequence[Database]:
        return tuple(dict.fromkeys(service.database for service in self.services))

    @property
    def services(self) -> Sequence[Service]:
        return [program for program in self.programs if isinstance(program, Service)]

    def local_databases(self, settings: Mapping[str, str]) -> list[Database]:
        """Those that are on the stack's own server."""
        return [database for database in self.databases if database.callers_setting not in settings]

    def make_certificates(self, settings: Mapping[str, str]) -> TlsFiles:
        """Those of processes, people and tills, and the broker's, which are returned."""
        wanted = {**certificates.EVERYBODY, BROKER: certificates.LOOPBACK}
        certificates.make(self.certificates, wanted, settings.get("TRUST_DOMAIN", certificates.TRUST_DOMAIN))
        return TlsFiles(*map(Path, certificates.environ(self.certificates, BROKER).values()))

    def migrate(self, settings: Mapping[str, str]) -> None:
        runs = {}
        for database in self.databases:
            url = settings.get(database.callers_setting) or self.postgres.url(database.name, database.owner)
            name = f"migrate-{database.name}"
            runs[name] = self._spawn_module(name, database.migrate, {**settings, database.setting: url})
        try:
            for name, process in runs.items():
                if not process.ended(MIGRATE_TIMEOUT_S) or process.exit_code() != 0:
                    raise StackError(f"{self._failure(name, process)}{self._how_to_start_anew(settings)}")
        finally:  # none is left behind, whatever happens
            for process in runs.values():
                process.end()

    def _how_to_start_anew(self, settings: Mapping[str, str]) -> str:
        if not self.local_databases(settings):
            return ""  # they are not ours to remove
        servers = f"{self.postgres.directory} and {self.rabbitmq.directory}"
        return f"\n\nIf another version made the databases: remove {servers}, with all that they hold."

    def make_logins(self, settings: Mapping[str, str]) -> None:
        local = self.local_databases(settings)
        for service in self.services:
            if service.database in local:
                self.postgres.ensure_login(service.login, member_of=service.role)

    def _urls(self, program: Program, settings: Mapping[str, str]) -> dict[str, str]:
        """Where a service finds its servers, with a login of its own in each."""
        if not isinstance(program, Service):
            return {}
        database = program.database
        own = settings.get(database.callers_setting) or self.postgres.url(database.name, program.login)
        urls = {database.setting: own}
        if program.uses_broker:
            urls[BROKER_SETTING] = settings.get(BROKER_SETTING) or self.rabbitmq.url_of(program.kind)
        return urls

    def spawn(self, program: Program, settings: Mapping[str, str]) -> Process:
        environ = service_environ(program, self.programs, settings, self._urls(program, settings))
        for_people = isinstance(program, Pages)
        environ |= cells.environ(program, self.cells_file)
        environ |= self.identity(OPERATOR if for_people else f"service/{program.kind}", settings)
        if for_people:
            environ["PAGES_JOURNALS"] = settings.get("PAGES_JOURNALS") or str(self.data / "journals")
        if for_people and settings.get(TLS_SETTING) == "1":
            environ["TILL_CERTIFICATES"] = str(self.certificates)
        by_hand = export_lines(common_environ(self.home) | targets(self.programs, settings) | environ)
        machine.write_private(self.home / "run" / f"{program.name}.env", by_hand)
        machine.write_private(self.home / "run" / "operator.env", export_lines(self.identity(OPERATOR, settings)))
        return self._spawn_module(program.name, program.command, environ)

    def identity(self, path: str, settings: Mapping[str, str]) -> dict[str, str]:
        """The certificates of whom the path names, where the stack has any."""
        return certificates.environ(self.certificates, path) if settings.get(TLS_SETTING) == "1" else {}

    def _spawn_module(self, name: str, command: Sequence[str], environ: dict[str, str]) -> Process:
        passed_on = {key: self.caller[key] for key in self.caller.keys() - settings_of(self.caller).keys()}
        whole = passed_on | common_environ(self.home) | environ
        return machine.spawn([sys.executable, "-m", *command], whole, self.root, self.log_of(name))

    def wait_ready(self, program: Program, process: Process, settings: Mapping[str, str]) -> None:
        target = program.target(settings)
        files = self.identity(OPERATOR, settings).values()
        credentials = Credentials(*files) if files else None

        def serves() -> bool:
            return _serves_people(target) if isinstance(program, Pages) else _serves(target, credentials)

        settled = machine.wait_until(lambda: not process.alive or serves(), READY_TIMEOUT_S)
        if not settled or not process.alive:
            raise self._failure(program.name, process)

    def _failure(self, name: str, process: Process) -> StackError:
        """Why a process did not do what it was started for."""
        log = self.log_of(name)
        how = "is not ready in time" if process.alive else how_it_ended(process)
        return StackError(f"{name} {how}; the end of {log}:\n{machine.tail(log)}")


def how_it_ended(process: Process) -> str:
    code = process.exit_code()
    if code is None:
        return "has ended"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _serves(target: str, credentials: Credentials | None) -> bool:
    with grpc_client.connect_blocking(target, credentials) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=HealthCheckRequest.SerializeToString,
            response_deserializer=HealthCheckResponse.FromString,
        )
        try:
            return bool(check(HealthCheckRequest(), timeout=HEALTH_TIMEOUT_S).status == HealthCheckResponse.SERVING)
        except grpc.RpcError:
            return False


def _serves_people(target: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{target}/health", timeout=HEALTH_TIMEOUT_S) as reply:
            return bool(reply.status == HTTPStatus.OK)
    except OSError:
        return False
