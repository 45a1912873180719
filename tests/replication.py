"""A PostgreSQL server and its standby, with streaming replication over a line that can be cut.

with replicated(directory) as pair:
    pair.primary.connect()  # its commits wait for the standby
    pair.cut()              # ... and now for ever
    pair.promote()          # the primary dies; what the standby has is all that is left
"""

import itertools
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
from psycopg import sql

from deploy.local.machine import StackError, wait_until
from deploy.local.postgres import Postgres, as_ordinary_user, binaries
from tests.faults.proxy import Loop, Proxy

STANDBY = "standby"  # as which it is known to synchronous_standby_names
COPY_TIMEOUT_S = 120.0
CAUGHT_UP_TIMEOUT_S = 60.0
PROMOTED_TIMEOUT_S = 60.0
# After a cut, both ends find each other again at once; after a crash, the primary still has what its standby lacks.
SETTINGS: Mapping[str, str] = {
    "wal_keep_size": "1GB",
    "wal_sender_timeout": "5s",
    "wal_receiver_timeout": "5s",
    "wal_retrieve_retry_interval": "100ms",
}


class Replicated:
    """`primary` streams to `standby`, and a commit waits for it. Use it as `with replicated(...) as pair`."""

    def __init__(self, primary: Postgres, standby: Postgres, loop: Loop) -> None:
        """`primary` runs; `standby` has no data yet."""
        self.primary, self.standby = primary, standby
        self.promoted = False
        self._databases = itertools.count(1)
        host, _, port = primary.address.partition(":")
        self.line = Proxy(loop, "standby>primary", (host, int(port)))

    def start(self) -> None:
        """Copy the primary, start the copy as its standby, and have commits wait for it."""
        _copy(self.primary, self.standby, self.line.address)
        self.standby.start()
        self.require_standby()
        self._await_sync()

    def require_standby(self, names: str = f"ANY 1 ({STANDBY})") -> None:
        with self.primary.connect() as connection:
            connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
            connection.execute("SELECT pg_reload_conf()")

    def cut(self) -> None:
        """The standby hears nothing more, and the primary has none."""
        self.line.deafen()
        self.line.cut()
        assert wait_until(lambda: self._standbys() == [], CAUGHT_UP_TIMEOUT_S)

    def mend(self) -> None:
        """The standby comes back, and catches up."""
        self.line.cut()
        self.line.heal()
        self._await_sync()

    def restart(self) -> None:
        """A fast restart of the primary, which does not wait for those who wait for the standby."""
        self.primary.stop()
        self.primary.start()

    def waiting(self) -> int:
        """How many sessions of the primary wait for the standby with their commit."""
        with self.primary.connect() as connection:
            row = connection.execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'").fetchone()
        return int(row[0]) if row else 0

    def cancel_waits(self) -> int:
        """What an operator does with a statement that hangs; returns how many did."""
        with self.primary.connect() as connection:
            return connection.execute(
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
            ).rowcount

    def promote(self) -> None:
        """The primary dies as if its machine had lost power; the standby takes over, and waits for nobody."""
        self.promoted = True
        self.primary.kill()
        self.line.cut()
        with self.standby.connect() as connection:
            connection.execute("SELECT pg_promote(wait => false)")
        assert wait_until(lambda: not _in_recovery(self.standby), PROMOTED_TIMEOUT_S)

    def database(self, kind: str, migrate: Callable[[str], None]) -> str:
        """The URL of another database of that kind on the primary, migrated, a copy of the first one."""
        name = f"{kind}_{next(self._databases)}"
        with self.primary.connect() as connection:
            if not connection.execute("SELECT FROM pg_database WHERE datname = %s", [kind]).rowcount:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(kind)))
                migrate(self.primary.url(kind))
            connection.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(kind))
            )
        return self.primary.url(name)

    def on_standby(self, url: str) -> str:
        """The URL of the same database there."""
        return self.standby.url(urlsplit(url).path[1:])

    def reset(self) -> None:
        """As it was at the start."""
        self.line.heal()
        self.require_standby()
        self._await_sync()

    def close(self) -> None:
        self.line.close()
        self.standby.kill()
        self.primary.kill()

    def _standbys(self) -> list[str]:
        with suppress(psycopg.OperationalError), self.primary.connect() as connection:
            return [str(state) for (state,) in connection.execute("SELECT sync_state FROM pg_stat_replication")]
        return ["the primary does not answer"]

    def _await_sync(self) -> None:
        if not wait_until(lambda: self._standbys() == ["quorum"], CAUGHT_UP_TIMEOUT_S):
            raise StackError(f"the standby is not there: {self._standbys()}; see {self.standby.log}")


def _in_recovery(server: Postgres) -> bool:
    with suppress(psycopg.OperationalError), server.connect() as connection:
        return connection.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)
    return True


def _copy(primary: Postgres, standby: Postgres, through: str) -> None:
    """A base backup. The copy has the primary's passwords, and looks for it at the address `through`."""
    standby.directory.mkdir(parents=True, exist_ok=True)
    passwords = {name: value for name, value in primary.notes.read().items() if name.startswith("password")}
    standby.notes.write({**standby.notes.read(), **passwords})
    url = urlsplit(primary.url())
    credentials = url.netloc.rpartition("@")[0]
    source = url._replace(netloc=f"{credentials}@{through}", query=f"application_name={STANDBY}").geturl()
    data = standby.directory / "data"
    shutil.rmtree(data, ignore_errors=True)
    command = [*as_ordinary_user(), str(binaries() / "pg_basebackup"), "--dbname", source, "--pgdata", str(data)]
    options = "--write-recovery-conf --wal-method=stream --checkpoint=fast --no-sync --no-password"
    done = subprocess.run(
        [*command, *options.split()],
        capture_output=True,
        text=True,
        cwd=standby.directory,
        timeout=COPY_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise StackError(f"pg_basebackup failed:\n{done.stdout}{done.stderr}")


@contextmanager
def replicated(directory: Path) -> Iterator[Replicated]:
    """A primary and its synchronous standby, each in a directory of its own, from their start to their end."""
    loop = Loop()
    settings = {**SETTINGS, "shared_buffers": "64MB", "max_wal_size": "1GB"}
    primary, standby = (Postgres(directory / name, settings=settings) for name in ("primary", "standby"))
    pair: Replicated | None = None
    try:
        primary.start()
        pair = Replicated(primary, standby, loop)
        pair.start()
        yield pair
    finally:
        if pair is not None:
            pair.close()
        primary.kill()
        loop.close()
        shutil.rmtree(directory, ignore_errors=True)
