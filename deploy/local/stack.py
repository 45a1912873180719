"""The local stack of one checkout: what runs, starting what does not, stopping."""

import fcntl
import itertools
import os
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from deploy.local import cells, machine, programs, terminal
from deploy.local.launch import OPERATOR, Launcher
from deploy.local.machine import MARK, Notebook, Process, StackError
from deploy.local.postgres import Postgres
from deploy.local.rabbitmq import RabbitMQ
from deploy.local.services import (
    BROKER_SETTING,
    STACK,
    TLS_SETTING,
    Program,
    common_environ,
    programs_of,
    settings_of,
    targets,
)

STOP_TIMEOUT_S = 30.0  # how long a service may take to finish what is in flight
NO_SIGNAL = 0

# Unusual ones, below the range of outgoing connections. Where one is taken, another is picked and remembered.
POSTGRES_PORT, RABBITMQ_PORT = 29_432, 29_672


class Stack:
    """The stack that keeps its state in `root`/.local. Wrap what changes it in `changing` or `used`."""

    def __init__(
        self,
        root: Path,
        programs: Sequence[Program] = STACK,
        environ: Mapping[str, str] = os.environ,
        *,
        number_of_cells: int | None = None,
    ) -> None:
        """`programs` are those of a chain with one cell. How many it has is told by those that run, or by the caller,
        unless it is given.
        """
        self.root = root.resolve()
        self.home = self.root / ".local"
        self._caller = environ
        self._make_home()
        self._remembered = Notebook(self.home / "run" / "settings.json")
        self.cells = number_of_cells or cells.count(self._remembered.read() if self._ours() else environ)
        self.programs = programs_of(self.cells, programs)
        # Apart: a branch's sales would be in a database that is another cell's where there are more, or fewer.
        data = self.home if self.cells == 1 else self.home / f"{self.cells}-cells"
        (data / "run").mkdir(mode=0o700, parents=True, exist_ok=True)
        self._users, self._temporary = data / "run" / "users", Notebook(data / "run" / "temporary.json")
        self.postgres, self.rabbitmq = self._servers(data)
        self.launcher = Launcher(
            self.root, self.home, data, self.programs, environ, self.postgres, self.rabbitmq, self.log_of
        )

    def _make_home(self) -> None:
        self.home.mkdir(mode=0o700, exist_ok=True)
        if self.home.stat().st_uid != os.geteuid():
            raise StackError(f"{self.home} belongs to another user: run make as that user, or remove it")
        for name in ("run", "log"):
            (self.home / name).mkdir(exist_ok=True)

    def _servers(self, data: Path) -> tuple[Postgres, RabbitMQ]:
        """Those with their data there."""
        return (
            Postgres(data / "postgres", log=self.log_of("postgres"), preferred_port=POSTGRES_PORT),
            RabbitMQ(data / "rabbitmq", log=self.log_of("rabbitmq"), preferred_port=RABBITMQ_PORT),
        )

    def log_of(self, name: str) -> Path:
        return self.home / "log" / f"{name}.log"

    # --- what there is ---

    @property
    def settings(self) -> dict[str, str]:
        """The caller's settings, on top of those that the running services were started with."""
        caller = settings_of(self._caller)
        if self._caller.get(MARK) == str(self.home):  # a shell that has read one of our .env files
            theirs = {BROKER_SETTING, cells.FILE_SETTING, *(database.setting for database in self.launcher.databases)}
            if caller.pop(cells.CELL_SETTING, None):  # one cell's addresses are not those of the first
                theirs |= {name for name in caller if name.endswith("_LISTEN")}
            caller = {name: value for name, value in caller.items() if name not in theirs}
        return (self._remembered.read() if any(self._instances().values()) else {}) | caller

    def processes(self) -> dict[str, Process | None]:
        """All that belongs to the stack with the present settings, in the order of starting."""
        settings = self.settings
        servers: dict[str, Process | None] = {}
        if self.launcher.local_databases(settings):
            servers["postgres"] = self.postgres.process
        if BROKER_SETTING not in settings:
            servers["rabbitmq"] = self.rabbitmq.process
        return servers | {name: found[0] if found else None for name, found in self._instances().items()}

    def endpoints(self) -> dict[str, tuple[str, str]]:
        """Where each is found, and where its metrics are."""
        settings, running = self.settings, self.processes()
        found = {}
        for program in self.programs:
            own, metrics = program.addresses(settings).values()
            found[program.name] = (own.target, f"http://{metrics.target}/metrics")
        if "postgres" in running:
            found["postgres"] = (self.postgres.address, "")
        if "rabbitmq" in running:
            found["rabbitmq"] = (self.rabbitmq.address, "")
        return found

    def _instances(self) -> dict[str, list[Process]]:
        """Each service's processes, oldest first. Found by what they are: one started by hand counts too."""
        ours = sorted(self._ours(), key=lambda process: process.started)
        return {
            program.name: [it for it in ours if _runs(it, program) and self._is_of_cell(it, program)]
            for program in self.programs
        }

    def _ours(self) -> list[Process]:
        return machine.find(lambda process: process.environ.get(MARK) == str(self.home))

    def _is_of_cell(self, process: Process, program: Program) -> bool:
        told = cells.environ(program, self.launcher.cells_file)
        with suppress(OSError):  # it has ended meanwhile
            return not told or process.environ.get(cells.CELL_SETTING, "") == told[cells.CELL_SETTING]
        return False

    # --- start ---

    def start(self) -> list[str]:
        """Start what does not run, and wait until all of it serves; the names of what was started."""
        settings, running = self.settings, self.processes()
        self._require_same_transport(settings)
        self._require_same_cells(settings)
        missing = [program for program in self.programs if not running[program.name]]
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

    def _require_same_cells(self, settings: Mapping[str, str]) -> None:
        if (asked := cells.count(settings)) != self.cells:
            raise StackError(f"CELLS={asked}, but the services run with CELLS={self.cells}: `make stop` first")

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
        local_broker, local_databases = BROKER_SETTING not in settings, self.launcher.local_databases(settings)
        if settings.get(TLS_SETTING) == "1":
            with terminal.step("certificates"):
                self.rabbitmq.tls = self.launcher.make_certificates(settings)
        if local_broker:
            self._ensure_rabbitmq_is_there()
            self.rabbitmq.launch()
        if local_databases:
            with terminal.step("PostgreSQL"):
                self.postgres.start()
                for database in local_databases:
                    self.postgres.ensure_login(database.owner, creates_roles=True)
                    self.postgres.ensure_database(database.name, database.owner)
                for service in self.launcher.services:
                    if service.database in local_databases:
                        self.postgres.ensure_group(service.role, service.database.owner, service.database.name)
        if local_broker:
            with terminal.step("RabbitMQ"):
                self.rabbitmq.wait()

    def _ensure_rabbitmq_is_there(self) -> None:
        if programs.find():
            return
        with terminal.step("fetch RabbitMQ (once)"):
            programs.fetch()

    def _start_services(self, missing: Sequence[Program], settings: Mapping[str, str]) -> None:
        if missing:
            with terminal.step("migrations"):
                self.launcher.migrate(settings)
                self.launcher.make_logins(settings)
        if file := self.launcher.cells_file:
            cells.write(file, self.programs, settings)
        with terminal.step("services"):
            started = {program.name: self.launcher.spawn(program, settings) for program in missing}
            running = {name: found[0] for name, found in self._instances().items() if found}
            for program in self.programs:  # all: PostgreSQL may just have come back for those that ran
                if process := (running | started).get(program.name):
                    self.launcher.wait_ready(program, process, settings)

    @contextmanager
    def _ports_reserved(self, programs: Sequence[Program], settings: Mapping[str, str]) -> Iterator[None]:
        """Keep the ports for the services until they have them: outgoing connections might get them meanwhile.

        All taken ports are named at once, with the settings that move them.
        """
        problems: list[str] = []
        claimed: dict[int, str] = {}
        with ExitStack() as reserved:
            for program in programs:
                for setting, address in program.addresses(settings).items():
                    port, what = address.port, f"port {address.port} ({program.name}, {setting})"
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
        own = self.launcher.data
        others = [] if names is not None else [data for data in (self.home, *self.home.glob("?-cells")) if data != own]
        for postgres, rabbitmq in ((self.postgres, self.rabbitmq), *map(self._servers, others)):
            for name, server in (("rabbitmq", rabbitmq), ("postgres", postgres)):
                if _in(name, names):
                    self._stop_server(name, server)

    def _stop_server(self, name: str, server: Postgres | RabbitMQ) -> None:
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
        with self._users.open("w") as users:
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
        identity = self.launcher.identity(OPERATOR, settings)
        tills = {"TILL_CERTIFICATES": str(self.launcher.certificates)} if identity else {}
        listed = {cells.FILE_SETTING: str(file)} if (file := self.launcher.cells_file) else {}
        return environ | targets(self.programs, settings) | listed | identity | tills


def _runs(process: Process, program: Program) -> bool:
    return is_call_of(program.command, process.argv)


def is_call_of(command: Sequence[str], argv: Sequence[str]) -> bool:
    """Whether a process was started as `python -m relay_svc serve`, or as `retail-relay serve`."""
    package, *arguments = command
    script = f"retail-{package.removesuffix('_svc')}"
    named = [script if os.path.basename(word) == script else word for word in argv]
    ways = ["-m", package, *arguments], [script, *arguments]
    return any(named[start : start + len(way)] == way for way in ways for start in range(len(named)))


def _in(name: str, names: Collection[str] | None) -> bool:
    return names is None or name in names
