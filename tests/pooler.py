"""pgbouncer before a PostgreSQL server: an installed one, or Debian's, unpacked below .local.

pooler = Pooler(directory, server.address, {"local_relay": "its password"})
pooler.start()
pooler.kill()  # all its connections, on either side, end at once
pooler.start()  # at the same address
"""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from deploy.local.machine import MARK, Process, StackError, find, pick_port, spawn, tail, wait_until, write_private
from deploy.local.postgres import as_ordinary_user

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 60.0
CONFIGURATION = """\
[databases]
* = host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = trust
auth_file = {users}
pool_mode = {mode}
server_reset_query = DISCARD ALL
max_client_conn = 200
default_pool_size = 100
server_login_retry = 0.2
query_wait_timeout = 10
"""


class Pooler:
    """`mode` is session or transaction. `users` are those who log in, and their passwords."""

    def __init__(
        self, directory: Path, server: str, users: Mapping[str, str], mode: str = "session", log: Path | None = None
    ) -> None:
        self.directory, self.log = directory, log or directory / "log"
        self.port = pick_port()
        self._process: Process | None = None  # None: nobody wants it to run
        directory.mkdir(parents=True)
        write_private(directory / "users.txt", "".join(f'"{name}" "{word}"\n' for name, word in users.items()))
        host, _, port = server.partition(":")
        self._configuration = directory / "pgbouncer.ini"
        self._configuration.write_text(
            CONFIGURATION.format(host=host, port=port, listen=self.port, users=directory / "users.txt", mode=mode)
        )

    def start(self) -> None:
        """Start it unless it runs, and wait until it listens."""
        if _running(self.directory):
            return
        program, environ = _program()
        command = [*as_ordinary_user(), program, str(self._configuration)]
        self._process = spawn(command, {**environ, MARK: str(self.directory)}, self.directory, self.log)
        if not wait_until(self._listens, START_TIMEOUT_S):
            raise StackError(f"pgbouncer did not start; the end of {self.log}:\n{tail(self.log)}")

    def kill(self) -> None:
        self._process = None
        kill_left(self.directory)

    @property
    def died(self) -> bool:
        """Whether it has ended by itself, as 1.18 does when a client that cancels a statement leaves too soon."""
        return self._process is not None and not self._process.alive

    def _listens(self) -> bool:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
            return True
        return False


def kill_left(directory: Path) -> None:
    """End the one that runs in that directory, if any."""
    for process in _running(directory):
        process.end(signal.SIGKILL)


def _running(directory: Path) -> list[Process]:
    return find(lambda it: it.program == "pgbouncer" and it.environ.get(MARK) == str(directory))


def _program() -> tuple[str, dict[str, str]]:
    if installed := shutil.which("pgbouncer", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])):
        return installed, {}
    place = ROOT / ".local" / "pgbouncer"
    subprocess.run(["sh", "deploy/bootstrap.sh", "package", str(place), "pgbouncer"], cwd=ROOT, check=True)
    libraries = os.pathsep.join(map(str, (place / "usr/lib").glob("*-linux-gnu*")))
    return str(place / "usr/sbin/pgbouncer"), {"LD_LIBRARY_PATH": libraries}
