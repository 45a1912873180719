"""The local PostgreSQL and RabbitMQ come back from whatever happens to them; each test has its own."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pika
import psycopg
import pytest
from psycopg import sql

import purchases_svc.__main__ as purchases
from analytics_svc import database as analytics_database
from analytics_svc.settings import MigrateSettings as AnalyticsMigrateSettings
from deploy.local import machine, programs
from deploy.local.postgres import Postgres, binaries
from deploy.local.rabbitmq import RabbitMQ
from deploy.local.services import SERVICES
from deploy.passwords import PASSWORDS
from purchases_svc.settings import MigrateSettings as PurchasesMigrateSettings
from tests.conftest import ROOT


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[Postgres]:
    server = Postgres(tmp_path / "a directory" / "postgres")
    yield server
    server.stop()


@pytest.fixture
def rabbitmq(tmp_path: Path) -> Iterator[RabbitMQ]:
    broker = RabbitMQ(tmp_path / "a directory" / "rabbitmq")
    yield broker
    broker.stop()


def _count(server: Postgres) -> int:
    with server.connect() as connection:
        return len(connection.execute("SELECT * FROM kept").fetchall())


def test_postgres_keeps_what_was_committed(postgres: Postgres) -> None:
    """Through a kill -9 of all of it, of its first process alone, and a pid file whose pid has gone to another."""
    assert postgres.start()
    assert not postgres.start()
    with postgres.connect() as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1")

    postgres.kill()
    assert postgres.process is None
    assert postgres.start()
    assert _count(postgres) == 1

    first = postgres.process
    assert first
    first.send(signal.SIGKILL)
    assert first.ended(60)
    assert postgres.start()
    assert _count(postgres) == 1

    assert not postgres.stop()
    (postgres.directory / "data" / "postmaster.pid").write_text(f"{os.getpid()}\n")
    assert postgres.start()
    assert _count(postgres) == 1


def test_postgres_moves_when_its_port_was_taken(postgres: Postgres) -> None:
    postgres.start()
    before = postgres.address
    postgres.stop()
    with socket.create_server(("127.0.0.1", int(before.rpartition(":")[2]))):
        postgres.start()
    assert postgres.address != before
    assert postgres.address in postgres.url()


def test_postgres_forgets_an_interrupted_creation(postgres: Postgres) -> None:
    (postgres.directory / "data.new" / "base").mkdir(parents=True)
    assert postgres.start()


def test_postgres_is_durable_and_checks_what_it_reads(postgres: Postgres) -> None:
    postgres.start()
    with postgres.connect() as connection:
        for name in ("fsync", "synchronous_commit", "data_checksums"):
            assert connection.execute("SELECT current_setting(%s)", [name]).fetchone() == ("on",)


def test_logins_are_made_once_and_hold_one_role(postgres: Postgres) -> None:
    postgres.start()
    postgres.ensure_login("an_owner", creates_roles=True)
    postgres.ensure_database("a_database", "an_owner")
    postgres.ensure_database("other", "an_owner")
    with postgres.connect() as connection:
        connection.execute("CREATE ROLE a_group NOLOGIN")  # by another than its owner, as the tests' migrations do
    for _ in range(2):
        postgres.ensure_database("a_database", "an_owner")
        postgres.ensure_group("a_group", "an_owner", "a_database")
        postgres.ensure_login("a_member", member_of="a_group")
    with psycopg.connect(postgres.url("a_database", "a_member")) as connection:
        groups = connection.execute(
            "SELECT roleid::regrole::text FROM pg_auth_members WHERE member = to_regrole('a_member')"
        )
        assert groups.fetchall() == [("a_group",)]
        rights = "SELECT has_database_privilege('a_database', 'TEMP'), has_database_privilege('other', 'CONNECT')"
        assert connection.execute(rights).fetchone() == (False, False)
    with psycopg.connect(postgres.url("a_database", "an_owner"), autocommit=True) as connection:
        connection.execute("GRANT a_group TO a_member")
        connection.execute("SET ROLE a_group")


def test_an_administrators_file_is_enough(postgres: Postgres) -> None:
    """After deploy/postgres/init.sql, owners that may create no roles migrate, and each process has a login."""
    postgres.start()
    environ = {**os.environ, **{name: f"the {name}" for name in PASSWORDS}}
    psql, file = binaries() / "psql", ROOT / "deploy" / "postgres" / "init.sql"
    subprocess.run([psql, "--quiet", "--set=ON_ERROR_STOP=1", postgres.url(), "--file", file], check=True, env=environ)

    def url(login: str, database: str) -> str:
        password = quote(f"the {login.removeprefix('local_').upper()}_PASSWORD")
        return f"postgresql://{login}:{password}@{postgres.address}/{database}"

    for _ in range(2):
        purchases.migrate_database(PurchasesMigrateSettings(url("purchases_owner", "purchases")))
        analytics_database.migrate_database(AnalyticsMigrateSettings(url("analytics_owner", "analytics")))
    for service in SERVICES:
        own = service.database.name
        other = {"purchases": "analytics", "analytics": "purchases"}[own]
        with psycopg.connect(url(service.login, own)) as connection:
            connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(service.role)))
        with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
            psycopg.connect(url(service.login, other))


def test_a_wrong_password_is_refused(postgres: Postgres) -> None:
    postgres.start()
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(f"postgresql://postgres:guess@{postgres.address}/postgres")


def test_two_that_want_the_same_port_both_come_up(tmp_path: Path) -> None:
    """Two checkouts started at the same moment."""
    port = machine.pick_port()
    servers = [Postgres(tmp_path / name, preferred_port=port) for name in ("one", "two")]
    try:
        with ThreadPoolExecutor() as threads:
            assert list(threads.map(Postgres.start, servers)) == [True, True]
        assert servers[0].address != servers[1].address
    finally:
        for server in servers:
            server.stop()


def test_two_servers_at_once_know_nothing_of_each_other(postgres: Postgres, tmp_path: Path) -> None:
    other = Postgres(tmp_path / "other")
    try:
        assert postgres.start()
        assert other.start()
        postgres.kill()
        assert other.process
        assert other.address != postgres.address
    finally:
        other.stop()


def test_rabbitmq_keeps_what_was_confirmed(rabbitmq: RabbitMQ) -> None:
    """Through a kill -9 of the node and its port mapper; and nothing of it is left when it has stopped."""
    assert rabbitmq.start()
    assert not rabbitmq.start()
    with pika.BlockingConnection(pika.URLParameters(rabbitmq.url)) as connection:
        channel = connection.channel()
        channel.queue_declare("kept", durable=True)
        channel.confirm_delivery()
        channel.basic_publish("", "kept", b"a message", pika.BasicProperties(delivery_mode=2))
    rabbitmq.ctl("eval", "mnesia:sync_log().")  # queues are on the disk only seconds after they were declared

    rabbitmq.kill()
    assert rabbitmq.process is None
    assert rabbitmq.start()
    assert machine.wait_until(lambda: rabbitmq.ctl("list_queues", "--silent").split()[:1] == ["kept"], 60)
    with pika.BlockingConnection(pika.URLParameters(rabbitmq.url)) as connection:
        received = connection.channel().consume("kept", inactivity_timeout=60)
        assert next(received)[2] == b"a message"

    assert not rabbitmq.stop()
    ours = machine.find(lambda process: process.environ.get(machine.MARK) == str(rabbitmq.directory))
    assert ours == []


@pytest.mark.timeout(900)  # packages are fetched
@pytest.mark.skipif(not shutil.which("apt-get"), reason="only apt's packages can be unpacked")
def test_rabbitmq_runs_from_packages_that_nobody_installed(tmp_path: Path) -> None:
    """Fetched and unpacked without root, also after that was interrupted, and where a path has a space in it."""
    place = tmp_path / "a directory" / "rabbitmq-server"
    fetch = ["sh", str(ROOT / "deploy" / "bootstrap.sh"), "rabbitmq", str(place)]
    with subprocess.Popen(fetch, stdout=subprocess.DEVNULL, start_new_session=True) as interrupted:
        half = place.with_name("rabbitmq-server.new") / "root" / "usr"
        assert machine.wait_until(half.exists, 300)
        os.killpg(interrupted.pid, signal.SIGKILL)
    assert programs.unpacked(place) is None

    for _ in range(2):
        subprocess.run(fetch, check=True)
    unpacked = programs.unpacked(place)
    assert unpacked
    assert not half.exists()
    broker = RabbitMQ(tmp_path / "a directory" / "rabbitmq", programs=unpacked)
    try:
        assert broker.start()
        erlang = broker.ctl("eval", "io:format(code:root_dir()).").partition("ok")[0]
        assert Path(erlang) == place / "usr" / "lib" / "erlang"
        for erl in (Path(erlang, "bin", "erl"), *Path(erlang).glob("erts-*/bin/erl")):  # a node starts others by it
            asked = [str(erl), "-noshell", "-eval", "io:format(code:root_dir()), halt()."]
            assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout == erlang
        with pika.BlockingConnection(pika.URLParameters(broker.url)) as connection:
            connection.channel().queue_declare("a_queue", durable=True, arguments={"x-queue-type": "quorum"})
        assert not broker.stop()
        assert broker.start()
    finally:
        broker.stop()
