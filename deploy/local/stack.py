"""The local stack of one checkout: what runs, starting what does not, stopping."""

import fcntl
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from chassis import grpc_client
from chassis.tls import Credentials
from deploy import certificates
from deploy.local import machine, programs, terminal
from deploy.local.machine import MARK, Notebook, Process, StackError
from deploy.local.postgres import Postgres
from deploy.local.rabbitmq import RabbitMQ
from deploy.local.services import (
    BROKER_SETTING,
    SERVICES,
    TLS_SETTING,
    Database,
    Service,
    common_environ,
    export_lines,
    service_environ,
    settings_of,
    targets,
)

READY_TIMEOUT_S = 60.0
MIGRATE_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0  # how long a service may take to finish what is in flight
HEALTH_TIMEOUT_S = 1.0
NO_SIGNAL = 0
OPERATOR = "operator/kim"  # who asks and commands by hand

# Unusual ones, below the range of outgoing connections. Where one is taken, another is picked and remembered.
POSTGRES_PORT, RABBITMQ_PORT = 29_432, 29_672


class Stack:
    """The stack that keeps its state in `root`/.local. Wrap what changes it in `changing` or `used`."""

    def __init__(
        self, root: Path, services: Sequence[Service] = SERVICES, environ: Mapping[str, str] = os.environ
    ) -> None:
        self.root = root.resolve()
        self.home = self.root / ".local"
        self.certificates = self.home / "certificates"
        self.services = services
        self._databases = tuple(dict.fromkeys(service.database for service in services))
        self._caller = environ
        self._make_home()
        run = self.home / "run"
        self._remembered, self._temporary = Notebook(run / "settings.json"), Notebook(run / "temporary.json")
        log, home = self.log_of, self.home
        self.postgres = Postgres(home / "postgres", log=log("postgres"), preferred_port=POSTGRES_PORT)
        self.rabbitmq = RabbitMQ(home / "rabbitmq", log=log("rabbitmq"), preferred_port=RABBITMQ_PORT)

    def _make_home(self) -> None:
        self.home.mkdir(mode=0o700, exist_ok=True)
        if self.home.stat().st_uid != os.geteuid():
            raise StackError(f"{self.home} belongs to another user: run make as that user, or remove it")
        for name in ("run", "log"):
            (self.home / name).mkdir(exist_ok=True)

    def log_of(self, name: str) -> Path:
        return self.home / "log" / f"{name}.log"

    # --- what there is ---

    @property
    def settings(self) -> dict[str, str]:
        """The caller's settings, on top of those that the running services were started with."""
        caller = settings_of(self._caller)
        if self._caller.get(MARK) == str(self.home):  # a shell that has read one of our .env files
            for name in (BROKER_SETTING, *(database.setting for database in self._databases)):
                caller.pop(name, None)
        return (self._remembered.read() if any(self._instances().values()) else {}) | caller

    def processes(self) -> dict[str, Process | None]:
        """All that belongs to the stack with the present settings, in the order of starting."""
        settings = self.settings
        servers: dict[str, Process | None] = {}
        if self._local_databases(settings):
            servers["postgres"] = self.postgres.process
        if BROKER_SETTING not in settings:
            servers["rabbitmq"] = self.rabbitmq.process
        return servers | {name: found[0] if found else None for name, found in self._instances().items()}

    def endpoints(self) -> dict[str, tuple[str, str]]:
        """Where each is found, and where its metrics are."""
        settings, running = self.settings, self.processes()
        found = {}
        for service in self.services:
            own, metrics = service.addresses(settings).values()
            found[service.name] = (own.target, f"http://{metrics.target}/metrics")
        if "postgres" in running:
            found["postgres"] = (self.postgres.address, "")
        if "rabbitmq" in running:
            found["rabbitmq"] = (self.rabbitmq.address, "")
        return found

    def _instances(self) -> dict[str, list[Process]]:
        """Each service's processes, oldest first. Found by what they are: one started by hand counts too."""
        ours = machine.find(lambda process: process.environ.get(MARK) == str(self.home))
        ours.sort(key=lambda process: process.started)
        return {service.name: [it for it in ours if _runs(it, service)] for service in self.services}

    def _local_databases(self, settings: Mapping[str, str]) -> list[Database]:
        return [database for database in self._databases if database.setting not in settings]

    # --- start ---

    def start(self) -> list[str]:
        """Start what does not run, and wait until all of it serves; the names of what was started."""
        settings, running = self.settings, self.processes()
        self._require_same_transport(settings)
        missing = [service for service in self.services if not running[service.name]]
        started = [name for name, process in running.items() if not process]
        if started:
            with self._ports_reserved(missing, settings), self._undone_on_failure(started):
                self._remembered.write(settings)
                self._start_servers(settings)
                self._start_services(missing, settings)
        return started

    def _require_same_transport(self, settings: Mapping[str, str]) -> None:
        """Those that run, and those that are started or call them, speak the same."""
        if any(self._instances().values()):
            runs, asked = (it.get(TLS_SETTING) == "1" for it in (self._remembered.read(), settings))
            if runs != asked:
                raise StackError(f"the services run {'with' if runs else 'without'} certificates: `make stop` first")

    def start_servers(self) -> list[str]:
        """Start PostgreSQL and RabbitMQ only, whatever the settings say: for the tests."""
        processes = {"postgres": self.postgres.process, "rabbitmq": self.rabbitmq.process}
        started = [name for name, process in processes.items() if not process]
        with self._undone_on_failure(started):
            self._start_servers({})
        return started

    @contextmanager
    def _undone_on_failure(self, started: Collection[str]) -> Iterator[None]:
        """A start that fails, or is interrupted, leaves nothing behind."""
        try:
            yield
        except BaseException:
            self.stop(started)
            raise

    def _start_servers(self, settings: Mapping[str, str]) -> None:
        """RabbitMQ takes longest, so PostgreSQL is seen to while it starts."""
        local_broker, local_databases = BROKER_SETTING not in settings, self._local_databases(settings)
        if local_broker:
            self._ensure_rabbitmq_is_there()
            self.rabbitmq.launch()
        if local_databases:
            with terminal.step("PostgreSQL"):
                self.postgres.start()
                for database in local_databases:
                    self.postgres.ensure_login(database.owner, creates_roles=True)
                    self.postgres.ensure_database(database.name, database.owner)
                for service in self.services:
                    if service.database in local_databases:
                        self.postgres.ensure_group(service.role, service.database.owner, service.database.name)
        if local_broker:
            with terminal.step("RabbitMQ"):
                self.rabbitmq.wait()

    def _ensure_rabbitmq_is_there(self) -> None:
        if programs.find():
            return
        with terminal.step("fetch RabbitMQ (once)"):
            command = ["sh", "deploy/bootstrap.sh", "rabbitmq"]
            done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=False)
            if done.returncode:
                raise StackError(done.stderr.strip())

    def _start_services(self, missing: Sequence[Service], settings: Mapping[str, str]) -> None:
        if settings.get(TLS_SETTING) == "1":
            with terminal.step("certificates"):
                certificates.make(
                    self.certificates, trust_domain=settings.get("TRUST_DOMAIN", certificates.TRUST_DOMAIN)
                )
        if missing:
            with terminal.step("migrations"):
                self._migrate(settings)
                self._make_logins(settings)
        with terminal.step("services"):
            started = {service.name: self._spawn(service, settings) for service in missing}
            running = {name: found[0] for name, found in self._instances().items() if found}
            for service in self.services:  # all: PostgreSQL may just have come back for those that ran
                if process := (running | started).get(service.name):
                    self._wait_ready(service, process, settings)

    def _migrate(self, settings: Mapping[str, str]) -> None:
        runs = {}
        for database in self._databases:
            url = settings.get(database.setting) or self.postgres.url(database.name, database.owner)
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
        if not self._local_databases(settings):
            return ""  # they are not ours to remove
        servers = f"{self.postgres.directory} and {self.rabbitmq.directory}"
        return f"\n\nIf another version made the databases: remove {servers}, with all that they hold."

    def _make_logins(self, settings: Mapping[str, str]) -> None:
        local = self._local_databases(settings)
        for service in self.services:
            if service.database in local:
                self.postgres.ensure_login(service.login, member_of=service.role)

    def _urls(self, service: Service, settings: Mapping[str, str]) -> dict[str, str]:
        """Where the service finds its servers, with a login of its own in each."""
        database = service.database
        urls = {database.setting: settings.get(database.setting) or self.postgres.url(database.name, service.login)}
        if service.uses_broker:
            urls[BROKER_SETTING] = settings.get(BROKER_SETTING) or self.rabbitmq.url_of(service.name)
        return urls

    def _spawn(self, service: Service, settings: Mapping[str, str]) -> Process:
        environ = service_environ(service, self.services, settings, self._urls(service, settings))
        environ |= self._identity(f"service/{service.name}", settings)
        by_hand = export_lines(common_environ(self.home) | targets(self.services, settings) | environ)
        machine.write_private(self.home / "run" / f"{service.name}.env", by_hand)
        machine.write_private(self.home / "run" / "operator.env", export_lines(self._identity(OPERATOR, settings)))
        return self._spawn_module(service.name, service.command, environ)

    def _identity(self, path: str, settings: Mapping[str, str]) -> dict[str, str]:
        """The certificates of whom the path names, where the stack has any."""
        return certificates.environ(self.certificates, path) if settings.get(TLS_SETTING) == "1" else {}

    def _spawn_module(self, name: str, command: Sequence[str], environ: dict[str, str]) -> Process:
        passed_on = {key: self._caller[key] for key in self._caller.keys() - settings_of(self._caller).keys()}
        whole = passed_on | common_environ(self.home) | environ
        return machine.spawn([sys.executable, "-m", *command], whole, self.root, self.log_of(name))

    def _wait_ready(self, service: Service, process: Process, settings: Mapping[str, str]) -> None:
        target = service.target(settings)
        files = self._identity(OPERATOR, settings).values()
        credentials = Credentials(*files) if files else None
        settled = machine.wait_until(lambda: not process.alive or _serves(target, credentials), READY_TIMEOUT_S)
        if not settled or not process.alive:
            raise self._failure(service.name, process)

    def _failure(self, name: str, process: Process) -> StackError:
        """Why a process did not do what it was started for."""
        log = self.log_of(name)
        how = "is not ready in time" if process.alive else how_it_ended(process)
        return StackError(f"{name} {how}; the end of {log}:\n{machine.tail(log)}")

    @contextmanager
    def _ports_reserved(self, services: Sequence[Service], settings: Mapping[str, str]) -> Iterator[None]:
        """Keep the ports for the services until they have them: outgoing connections might get them meanwhile.

        All taken ports are named at once, with the settings that move them.
        """
        problems: list[str] = []
        claimed: dict[int, str] = {}
        with ExitStack() as reserved:
            for service in services:
                for setting, address in service.addresses(settings).items():
                    port, what = address.port, f"port {address.port} ({service.name}, {setting})"
                    if port in claimed:
                        problems.append(f"{what} is also given to {claimed[port]}")
                    elif held := machine.reserve_port(port, address.host):
                        reserved.enter_context(held)
                    else:
                        problems.append(f"{what} is taken by {machine.port_holder(port) or 'another program'}")
                    claimed[port] = setting
            if problems:
                problems.append("Stop what is in the way, or set another address, such as 127.0.0.1:50151.")
                raise StackError("\n".join(problems))
            yield

    # --- stop ---

    def stop(self, names: Collection[str] | None = None) -> None:
        """Stop these, or everything: first the services, all at once, then what they need."""
        found = {name: all_of for name, all_of in self._instances().items() if all_of and _in(name, names)}
        if found:
            with terminal.step(f"stop {', '.join(found)}"):
                self._stop_services(found)
        for name, server in (("rabbitmq", self.rabbitmq), ("postgres", self.postgres)):
            if _in(name, names):
                with terminal.step(f"stop {name}") if server.process else nullcontext():
                    if server.stop():
                        terminal.warn(f"{name} did not stop in time and was killed")

    def _stop_services(self, found: Mapping[str, Sequence[Process]]) -> None:
        """Each is told once, workers by their parent: a second SIGTERM tells a service to drop its work."""
        all_of_them = list(itertools.chain(*found.values()))
        for process in all_of_them:
            if process.parent not in {other.pid for other in all_of_them}:
                process.send(signal.SIGTERM)
        for name, processes in found.items():
            if sum(process.end(NO_SIGNAL, STOP_TIMEOUT_S) for process in processes):
                terminal.warn(f"{name} did not stop within {STOP_TIMEOUT_S:.0f} s and was killed")

    # --- several commands at once ---

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Only one command at a time may start or stop something."""
        lock = self.home / "run" / "lock"
        with machine.locked(lock, lambda: terminal.say("waiting for another command of this checkout …")):
            yield

    @contextmanager
    def used(self, *, temporary: bool, servers_only: bool = False) -> Iterator[list[str]]:
        """The running stack, for as long as the block lasts; yields what had to be started for it.

        With `temporary`, that is stopped again in the end, by the last command that still uses the stack.
        """
        with (self.home / "run" / "users").open("w") as users:
            with self.changing():
                fcntl.flock(users, fcntl.LOCK_SH)
                started = self.start_servers() if servers_only else self.start()
                earlier = self._temporary.read().get("names", [])
                self._temporary.write({"names": [*earlier, *started] if temporary else []})
            try:
                yield started
            finally:
                if temporary:
                    with self.changing():
                        self._stop_temporary(alone=machine.try_lock(users.fileno(), fcntl.LOCK_EX))

    def _stop_temporary(self, alone: bool) -> None:
        names = self._temporary.read().get("names", [])
        if names and not alone:
            terminal.say(f"{', '.join(names)}: left running for another command that uses it")
        elif names:
            self.stop(names)
            self._temporary.write({"names": []})

    def client_environ(self) -> dict[str, str]:
        """For a program that talks to the services, and is none of the stack's own processes."""
        environ = {**self._caller, **common_environ(self.home)}
        del environ[MARK]
        settings = self.settings
        identity = self._identity(OPERATOR, settings)
        tills = {"TILL_CERTIFICATES": str(self.certificates)} if identity else {}
        return environ | targets(self.services, settings) | identity | tills


def how_it_ended(process: Process) -> str:
    code = process.exit_code()
    if code is None:
        return "has ended"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _runs(process: Process, service: Service) -> bool:
    return is_call_of(service.command, process.argv)


def is_call_of(command: Sequence[str], argv: Sequence[str]) -> bool:
    """Whether a process was started as `python -m relay_svc serve`, or as `retail-relay serve`."""
    package, *arguments = command
    script = f"retail-{package.removesuffix('_svc')}"
    named = [script if os.path.basename(word) == script else word for word in argv]
    ways = ["-m", package, *arguments], [script, *arguments]
    return any(named[start : start + len(way)] == way for way in ways for start in range(len(named)))


def _in(name: str, names: Collection[str] | None) -> bool:
    return names is None or name in names


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
