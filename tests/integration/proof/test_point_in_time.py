"""Backup and restore by base backup and archived WAL, to a point in time: one database goes back, the other does not.

What the runbook shows is printed by `make test ARGS='tests/integration/proof/test_point_in_time.py -s'`.
"""

import itertools
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

import purchases_svc.__main__ as purchases
from analytics_svc import database as analytics
from analytics_svc.settings import MigrateSettings as AnalyticsMigrateSettings
from deploy.local.machine import wait_until
from deploy.local.postgres import Postgres, as_ordinary_user, binaries
from pos.client import Sale
from pos.simulator import simulate
from purchases_svc.settings import MigrateSettings
from tests.integration.proof.test_restore_drills import AGREED, DIFFERENT, PATIENCE_S, PENDING, SALES, System
from tests.integration.purchase_events import query, read_models

COMMAND_TIMEOUT_S = 120.0


class Server:
    """A PostgreSQL that keeps all its WAL in a folder, and one base backup beside it."""

    def __init__(self, directory: Path, database: str, migrate: Callable[[str], None]) -> None:
        self._archive, self._base = directory / "archive", directory / "base"
        for folder in (self._archive, self._base):
            folder.mkdir(parents=True)
            folder.chmod(0o777)  # the server runs as another user
        settings = {
            "shared_buffers": "64MB",
            "max_wal_size": "1GB",
            "archive_mode": "on",
            "archive_command": f"test ! -f {self._archive}/%f && cp %p {self._archive}/%f",
            "archive_timeout": "60",
        }
        self.postgres = Postgres(directory / "server", settings=settings)
        self.postgres.start()
        with self.postgres.connect() as connection:
            connection.execute(f"CREATE DATABASE {database}".encode())
        self.url = self.postgres.url(database)
        migrate(self.url)

    def back_up(self) -> None:
        """While everybody works."""
        url = self.postgres.url()
        self._run("pg_basebackup", "--dbname", url, "--pgdata", str(self._base / "1"), "--checkpoint=fast", "--verbose")

    def now(self) -> str:
        ((now,),) = query(self.url, "SELECT now()::text")
        return str(now)

    def restore(self, to: str) -> None:
        """The server that is, is put aside; what the backup and the WAL tell of it up to `to` takes its place."""
        self.postgres.stop()  # its last WAL goes to the archive, too
        data = self.postgres.directory / "data"
        data.rename(data.with_name("data.lost"))
        shutil.copytree(self._base / "1", data, copy_function=shutil.copy)
        subprocess.run(["chown", "-R", f"--reference={self._base / '1'}", data], check=True)
        data.chmod(0o700)
        settings = (
            f"restore_command = 'cp {self._archive}/%f %p'\n"
            f"recovery_target_time = '{to}'\n"
            "recovery_target_action = 'promote'\n"
        )
        with (data / "postgresql.auto.conf").open("a") as file:
            file.write(settings)
        (data / "recovery.signal").touch()
        print(f"$ cat postgresql.auto.conf\n{settings}$ touch recovery.signal; start it")
        self.postgres.start()
        assert wait_until(self._writable, PATIENCE_S)
        recovery = [line for line in self.postgres.log.read_text().splitlines() if "recover" in line]
        print("\n".join(recovery), "\n")

    def _writable(self) -> bool:
        with suppress(psycopg.OperationalError):
            return query(self.url, "SELECT pg_is_in_recovery()") == [(False,)]
        return False

    def _run(self, program: str, *arguments: str) -> None:
        print(f"$ {program} {shlex.join(arguments)}")
        done = subprocess.run(
            [*as_ordinary_user(), binaries() / program, *arguments],
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            cwd=self._base,
            check=False,
        )
        print(done.stdout + done.stderr)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[dict[str, Server]]:
    """A server for each database."""
    started: dict[str, Server] = {}
    try:
        started["purchases"] = Server(
            tmp_path / "purchases", "purchases", lambda url: purchases.migrate_database(MigrateSettings(url))
        )
        started["analytics"] = Server(
            tmp_path / "analytics", "analytics", lambda url: analytics.migrate_database(AnalyticsMigrateSettings(url))
        )
        yield started
    finally:
        for server in started.values():
            server.postgres.kill()


@pytest.fixture
def system(servers: dict[str, Server], amqp_url: str, tmp_path: Path) -> Iterator[System]:
    urls = servers["purchases"].url, servers["analytics"].url
    with System.all_running(*urls, amqp_url, tmp_path) as running:
        running.purchases_url, running.analytics_url = urls
        yield running


@pytest.fixture
def sales() -> list[Sale]:
    return list(itertools.islice(simulate(5), SALES))


def sell_around(point_of: Server, system: System, sales: list[Sale]) -> str:
    """A backup is made, half of the sales are counted, and then all; returns the moment between them."""
    point_of.back_up()
    system.sell(sales[: SALES // 2])
    system.wait_counted(SALES // 2)
    moment = point_of.now()
    system.sell(sales)
    system.wait_counted(SALES)
    return moment


def stopped(system: System, *names: str) -> None:
    for name in names:
        assert system.stop(name) == 0


def test_analytics_older_than_purchases(servers: dict[str, Server], system: System, sales: list[Sale]) -> None:
    """What was counted after the moment is missing, is named, and comes back."""
    moment = sell_around(servers["analytics"], system, sales)
    before = read_models(system.analytics_url)
    stopped(system, "consumer", "analytics")
    servers["analytics"].restore(moment)
    system.restart("consumer", "analytics")
    assert system.audit().returncode in (PENDING, DIFFERENT)
    assert system.command("analytics_svc", "rebuild").returncode == 0
    assert read_models(system.analytics_url) == before
    assert system.audit().returncode == AGREED


def test_purchases_older_than_analytics(servers: dict[str, Server], system: System, sales: list[Sale]) -> None:
    """Sales that were acknowledged are lost: they are named, the tills send them again, and each counts once.

    The server goes back with its transaction ids, so that they mean other transactions from then on.
    """
    moment = sell_around(servers["purchases"], system, sales)
    stopped(system, "purchases", "relay")
    servers["purchases"].restore(moment)
    system.restart("purchases", "relay")
    lost = SALES - SALES // 2
    assert query(system.purchases_url, "SELECT count(*) FROM purchases") == [(SALES - lost,)]
    said = system.audit()
    assert said.returncode == DIFFERENT
    assert f"{lost} counted events that nobody recorded" in said.stdout
    system.sell(sales)  # from the tills' own memory, with the same keys
    system.wait_counted(SALES + lost)
    rebuilt = system.command("analytics_svc", "rebuild")
    assert rebuilt.returncode == 0
    assert f"{lost} events had been counted that nobody recorded" in rebuilt.stdout
    assert system.audit().returncode == AGREED
    assert query(system.analytics_url, "SELECT purchases_count FROM sales_totals WHERE branch_id = 0") == [(SALES,)]
    assert query(system.purchases_url, "SELECT count(*) FROM purchases") == [(SALES,)]
