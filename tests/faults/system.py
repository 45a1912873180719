"""The whole system, out of process: servers of its own, each service twice, a proxy on every connection.

Whatever dies is started again a moment later, as an operator's supervisor would. Nothing here touches a developer's
stack: ports, data and processes are this run's own, below `.local/faults`, and are gone in the end.
"""

import fcntl
import importlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import pika
import psycopg
from pika.adapters.blocking_connection import BlockingChannel

from deploy.healthcheck import is_serving
from deploy.local import cells, machine
from deploy.local.machine import StackError, pick_port, wait_until
from deploy.local.postgres import Postgres
from deploy.local.rabbitmq import RabbitMQ
from deploy.local.services import BROKER_SETTING, SERVICES, Service, common_environ, programs_of
from deploy.local.services import service_environ as environ_of
from tests import broker_cluster
from tests.faults.identities import OPERATOR, Identities
from tests.faults.proxy import Loop, Proxy
from tests.pooler import Pooler, kill_left
from tests.replication import SETTINGS as REPLICATION_SETTINGS
from tests.replication import Replicated

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".local" / "faults"
POOLED = 2  # which copy of a service finds PostgreSQL behind a pooler
COPIES = {"purchases": 2, "relay": 2, "consumer": 2, "analytics": 1}
START_TIMEOUT_S = 120.0
MIGRATE_TIMEOUT_S = 120.0
SUPERVISE_EVERY_S = 0.05
BROKER_TIMEOUT_S = 10.0
KILL_TIMEOUT_S = 10.0
QUEUE_SETTLE_S = 2.5  # RabbitMQ 3.10, killed within two seconds of declaring a quorum queue, leaves it broken

# Not UTC, and not this machine's: whoever cuts days by the wrong clock is found out.
TIME_ZONE = "America/New_York"
SETTINGS = {
    "BUSINESS_TIME_ZONE": TIME_ZONE,
    "RELAY_CONFIRM_TIMEOUT_S": "3",  # sooner than by default, so that a fault need not last as long
    "PURCHASES_BACKLOG_MONTHS": "0",
    "PURCHASES_FLUSH_TIMEOUT_S": "5",
}
POSTGRES_SETTINGS = {**REPLICATION_SETTINGS, "shared_buffers": "128MB", "max_wal_size": "1GB"}


Connection: TypeAlias = "psycopg.Connection[tuple[object, ...]]"


@dataclass(eq=False)
class Instance:
    """One process of a service, and its successors."""

    name: str
    service: Service
    environ: dict[str, str]
    address: str  # where it listens
    directory: Path
    identities: Identities
    process: "subprocess.Popen[bytes] | None" = None
    wanted: bool = True
    not_before: float = 0.0  # monotonic: when it may be started again
    starts: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)  # held by the fault that has it

    @property
    def log(self) -> Path:
        return self.directory / "log" / f"{self.name}.log"

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def ready(self) -> bool:
        return self.alive and is_serving(self.address, self.identities.credentials(OPERATOR))

    @property
    def arming(self) -> Path:
        """The file that tells `tests.faults.crashing` where to die."""
        return self.directory / "armed" / self.name

    def send(self, number: int) -> None:
        """Nothing happens when it is dead: Popen knows its own child."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)

    def kill(self, down_s: float = 0.0) -> None:
        """kill -9; it comes back after `down_s`."""
        self.not_before = time.monotonic() + KILL_TIMEOUT_S + down_s
        self.send(signal.SIGKILL)
        if self.process is not None:
            self.process.wait(KILL_TIMEOUT_S)
        self.not_before = time.monotonic() + down_s


class System:
    """See the module. Use it as `with running(...) as system`."""

    def __init__(
        self,
        directory: Path,
        planted: str | None,
        copies: Mapping[str, int],
        *,
        cluster: bool,
        certified: bool,
        number_of_cells: int,
    ) -> None:
        self.directory, self._planted = directory, planted
        self.cells = number_of_cells
        self._services = [it for it in programs_of(number_of_cells, SERVICES) if isinstance(it, Service)]
        # Where there are several cells, each has one copy of what it has of its own.
        per_cell = {it.kind: number_of_cells for it in self._services if it.per_cell and number_of_cells > 1}
        self._copies = {**copies, **per_cell}
        for name in ("log", "armed"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self.identities = Identities(directory / "certificates" if certified else None)
        log = directory / "log"
        self._servers = itertools.count(1)
        self.postgres = self._server()  # the primary
        self.pair: Replicated | None = None  # of which it is one
        self.pooler: Pooler | None = None  # between it and the second copy of each service
        self.nodes: list[broker_cluster.Node] = []  # the broker's, where it is a cluster
        if cluster:
            self.nodes = broker_cluster.make_nodes(directory / "rabbitmq", log)
        self.brokers: Sequence[RabbitMQ] = self.nodes or [RabbitMQ(directory / "rabbitmq", log=log / "rabbitmq.log")]
        self.rabbitmq = self.brokers[0]
        self.postgres_lock, self.rabbitmq_lock = threading.Lock(), threading.Lock()
        self.loop = Loop()
        self.proxies: dict[str, Proxy] = {}  # "relay-1>rabbitmq"
        self._to_primary: list[Proxy] = []  # those of them that no pooler is behind
        self.instances: dict[str, Instance] = {}
        self.set_back = 0  # how often a failover may have taken back what could be read
        self._stop = threading.Event()
        self.ending = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        self.keep = False
        self.trouble: list[str] = []  # what nobody ordered: a process that ended by itself

    def _server(self) -> Postgres:
        name = f"postgres-{next(self._servers)}"
        return Postgres(self.directory / name, log=self.directory / "log" / f"{name}.log", settings=POSTGRES_SETTINGS)

    # --- where everything is ---

    def url(self, database: str) -> str:
        """A superuser's, straight to the server: for the rig itself."""
        return self.postgres.url(database)

    def databases(self, kind: str) -> list[str]:
        """All of that kind, by their names: of purchases, that of each cell."""
        return list(dict.fromkeys(it.database.name for it in self._services if it.database.kind == kind))

    def cell_of(self, branch_id: int) -> int:
        """The number of the cell that has the branch; see `deploy.local.cells.spread`."""
        return (branch_id - 1) % self.cells + 1

    def targets_of(self, branch_id: int) -> list[str]:
        """The purchases services that record its sales."""
        every = self.of("purchases")
        if self.cells > 1:
            every = [instance for instance in every if instance.service.cell == self.cell_of(branch_id)]
        return [self.target(instance) for instance in every]

    @property
    def amqp_url(self) -> str:
        return self.rabbitmq.url

    def of(self, service: str) -> list[Instance]:
        return [instance for instance in self.instances.values() if instance.service.kind == service]

    def target(self, instance: Instance) -> str:
        """Where the tills find it."""
        return self.proxies[f"tills>{instance.name}"].address

    def proxies_to(self, server: str) -> list[Proxy]:
        """`postgres`, `rabbitmq`, or a service's name for those on the way to it."""
        return [proxy for name, proxy in self.proxies.items() if name.partition(">")[2].startswith(server)]

    # --- start ---

    def start(self, say: Callable[[str], None]) -> None:
        say("starting a PostgreSQL and a RabbitMQ of its own")
        for node in self.brokers:
            node.launch()
        self.postgres.start()
        for database in dict.fromkeys(service.database for service in self._services):
            self.postgres.ensure_login(database.owner, creates_roles=True)
            self.postgres.ensure_database(database.name, database.owner)
            self._migrate(database.setting, self.postgres.url(database.name, database.owner), database.migrate)
        if self._planted:
            prepare = getattr(importlib.import_module(f"tests.faults.planted.{self._planted}"), "prepare", None)
            if prepare is not None:
                for name in self.databases("purchases"):
                    with self.database(name) as purchases, self.database("analytics") as analytics:
                        prepare(purchases, analytics)
        for service in self._services:
            self.postgres.ensure_group(service.role, service.database.owner, service.database.name)
            self.postgres.ensure_login(service.login, member_of=service.role)
        self.pair_up()
        self._start_pooler()
        self.start_broker()
        self._make_instances()
        say("starting the services")
        self._supervisor.start()
        self.wait_ready()
        time.sleep(QUEUE_SETTLE_S)

    def start_servers(self) -> None:
        """All that do not run."""
        assert self.pooler is not None
        self.postgres.start()
        self.pooler.start()
        self.start_broker()

    def start_broker(self) -> None:
        """All of it that does not run."""
        if self.nodes:
            broker_cluster.start(self.nodes)
        else:
            self.rabbitmq.start()

    def _start_pooler(self) -> None:
        line = self._proxy("pooler", "postgres", _host_and_port(self.postgres.address))
        users = {service.login: self.postgres.notes.password(service.login) for service in self._services}
        log = self.directory / "log" / "pooler.log"
        self.pooler = Pooler(self.directory / "pooler", line.address, users, log=log)
        self.pooler.start()

    def _migrate(self, setting: str, url: str, command: tuple[str, ...]) -> None:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            env={**_clean_environ(), **common_environ(self.directory), **SETTINGS, setting: url},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=MIGRATE_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise StackError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")

    def _make_instances(self) -> None:
        services = {(service.kind, service.cell): service for service in self._services}
        names = [(name, number) for name, copies in self._copies.items() for number in range(1, copies + 1)]
        ports = {f"{name}-{number}": pick_port() for name, number in names}
        for name, number in names:
            service, own = services.get((name, number)) or services[name, 1], f"{name}-{number}"
            address = f"127.0.0.1:{ports[own]}"
            settings = SETTINGS | {
                f"{service.prefix}_LISTEN": address,
                f"{service.prefix}_METRICS_LISTEN": f"127.0.0.1:{pick_port()}",
            }
            for called in service.calls:  # the first copy calls the first, the second the second
                callee = f"{called}-{min(number, self._copies[called])}"
                proxy = self._proxy(own, callee, ("127.0.0.1", ports[callee]))
                settings[f"{called.upper()}_TARGET"] = proxy.address
            # A cell has one copy of its own, and pgbouncer may die of a cancellation: that must not be the cell's end.
            pooled = number == POOLED and not (service.per_cell and self.cells > 1)
            urls = {service.database.setting: self._database_url(own, service, pooled=pooled)}
            if service.uses_broker:
                urls[BROKER_SETTING] = self._broker_url(own, name)
            environ = {**_clean_environ(), **common_environ(self.directory)}
            environ |= environ_of(service, self._services, settings, urls)
            environ |= cells.environ(service, self._cells_file(own, service, ports) if self.cells > 1 else None)
            environ |= self.identities.settings(name)
            instance = Instance(own, service, environ, address, self.directory, self.identities)
            instance.environ["FAULT_FILE"] = str(instance.arming)
            if self._planted:
                instance.environ["PLANTED"] = self._planted
            self.instances[own] = instance
            if name in ("purchases", "analytics"):
                self._proxy("tills", own, ("127.0.0.1", ports[own]))

    def _cells_file(self, own: str, service: Service, ports: Mapping[str, int]) -> Path:
        """Each process has one of its own, in which every cell is behind a line; in those of the purchases services, it
        is the tills'.
        """
        client = own if "purchases" in service.calls else "tills"
        lines = {
            f"{it.prefix}_LISTEN": self._proxy(client, f"{it.kind}-{it.cell}", ("127.0.0.1", port)).address
            for it in self._services
            if it.per_cell and (port := ports[f"{it.kind}-{it.cell}"])
        }
        file = self.directory / f"{own}.cells.toml"
        cells.write(file, self._services, lines)
        return file

    def _proxy(self, client: str, server: str, target: tuple[str, int]) -> Proxy:
        name = f"{client}>{server}"
        if name not in self.proxies:
            self.proxies[name] = Proxy(self.loop, name, target)
        return self.proxies[name]

    def _database_url(self, own: str, service: Service, *, pooled: bool) -> str:
        """The URL with the address of a line in it, to the server or to the pooler."""
        assert self.pooler is not None
        server = ("127.0.0.1", self.pooler.port) if pooled else _host_and_port(self.postgres.address)
        line = self._proxy(own, "postgres", server)
        if not pooled:
            self._to_primary.append(line)
        return self.postgres.url(service.database.name, service.login).replace(self.postgres.address, line.address)

    def _broker_url(self, own: str, user: str) -> str:
        """The same for each node of the broker."""
        lines = [
            self._proxy(own, f"rabbitmq-{n}" if n > 1 else "rabbitmq", _host_and_port(node.address))
            for n, node in enumerate(self.brokers, 1)
        ]
        return self.rabbitmq.url_of(user).replace(self.rabbitmq.address, ",".join(line.address for line in lines))

    # --- the primary and its standby ---

    def pair_up(self) -> None:
        """Give the primary a standby, for which its commits wait."""
        self.pair = Replicated(self.postgres, self._server(), self.loop)
        self.pair.start()

    def fail_over(self, *, lacking: bool = False) -> None:
        """The primary is dead for good; its standby takes over, clients find it, and it gets a standby of its own.

        `lacking`: the standby lacks what could be read from the primary.
        """
        assert self.pair is not None
        self.pair.promote()
        self.set_back += lacking  # before anybody can look at the new one, and when nobody can at the old one
        dead, self.postgres = self.postgres, self.pair.standby
        self.pair.line.close()
        for proxy in [*self._to_primary, self.proxies["pooler>postgres"]]:
            proxy.lead_to(_host_and_port(self.postgres.address))
        shutil.rmtree(dead.directory, ignore_errors=True)
        self.pair_up()

    # --- life ---

    def _supervise(self) -> None:
        """Start what is wanted and dead. All services are children of this one thread: they die with it."""
        while not self._stop.wait(SUPERVISE_EVERY_S):
            for instance in self.instances.values():
                if instance.wanted and not instance.alive and time.monotonic() >= instance.not_before:
                    self._spawn(instance)
            if self.pooler is not None and self.pooler.died:
                self.pooler.start()

    def _spawn(self, instance: Instance) -> None:
        ordered = 0, -signal.SIGKILL, -signal.SIGTERM  # the latter: told to drain before it could listen to signals
        if instance.process is not None and instance.process.returncode not in ordered:
            instance.not_before = time.monotonic() + 1  # once a second is often enough
            said = machine.tail(instance.log)
            self.trouble.append(
                f"{instance.name} ended by itself with exit code {instance.process.returncode}:\n{said}"
            )
        with instance.log.open("ab") as log:
            instance.process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.crashing", *instance.service.command],
                env=instance.environ,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        instance.starts += 1

    def wait_ready(self, within_s: float = START_TIMEOUT_S) -> None:
        everything = self.instances.values()

        def settled() -> bool:
            return bool(self.trouble) or all(instance.ready for instance in everything)

        if not wait_until(settled, within_s) or self.trouble:
            late = [instance for instance in self.instances.values() if not instance.ready]
            ends = "\n".join(f"{instance.name}:\n{machine.tail(instance.log)}" for instance in late)
            raise StackError("\n".join([*self.trouble, f"not ready within {within_s:.0f} s: {ends}"]))

    def heal(self) -> None:
        """End every fault that has not ended by itself."""
        for proxy in self.proxies.values():
            proxy.heal()
        if self.pair is not None:
            self.pair.line.heal()
        for instance in self.instances.values():
            instance.arming.unlink(missing_ok=True)
            instance.wanted, instance.not_before = True, 0.0
            instance.send(signal.SIGCONT)

    def pause(self, seconds: float) -> None:
        """For faults, between breaking and mending. Raises StackError when the run ends meanwhile."""
        if self.ending.wait(seconds):
            raise StackError("the run ends")

    @contextmanager
    def database(self, name: str) -> Iterator[Connection]:
        with psycopg.connect(self.url(name), autocommit=True, connect_timeout=5) as connection:
            yield connection

    @contextmanager
    def connections(self) -> Iterator[tuple[dict[str, Connection], Connection]]:
        """Those to all purchases databases, by their names, and to that of the read models, each in a transaction."""
        with ExitStack() as opened:
            names = [*self.databases("purchases"), "analytics"]
            every = {name: opened.enter_context(psycopg.connect(self.url(name), connect_timeout=5)) for name in names}
            analytics = every.pop("analytics")
            yield every, analytics

    @contextmanager
    def channel(self) -> Iterator[BlockingChannel]:
        """A channel straight to the broker."""
        parameters = pika.URLParameters(self.rabbitmq.url)
        parameters.socket_timeout = parameters.stack_timeout = parameters.blocked_connection_timeout = BROKER_TIMEOUT_S
        with pika.BlockingConnection(parameters) as connection:
            yield connection.channel()

    def close(self) -> None:
        self._stop.set()
        if self._supervisor.is_alive():
            self._supervisor.join()
        for instance in self.instances.values():
            instance.send(signal.SIGKILL)
        for instance in self.instances.values():
            if instance.process is not None:
                instance.process.wait(10)
        for proxy in self.proxies.values():
            proxy.close()
        if self.pair is not None:
            self.pair.close()
        self.loop.close()
        if self.pooler is not None:
            self.pooler.kill()
        self.rabbitmq.kill()
        for node in self.nodes:
            node.end()
        self.postgres.kill()


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.partition(":")
    return host, int(port)


def _clean_environ() -> dict[str, str]:
    """The caller's, without what configures our services or any other stack."""
    prefixes = (
        "PURCHASES_",
        "RELAY_",
        "CONSUMER_",
        "ANALYTICS_",
        "AMQP_",
        "BUSINESS_",
        "CELL",
        "LOG_",
        "TLS",
        "FAULT",
        "PLANTED",
        "PG",
    )
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


@contextmanager
def running(
    say: Callable[[str], None],
    planted: str | None = None,
    copies: Mapping[str, int] = COPIES,
    *,
    cluster: bool = False,
    certified: bool = False,
    number_of_cells: int = 1,
) -> Iterator[System]:
    """The system from its start to its end; with `system.keep`, logs and ledger stay behind. `cluster`: three nodes of
    RabbitMQ instead of one; `certified`: mutual TLS for every call.
    """
    HOME.mkdir(parents=True, exist_ok=True)
    _clean_up_after_the_dead()
    directory = HOME / f"{os.getpid()}-{random.SystemRandom().randrange(10_000):04}"
    directory.mkdir()
    with ExitStack() as stack:
        lock = stack.enter_context((directory / "lock").open("w"))
        machine.try_lock(lock.fileno(), fcntl.LOCK_EX)
        system = System(
            directory, planted, copies, cluster=cluster, certified=certified, number_of_cells=number_of_cells
        )
        stack.callback(_throw_away, system)
        stack.callback(system.close)
        system.start(say)
        yield system


def _throw_away(system: System) -> None:
    data = [*_postgres_of(system.directory), system.directory / "rabbitmq", system.directory / "pooler"]
    for directory in data if system.keep else [system.directory]:
        shutil.rmtree(directory, ignore_errors=True)


def _postgres_of(directory: Path) -> list[Path]:
    return list(directory.glob("postgres-*"))


def _clean_up_after_the_dead() -> None:
    """A run that was killed has left its servers behind (its services die with it): nobody holds its lock any more."""
    for directory in HOME.iterdir():
        lock = directory / "lock"
        if not lock.exists():
            continue
        with lock.open("w") as file:
            if machine.try_lock(file.fileno(), fcntl.LOCK_EX):
                servers = _postgres_of(directory)
                with suppress(OSError, StackError):
                    for server in servers:
                        Postgres(server).kill()
                    kill_left(directory / "pooler")
                    for broker in (directory / "rabbitmq", *(directory / "rabbitmq").iterdir()):
                        RabbitMQ(broker).kill()
                if servers:  # else it was kept on purpose
                    shutil.rmtree(directory, ignore_errors=True)
