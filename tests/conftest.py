"""What the tests share: databases of their own on a real PostgreSQL, a virtual host of their own on a real RabbitMQ.

`make test` starts both servers and says where they are. A server that is missing fails the tests that need it; none is
ever skipped for that.
"""

import asyncio
import itertools
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pika
import psycopg
import pytest
from psycopg import sql

import purchases_svc.__main__ as purchases
from analytics_svc import database as analytics_database
from analytics_svc.settings import MigrateSettings as AnalyticsMigrateSettings
from chassis import postgres
from deploy.local.rabbitmq import RabbitMQ
from purchases_svc.settings import MigrateSettings as PurchasesMigrateSettings

ROOT = Path(__file__).parent.parent
DAY_S = 86_400
POLL_S = 0.02
TEST_S = 30  # longer than a test takes that counts days from today
WAIT_S = 60.0  # for whatever a test waits for; it takes a small part of it, also on a machine that does much else

_numbers = itertools.count(1)


def _required(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        pytest.fail(f"{name} is not set: run the tests with `make test`, which starts the servers", pytrace=False)
    return value


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of two who run beside each other, one begins with the last file."""
    if os.environ.get("TEST_ORDER") == "from the end":
        place = {path: number for number, path in enumerate(dict.fromkeys(item.path for item in items))}
        items.sort(key=lambda item: -place[item.path])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """A test that the other one runs counts as done."""
    return None if _is_ours(item.path) else True


@cache
def _is_ours(path: Path) -> bool:
    """Whether nobody else has taken that file."""
    taken = os.environ.get("TEST_FILES_TAKEN")
    if taken:
        place = Path(taken, *path.parts[1:])
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            place.touch(exist_ok=False)
        except FileExistsError:
            return False
    return True


async def eventually(condition: Callable[[], Awaitable[Any]], what: str, within_s: float = WAIT_S) -> Any:
    """Poll until the condition is true, and return its value; fail with `what` when it takes too long."""
    deadline = asyncio.get_running_loop().time() + within_s
    while not (value := await condition()):
        if asyncio.get_running_loop().time() > deadline:
            pytest.fail(f"not within {within_s:g} s: {what}")
        await asyncio.sleep(POLL_S)
    return value


def today() -> date:
    """In UTC, as everything of ours counts days."""
    return datetime.now(UTC).date()


@pytest.fixture
def one_day() -> None:
    """Midnight does not come before the test ends: just before it, the test waits."""
    while (left_s := DAY_S - time.time() % DAY_S) < TEST_S:
        time.sleep(left_s)


@pytest.fixture(scope="session")
def postgres_url() -> str:
    """A superuser's URL."""
    return _required("TEST_POSTGRES_URL")


def _in_database(url: str, name: str) -> str:
    return urlsplit(url)._replace(path=f"/{name}").geturl()


@asynccontextmanager
async def pool(url: str, role: str, size: int = 2) -> AsyncIterator[postgres.Pool]:
    """A pool as the services have it, acting as `role`."""
    async with postgres.open_pool(url, role=role, application_name="test", size=size, statement_timeout_s=30) as opened:
        await opened.wait(timeout=10)
        yield opened


def _execute(url: str, statement: str, *names: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


def _template(postgres_url: str, kind: str, migrate: Callable[[str], None]) -> Iterator[str]:
    """A migrated database, to be cloned: far cheaper than migrating one for each test."""
    name = f"test_{os.getpid()}_{kind}"
    _execute(postgres_url, "CREATE DATABASE {}", name)
    try:
        migrate(_in_database(postgres_url, name))
        yield name
    finally:
        _execute(postgres_url, "DROP DATABASE {} WITH (FORCE)", name)


def _clone(postgres_url: str, template: str) -> Iterator[str]:
    name = f"{template}_{next(_numbers)}"
    _execute(postgres_url, "CREATE DATABASE {} TEMPLATE {}", name, template)
    try:
        yield _in_database(postgres_url, name)
    finally:
        _execute(postgres_url, "DROP DATABASE {} WITH (FORCE)", name)


@pytest.fixture(scope="session")
def _purchases_template(postgres_url: str) -> Iterator[str]:
    yield from _template(
        postgres_url, "purchases", lambda url: purchases.migrate_database(PurchasesMigrateSettings(url))
    )


@pytest.fixture(scope="session")
def _analytics_template(postgres_url: str) -> Iterator[str]:
    yield from _template(
        postgres_url, "analytics", lambda url: analytics_database.migrate_database(AnalyticsMigrateSettings(url))
    )


@pytest.fixture
def purchases_db(postgres_url: str, _purchases_template: str) -> Iterator[str]:
    """The owner's URL of an empty, migrated purchases database."""
    yield from _clone(postgres_url, _purchases_template)


@pytest.fixture
def analytics_db(postgres_url: str, _analytics_template: str) -> Iterator[str]:
    """The owner's URL of an empty, migrated analytics database."""
    yield from _clone(postgres_url, _analytics_template)


@pytest.fixture(scope="session")
def broker() -> RabbitMQ:
    """The node of TEST_AMQP_URL."""
    return RabbitMQ(Path(_required("TEST_BROKER_DIRECTORY")))


@pytest.fixture(scope="session")
def _virtual_host(broker: RabbitMQ) -> Iterator[str]:
    """A virtual host of this run: the stack that a developer has running on the same node is not touched."""
    user = urlsplit(_required("TEST_AMQP_URL")).username or "guest"
    name = f"test-{os.getpid()}"
    broker.ctl("add_vhost", name)
    try:
        broker.ctl("set_permissions", "--vhost", name, user, ".*", ".*", ".*")
        yield name
    finally:
        broker.ctl("delete_vhost", name)


@pytest.fixture
def amqp_url(_virtual_host: str) -> str:
    """A URL under which there is neither our exchange nor our queue yet."""
    url = urlsplit(_required("TEST_AMQP_URL"))._replace(path="/" + quote(_virtual_host, safe="")).geturl()
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        channel.queue_delete("purchases.created")
        channel.exchange_delete("purchases")
    return url
