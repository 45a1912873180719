"""A private RabbitMQ node in a directory of its own, run from a RabbitMQ that is installed or unpacked (`programs`).

    broker = RabbitMQ(directory)
    broker.start()
    broker.ctl("list_queues")
    broker.stop()

Private: its ports, node name, cookie, data, configuration, plugins and Erlang port mapper (epmd) are its own and
bound to 127.0.0.1. A system-wide broker is neither used nor disturbed, and any number of these may run at once.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from deploy.broker import PROCESSES, Rights, definitions
from deploy.local import programs
from deploy.local.machine import (
    MARK,
    PORT_ATTEMPTS,
    Notebook,
    Process,
    StackError,
    find,
    port_holder,
    port_is_free,
    spawn,
    tail,
    wait_until,
    write_private,
)
from deploy.local.programs import Programs

USER = "local"  # of a person, and of the tests
USERS: Mapping[str, Rights] = {USER: Rights(configure=".*", write=".*", read=".*"), **PROCESSES}
START_TIMEOUT_S = 90.0  # 4 s on an idle machine
STOP_TIMEOUT_S = 30.0
STARTING_STOP_TIMEOUT_S = 3.0
CTL_TIMEOUT_S = 60.0

CONFIGURATION = """\
listeners.tcp.1 = 127.0.0.1:{port}
# Beside this file. The only users are in there.
load_definitions = definitions.json
# Absolute, since the default (40 % of the machine) would be too much for a guest beside a database.
vm_memory_high_watermark.absolute = 2GiB
disk_free_limit.absolute = 256MiB
# One log, together with what the runtime prints.
log.console = true
log.console.use_colors = off
log.file = false
"""

# Beside the plain listener, which is on the loopback, too: with a certificate, for clients that check it.
TLS_CONFIGURATION = """\
listeners.ssl.1 = 127.0.0.1:{port}
ssl_options.cacertfile = {files.ca}
ssl_options.certfile = {files.certificate}
ssl_options.keyfile = {files.key}
ssl_options.versions.1 = tlsv1.3
ssl_options.versions.2 = tlsv1.2
ssl_options.verify = verify_none
"""

# Two schedulers, as the machine is shared; distribution on the loopback only; epmd is started by us, to be stopped
# with the node. No paths in here: the start script splits this at spaces, and a checkout's path may hold some.
ERLANG_OPTIONS = "+S 2:2 -start_epmd false -kernel inet_dist_use_interface {127,0,0,1}"


class TlsFiles(NamedTuple):
    """A server's certificate, its key, and the CA by which clients check it; PEM."""

    certificate: Path
    key: Path
    ca: Path


class RabbitMQ:
    """One node. `preferred_port` is taken for AMQP if it is free; `settings` adds lines of rabbitmq.conf; without
    `programs` it runs from what there is. With `tls`, to be set before it starts, it speaks TLS, too, and that is what
    its URLs say."""

    def __init__(
        self,
        directory: Path,
        *,
        log: Path | None = None,
        preferred_port: int | None = None,
        settings: Mapping[str, str] | None = None,
        programs: Programs | None = None,
    ) -> None:
        self.directory = directory.resolve()
        self.log = log or self.directory / "rabbitmq.log"
        self.notes = Notebook(self.directory / "notes.json")
        self._complete = self.directory / "complete"  # exists once the first start has succeeded
        self._preferred_port = preferred_port
        self._settings = settings or {}
        self._chosen = programs
        self._launched: Process | None = None
        self.tls: TlsFiles | None = None

    @property
    def process(self) -> Process | None:
        """The node while it runs; just launched, it is its start script still."""
        launched = self._launched if self._launched and self._launched.alive else None
        return launched or self._find("beam.smp")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port('amqp', True)}"

    def start(self) -> bool:
        """Start it unless it runs, and wait until it takes connections; False when it was running."""
        started = self.launch()
        self.wait()
        return started

    def launch(self) -> bool:
        """The first half of `start`, for those who have something to do in the meantime."""
        node = self.process
        running = node is not None and self._settled(node)
        environ = self._environ(running)
        if not self._find("epmd"):
            listens = ["-port", environ["ERL_EPMD_PORT"], "-address", environ["ERL_EPMD_ADDRESS"]]
            spawn([str(self._programs.epmd), *listens], environ, self.directory, self.log)
        if running:
            if self.tls and port_holder(self._port("amqps", True)) != node:
                raise StackError("RabbitMQ runs without TLS: stop it first, `make stop`")
            return False
        if not self._complete.exists():  # a first start that was interrupted: half a database is no database
            shutil.rmtree(self.directory / "mnesia", ignore_errors=True)
        passwords = {user: self.notes.password(user) for user in USERS}
        write_private(self.directory / "definitions.json", json.dumps(definitions(passwords, USERS)))
        configuration = CONFIGURATION.format(port=self._port("amqp", False))
        if self.tls:
            configuration += TLS_CONFIGURATION.format(port=self._port("amqps", False), files=self.tls)
        configuration += "".join(f"{name} = {value}\n" for name, value in self._settings.items())
        write_private(self.directory / "rabbitmq.conf", configuration)
        write_private(self.directory / "enabled_plugins", "[].\n")
        if not (cookie := self.directory / ".erlang.cookie").exists():
            write_private(cookie, secrets.token_hex(32))
        self._launched = spawn([str(self._programs.server)], environ, self.directory, self.log)
        return True

    def wait(self) -> None:
        """The second half of `start`."""
        for _ in range(PORT_ATTEMPTS):
            node = self.process
            if node and self._settled(node):
                self._complete.touch()
                return
            if port_is_free(self._port("amqp", True)):
                break
            self.launch()  # another program was faster: with another port, then
        raise StackError(f"RabbitMQ did not start; the end of {self.log}:\n{tail(self.log)}")

    def stop(self) -> bool:
        """Orderly shutdown, with the port mapper. True when a node that served had to be forced."""
        node, mapper, serves = self.process, self._find("epmd"), self._answers()
        # Asked to stop while it is starting, a node may never do so; but then it holds nothing either.
        patience_s = STOP_TIMEOUT_S if serves else STARTING_STOP_TIMEOUT_S
        forced = node.end(signal.SIGTERM, patience_s) if node else False
        if mapper:
            mapper.end()
        return forced and serves

    def kill(self) -> None:
        """SIGKILL to the node and its port mapper, as if the machine had lost power."""
        for process in (self.process, self._find("epmd")):
            if process:
                process.end(signal.SIGKILL)

    @property
    def url(self) -> str:
        return self.url_of(USER)

    def url_of(self, user: str) -> str:
        """The URL with which one of USERS logs in: a service has its name for that."""
        login = f"{user}:{self.notes.password(user)}"
        if not self.tls:
            return f"amqp://{login}@{self.address}/%2F"
        options = quote(str({"cafile": str(self.tls.ca)}))
        return f"amqps://{login}@127.0.0.1:{self._port('amqps', True)}/%2F?ssl_options={options}"

    def ctl(self, *arguments: str) -> str:
        """What `rabbitmqctl` answers: list_queues, close_all_connections, set_vm_memory_high_watermark, …"""
        done = subprocess.run(
            [self._programs.ctl, "--quiet", *arguments],
            env=self._environ(True),
            capture_output=True,
            text=True,
            timeout=CTL_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise StackError(f"rabbitmqctl {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    @property
    def _programs(self) -> Programs:
        found = self._chosen or programs.find()
        if not found:
            programs.fetch()
            found = programs.find()
        if not found:
            raise StackError("RabbitMQ is not installed")
        return found

    def _port(self, name: str, in_use: bool) -> int:
        return self.notes.port(name, self._preferred_port if name == "amqp" else None, in_use=in_use)

    def _environ(self, running: bool) -> dict[str, str]:
        """The node's whole world; what the caller may have set for another node is taken out."""
        caller = {name: value for name, value in os.environ.items() if not name.startswith(("RABBITMQ_", "ERL_"))}
        epmd_port = self._port("epmd", running or self._find("epmd") is not None)
        here = self.directory
        return caller | {
            MARK: str(here),
            "PATH": self._programs.path,
            "HOME": str(here),  # Erlang's cookie lies there
            "LANG": "C.UTF-8",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(epmd_port),
            "ERL_CRASH_DUMP_SECONDS": "0",  # none: it takes long, and the log says enough
            "RABBITMQ_NODENAME": "local@localhost",  # no other name is sure to resolve
            "RABBITMQ_DIST_PORT": str(self._port("erlang", running)),
            "RABBITMQ_CONF_ENV_FILE": str(here / "none"),  # or the machine's own in /etc would be read
            "RABBITMQ_CONFIG_FILE": str(here / "rabbitmq.conf"),
            "RABBITMQ_CONFIG_FILES": str(here / "none"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(here / "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(here / "enabled_plugins"),
            "RABBITMQ_FEATURE_FLAGS_FILE": str(here / "feature_flags"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(here / "generated"),
            "RABBITMQ_MNESIA_BASE": str(here / "mnesia"),
            "RABBITMQ_LOG_BASE": str(here / "log"),
            "RABBITMQ_PID_FILE": str(here / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": ERLANG_OPTIONS,
            "RABBITMQ_CTL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RUNNING_UNDER_SYSTEMD": "true",  # the script then becomes the node instead of waiting for it as a child
        }

    def _find(self, program: str) -> Process | None:
        """Our process of that program. Marked ones are ours; the node's own helpers carry the mark too."""
        mark = str(self.directory)
        found = find(lambda process: process.program == program and process.environ.get(MARK) == mark)
        return found[0] if found else None

    def _settled(self, node: Process) -> bool:
        """Whether it serves, once it is known: it may be starting still, or already on its way out."""
        if not wait_until(lambda: not node.alive or self._answers(), START_TIMEOUT_S):
            raise StackError(f"RabbitMQ does not answer after {START_TIMEOUT_S:.0f} s; see {self.log}")
        return node.alive

    def _answers(self) -> bool:
        """Whether it, and no other, greets a client: the listener opens last, when everything behind it works."""
        port = self._port("amqp", True)
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                greeted = connection.recv(1) == b"\x01"  # a method frame: Connection.Start
        except OSError:
            return False
        return greeted and port_holder(port) == self.process
