"""From the release before to this one while the shop is open: no call fails, no sale is lost, the audit agrees.

Two of each process. The migrations run beneath the old ones; then one process after the other is replaced, so that for
a while each is served by either release of all others. With ROLLOUTS=3 it goes there, back and there again, in other
orders: `make test ROLLOUTS=3 ARGS='tests/integration/whole/test_rolling_upgrade.py -s'` prints what it saw.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg import sql

from deploy.healthcheck import is_serving
from deploy.local.machine import wait_until
from tests.integration.conftest import free_address
from tests.integration.processes import COMMANDS, START_TIMEOUT_S, STOP_TIMEOUT_S
from tests.integration.purchase_events import query
from tests.release_before import PRESENT, Release, unpack
from tests.sizes import how_many

COPIES = 2
COMMAND_TIMEOUT_S = 120.0
PATIENCE_S = 120.0
SHOP = Path(__file__).with_name("steady_shop.py")
ROLLOUTS = how_many("ROLLOUTS")
SEED = 7


class Copy(NamedTuple):
    """One of the processes of a kind."""

    kind: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.number}"


# A kind after the other would do, too; so each meets both releases of all others.
EVERYTHING = [Copy(kind, number) for number in range(COPIES) for kind in COMMANDS]


class Fleet:
    """The processes, each at an address of its own, of whichever release."""

    def __init__(self, environ: dict[str, str], logs: Path) -> None:
        self.address = {copy: free_address() for copy in EVERYTHING}
        self._logs = logs
        self._environ = {
            **os.environ,
            **environ,
            "PURCHASES_BACKLOG_MONTHS": "0",  # the shop's days stay where they are
            **{f"{kind.upper()}_TARGET": self.target(kind) for kind in COMMANDS},
            **{f"{kind.upper()}_METRICS_LISTEN": "127.0.0.1:0" for kind in COMMANDS},
        }
        self._running: dict[Copy, subprocess.Popen[bytes]] = {}

    def target(self, kind: str) -> str:
        """All copies, as DNS would name them."""
        return "ipv4:///" + ",".join(self.address[copy] for copy in EVERYTHING if copy.kind == kind)

    def command(self, release: Release, *arguments: str, **environ: str) -> str:
        """What an operator's command prints."""
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=release.root,
            env={**self._environ, **release.environ(), **environ, "COLUMNS": "160"},
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"{arguments} of {release.name}: {done.stdout}{done.stderr}"
        return done.stdout

    def migrate(self, release: Release) -> None:
        for package in ("purchases_svc", "analytics_svc"):
            self.command(release, package, "migrate")

    def start(self, release: Release, copies: Sequence[Copy]) -> None:
        for copy in copies:
            with self._log(copy).open("ab") as log:
                self._running[copy] = subprocess.Popen(
                    [sys.executable, "-m", *COMMANDS[copy.kind]],
                    cwd=release.root,
                    env={**self._environ, **release.environ(), f"{copy.kind.upper()}_LISTEN": self.address[copy]},
                    stdout=log,
                    stderr=log,
                )
        for copy in copies:
            up = wait_until(partial(is_serving, self.address[copy]), START_TIMEOUT_S)
            assert up, f"{copy} of {release.name} is not up: {self._log(copy).read_text()[-2000:]}"

    def replace(self, copy: Copy, release: Release) -> None:
        """As an orchestrator does: it is asked to end, and the other one takes its place."""
        process = self._running.pop(copy)
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_TIMEOUT_S) == 0, f"{copy}: {self._log(copy).read_text()[-2000:]}"
        self.start(release, [copy])

    def end(self) -> None:
        for process in self._running.values():
            process.kill()
        for process in self._running.values():
            process.wait(STOP_TIMEOUT_S)

    def bugs(self) -> list[str]:
        """What no process may ever write, of either release."""
        lines = [line for copy in EVERYTHING for line in self._log(copy).read_text().splitlines()]
        return [line for line in lines if '"bug"' in line or "Traceback" in line]

    def _log(self, copy: Copy) -> Path:
        return self._logs / f"{copy}.log"


class Shop:
    """The tills and the owner, with the client library of a release."""

    def __init__(self, release: Release, fleet: Fleet, seed: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, SHOP, fleet.target("purchases"), fleet.target("analytics"), str(seed)],
            cwd=release.root,
            env={**os.environ, **release.environ()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> dict[str, Any]:
        said, _ = self._process.communicate(timeout=PATIENCE_S)
        report: dict[str, Any] = json.loads(said)
        return report

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Release:
    release = unpack(tmp_path_factory.mktemp("before"))
    release.prove()
    return release


@pytest.fixture
def databases(postgres_url: str) -> Iterator[dict[str, str]]:
    """Two empty ones: the release before makes its own tables."""
    urls = {}
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        for kind in ("purchases", "analytics"):
            name = f"test_{os.getpid()}_upgrade_{kind}"
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
            urls[f"{kind.upper()}_DATABASE_URL"] = postgres_url.rpartition("/")[0] + f"/{name}"
        yield urls
        for url in urls.values():
            statement = sql.SQL("DROP DATABASE {} WITH (FORCE)")
            connection.execute(statement.format(sql.Identifier(url.rpartition("/")[2])))


@pytest.fixture
def fleet(databases: dict[str, str], amqp_url: str, tmp_path: Path) -> Iterator[Fleet]:
    running = Fleet({**databases, "AMQP_URL": amqp_url}, tmp_path)
    yield running
    running.end()


@pytest.mark.timeout(300 + 300 * ROLLOUTS)
def test_rolling_upgrade(before: Release, fleet: Fleet, databases: dict[str, str]) -> None:
    fleet.migrate(before)
    fleet.start(before, EVERYTHING[: len(COMMANDS)])
    shops = [Shop(before, fleet, SEED), Shop(PRESENT, fleet, SEED + 1)]
    try:
        _wait_for_sales(databases, 50)
        fleet.migrate(PRESENT)
        # Whoever restarts one now starts the release before on what is there already.
        fleet.start(before, EVERYTHING[len(COMMANDS) :])
        for release, order in _rollouts(before)[:ROLLOUTS]:
            for copy in order:
                began = time.monotonic()
                fleet.replace(copy, release)
                print(f"{copy} is of release {release.name} after {time.monotonic() - began:.1f} s")
                _wait_for_sales(databases, 20)
        reports = [shop.close() for shop in shops]
    finally:
        for shop in shops:
            shop.end()
    sold = {purchase_id for report in reports for purchase_id in report["sold"].values()}
    for report in reports:
        print({what: len(it) if what in ("sold", "asked", "failed") else it for what, it in report.items()})
        assert report["failed"] == []
        assert report["asked"] == sorted(report["asked"]), "the owner's sums went back"
        assert len({*report["sold"].values()}) == len(report["sold"])
    _prove(sold, fleet, databases)


def _rollouts(before: Release) -> list[tuple[Release, Sequence[Copy]]]:
    return [
        (PRESENT, EVERYTHING),
        (before, list(reversed(EVERYTHING))),  # what was rolled out may be taken back
        (PRESENT, random.Random(SEED).sample(EVERYTHING, len(EVERYTHING))),
    ]


def _wait_for_sales(databases: dict[str, str], count: int) -> None:
    """Until so many more are counted: neither selling nor counting stands still."""
    counted = "SELECT count(*) FROM analytics_event_log"
    ((seen,),) = query(databases["ANALYTICS_DATABASE_URL"], counted)

    def more() -> bool:
        ((now,),) = query(databases["ANALYTICS_DATABASE_URL"], counted)
        return bool(now >= seen + count)

    assert wait_until(more, PATIENCE_S), "sales are not counted"


def _prove(sold: set[str], fleet: Fleet, databases: dict[str, str]) -> None:
    """Every sale that was answered, once, and nothing else; every row of the read models is what it should be."""
    purchases, analytics = databases["PURCHASES_DATABASE_URL"], databases["ANALYTICS_DATABASE_URL"]
    assert {str(purchase_id) for (purchase_id,) in query(purchases, "SELECT purchase_id FROM purchases")} == sold

    def counted() -> bool:
        return query(analytics, "SELECT count(*) FROM analytics_event_log") == [(len(sold),)]

    assert wait_until(counted, PATIENCE_S)
    assert query(analytics, "SELECT count(*) FROM quarantined_events") == [(0,)]
    assert query(purchases, "SELECT count(*) FROM outbox_events WHERE status = 'FAILED'") == [(0,)]

    def agrees() -> bool:  # what the continuous audit saw last, too, and then purchases may have been on their way
        try:
            print(fleet.command(PRESENT, "analytics_svc", "audit"))
        except AssertionError as error:
            print(error)
            return False
        return True

    assert wait_until(agrees, PATIENCE_S)
    rebuilt = fleet.command(PRESENT, "analytics_svc", "rebuild")
    print(rebuilt)
    assert f"{len(sold):,} purchases were read, of which 0 had not been counted; 0 rows were wrong" in rebuilt
    assert fleet.bugs() == []
