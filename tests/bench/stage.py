"""Where a benchmark plays: private servers in a directory that goes with it, and our processes in front of them."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psycopg

from chassis import tls
from chassis.settings import load
from deploy.healthcheck import is_serving
from deploy.local.machine import Process, StackError, pick_port, spawn, tail, wait_until
from deploy.local.postgres import Postgres
from deploy.local.rabbitmq import RabbitMQ

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


@contextmanager
def temporary_directory() -> Iterator[Path]:
    """On the disk of the checkout, not in /tmp, which may be memory."""
    parent = ROOT / ".local"
    parent.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as directory:
        yield Path(directory)


@contextmanager
def private_postgres(directory: Path) -> Iterator[Postgres]:
    """A server as the local stack has it, with the same settings."""
    server = Postgres(directory)
    try:
        server.start()
        yield server
    finally:
        if server.process:
            server.stop()


@contextmanager
def private_rabbitmq(directory: Path) -> Iterator[RabbitMQ]:
    """A node as the local stack has it."""
    node = RabbitMQ(directory)
    try:
        node.start()
        yield node
    finally:
        node.stop()


def migrated(server: Postgres, name: str, package: str) -> str:
    """The URL of a new database, as the package's own `migrate` command makes it."""
    with server.connect() as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    url = server.url(name)
    log = server.directory / f"{package}-migrate.log"
    environ = {**os.environ, f"{package.removesuffix('_svc').upper()}_DATABASE_URL": url}
    process = spawn([sys.executable, "-m", package, "migrate"], environ, ROOT, log)
    if not process.ended(START_TIMEOUT_S) or process.exit_code():
        process.end()
        raise StackError(f"{package} migrate failed:\n{tail(log)}")
    return url


class Service(NamedTuple):
    """One of our processes, and where it listens."""

    process: Process
    address: str


@contextmanager
def service(
    name: str, command: tuple[str, ...], settings: Mapping[str, str], directory: Path, metrics: str = "127.0.0.1:0"
) -> Iterator[Service]:
    """One of our processes from when it is healthy until it has ended; the caller's settings hold, but for these."""
    address = f"127.0.0.1:{pick_port()}"
    log = directory / f"{name}.log"
    listens = {f"{name.upper()}_LISTEN": address, f"{name.upper()}_METRICS_LISTEN": metrics}
    environ = {**os.environ, **settings, **listens}
    process = spawn([sys.executable, "-m", *command], environ, ROOT, log)
    credentials = tls.credentials(load(tls.TlsSettings, environ))
    try:
        if (
            not wait_until(lambda: is_serving(address, credentials) or not process.alive, START_TIMEOUT_S)
            or not process.alive
        ):
            raise StackError(f"{name} did not start:\n{tail(log)}")
        yield Service(process, address)
    finally:
        process.end(patience_s=STOP_TIMEOUT_S)


def ensure_today(url: str) -> None:
    """Room for the purchases of today and of tomorrow, where no service makes it: it may be shortly before midnight."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET timezone = 'UTC'")
        connection.execute(
            """
            SELECT ensure_purchases_month(date_trunc('month', day)::date), ensure_outbox_day(day)
            FROM (VALUES (current_date), (current_date + 1)) AS d (day)
            """
        )


def empty_purchases(url: str) -> None:
    """Whoever is measured next finds the same: no purchases."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("TRUNCATE purchases, purchase_items, receipts, idempotency_keys, outbox_events, till_sales")


@contextmanager
def paused(*processes: Process) -> Iterator[None]:
    """The processes stand still meanwhile: not even their idling costs the others anything."""
    try:
        for process in processes:
            process.send(signal.SIGSTOP)
        yield
    finally:
        for process in processes:
            process.send(signal.SIGCONT)
