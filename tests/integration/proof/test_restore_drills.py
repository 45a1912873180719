"""The drills of deploy/RUNBOOK.md, with the real processes and commands: what was lost comes back, and is proven.

A drill to watch, with what the commands print:
`make test ARGS='tests/integration/proof/test_restore_drills.py -s'`.
"""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pika
import psycopg
import pytest
from psycopg import sql

from deploy.local.machine import wait_until
from pos.client import Sale
from pos.simulator import simulate
from pos.tills import Tills
from tests.conftest import ROOT
from tests.integration.processes import Processes
from tests.integration.purchase_events import query, read_models

SALES = 240
PATIENCE_S = 120.0
FOUND_AGAIN_S = 60.0  # a service, by those that ask it; their channels try once a second
AGREED, DIFFERENT, PENDING, NO_ANSWER = 0, 1, 3, 4  # exit codes of the audit


class System(Processes):
    """The four processes, the operator's commands, and what may happen to the databases."""

    purchases_url: str
    analytics_url: str
    superuser_url: str

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environ = {**self.environ, "CONSUMER_TARGET": self.address["consumer"], "COLUMNS": "160"}
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        print(f"$ python -m {' '.join(arguments)}\n{done.stdout}{done.stderr}exit code {done.returncode}\n")
        return done

    def audit(self) -> subprocess.CompletedProcess[str]:
        """What the audit says; as an operator would, ask again when the consumer has not found the others yet."""
        said = self.command("analytics_svc", "audit")
        deadline = time.monotonic() + FOUND_AGAIN_S
        while said.returncode == NO_ANSWER and time.monotonic() < deadline:
            said = self.command("analytics_svc", "audit")
        return said

    def restart(self, *names: str) -> None:
        for name in names:
            self.start(name)
        for name in names:
            self.wait_ready(name)

    def sell(self, sales: list[Sale]) -> None:
        with Tills(sales, self.address["purchases"], seed=1) as tills:
            assert tills.wait(PATIENCE_S)

    def wait_counted(self, purchases: int) -> None:
        def counted() -> bool:
            return query(self.analytics_url, "SELECT count(*) FROM analytics_event_log") == [(purchases,)]

        assert wait_until(counted, PATIENCE_S)

    def copy(self, of: str, to: str) -> None:
        """A backup, or its restore: the database `to` becomes what `of` is now."""
        old, new = (psycopg.conninfo.conninfo_to_dict(url)["dbname"] for url in (of, to))
        with psycopg.connect(self.superuser_url, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(str(new))))
            connection.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s", [old])
            connection.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(*map(sql.Identifier, (str(new), str(old))))
            )

    def drop(self, url: str) -> None:
        name = str(psycopg.conninfo.conninfo_to_dict(url)["dbname"])
        with psycopg.connect(self.superuser_url, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def system(purchases_db: str, analytics_db: str, amqp_url: str, postgres_url: str, tmp_path: Path) -> Iterator[System]:
    with System.all_running(purchases_db, analytics_db, amqp_url, tmp_path) as running:
        running.purchases_url, running.analytics_url, running.superuser_url = purchases_db, analytics_db, postgres_url
        yield running


@pytest.fixture
def backup(postgres_url: str) -> Iterator[str]:
    """The URL of a database that is not there yet."""
    name = f"test_{os.getpid()}_backup"
    yield psycopg.conninfo.make_conninfo(postgres_url, dbname=name)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def sales() -> list[Sale]:
    return list(itertools.islice(simulate(5), SALES))


def test_analytics_lost(system: System, sales: list[Sale]) -> None:
    """The read models are gone: made anew and rebuilt, they are what they were."""
    system.sell(sales)
    system.wait_counted(SALES)
    before = read_models(system.analytics_url)
    for name in ("consumer", "analytics"):
        system.stop(name)
    name = str(psycopg.conninfo.conninfo_to_dict(system.analytics_url)["dbname"])
    system.drop(system.analytics_url)
    with psycopg.connect(system.superuser_url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    assert system.command("analytics_svc", "migrate").returncode == 0
    system.restart("consumer", "analytics")
    assert system.audit().returncode in (PENDING, DIFFERENT)
    assert system.command("analytics_svc", "rebuild").returncode == 0
    assert read_models(system.analytics_url) == before
    assert system.audit().returncode == AGREED


def test_analytics_restored_to_yesterday(system: System, sales: list[Sale], backup: str) -> None:
    """What was counted after the backup is missing, and comes back with a rebuild."""
    system.sell(sales[: SALES // 2])
    system.wait_counted(SALES // 2)
    for name in ("consumer", "analytics"):
        system.stop(name)
    system.copy(system.analytics_url, backup)
    system.restart("consumer", "analytics")
    system.sell(sales)
    system.wait_counted(SALES)
    before = read_models(system.analytics_url)
    for name in ("consumer", "analytics"):
        system.stop(name)
    system.copy(backup, system.analytics_url)
    system.restart("consumer", "analytics")
    assert system.audit().returncode in (PENDING, DIFFERENT)
    assert system.command("analytics_svc", "rebuild").returncode == 0
    assert read_models(system.analytics_url) == before
    assert system.audit().returncode == AGREED


def test_purchases_restored_to_a_point_behind_analytics(system: System, sales: list[Sale], backup: str) -> None:
    """Analytics knows sales that purchases has lost: they are named; what the tills still have, they send again."""
    system.sell(sales[: SALES // 2])
    system.wait_counted(SALES // 2)
    for name in ("purchases", "relay"):
        system.stop(name)
    system.copy(system.purchases_url, backup)
    system.restart("purchases", "relay")
    system.sell(sales)
    system.wait_counted(SALES)
    for name in ("purchases", "relay"):
        system.stop(name)
    system.copy(backup, system.purchases_url)
    system.restart("purchases", "relay")
    lost = SALES - SALES // 2
    said = system.audit()
    assert said.returncode == DIFFERENT
    assert f"{lost} counted events that nobody recorded" in said.stdout
    rebuilt = system.command("analytics_svc", "rebuild")
    assert rebuilt.returncode == 0
    assert f"{lost} events had been counted that nobody recorded" in rebuilt.stdout
    assert system.audit().returncode == AGREED
    system.sell(sales)  # from the tills' own memory, with the same keys
    system.wait_counted(SALES + lost)  # with the ids of those that count no more
    assert system.audit().returncode == AGREED
    assert query(system.analytics_url, "SELECT purchases_count FROM sales_totals WHERE branch_id = 0") == [(SALES,)]


def test_broker_emptied(system: System, sales: list[Sale], amqp_url: str) -> None:
    """Messages that the broker lost are marked as sent: a rebuild brings what they said, and nothing is lost."""
    system.stop("consumer")
    system.sell(sales)

    def all_sent() -> bool:
        waiting = "SELECT count(*) FILTER (WHERE status = 'SENT') FROM outbox_events"
        return query(system.purchases_url, waiting) == [(SALES,)]

    assert wait_until(all_sent, PATIENCE_S)
    with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
        assert connection.channel().queue_purge("purchases.created").method.message_count == SALES
    system.restart("consumer")
    assert system.audit().returncode in (PENDING, DIFFERENT)
    assert system.command("analytics_svc", "rebuild").returncode == 0
    assert system.audit().returncode == AGREED
    assert query(system.analytics_url, "SELECT purchases_count FROM sales_totals WHERE branch_id = 0") == [(SALES,)]
