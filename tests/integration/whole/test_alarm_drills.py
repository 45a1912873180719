"""Each alarm is raised by what it is for, on the real processes' own pages; for once, Prometheus has no patience.

`make test ARGS='tests/integration/whole/test_alarm_drills.py -s'` prints them as they fire; the runbook shows that.
"""

import itertools
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pika
import psycopg
import pytest
import yaml
from psycopg import sql

from analytics_svc.ingest.summing import SUMMING_LOCK
from chassis.tls import Credentials
from deploy import certificates
from deploy.certificates import Authority
from deploy.local.machine import find, wait_until
from deploy.local.prometheus import ALARMS, Prometheus
from pos.client import PosClient, connect
from pos.errors import PosError
from pos.simulator import simulate
from tests.integration import outbox_events
from tests.integration.conftest import free_address
from tests.integration.processes import Processes
from tests.integration.purchase_events import query
from tests.integration.whole.test_alarms import RULES, Scraped, sell
from tests.replication import Replicated

PATIENCE_S = 120.0
OUTBOX_MAX = 60

# What no test brings about in its time is raised by `promtool` alone, on figures (deploy/prometheus/alarms_test.yaml).
ON_FIGURES = {"MessageKills", "EventLogHeld", "PartitionsEnd", "RebuildNeeded", "TillCloned", "TillIncomplete"}
fired: set[str] = set()


class Watch:
    """A Prometheus, and which alarms it has raised."""

    def __init__(self, prometheus: Prometheus) -> None:
        self._prometheus = prometheus

    def sees(self, name: str, cause: Callable[[], object] = lambda: None) -> None:
        """Wait until the alarm fires, and print it; the cause is repeated until then."""

        def fires() -> bool:
            cause()
            return bool(self._firing(name))

        assert wait_until(fires, PATIENCE_S), name
        for alert in self._firing(name)[:1]:
            labels, texts = alert["labels"], alert["annotations"]
            print(f"{name} ({labels['severity']}): {texts['summary']} → {texts['runbook']}")
        fired.add(name)

    def is_over(self, name: str) -> None:
        assert wait_until(lambda: not self._firing(name), PATIENCE_S), name

    def _firing(self, name: str) -> list[dict[str, Any]]:
        alerts = self._prometheus.get("/api/v1/alerts")["alerts"]
        return [it for it in alerts if it["labels"]["alertname"] == name and it["state"] == "firing"]


@contextmanager
def watching(pages: dict[str, str], directory: Path) -> Iterator[Watch]:
    """With no pause before an alarm, and small figures in the place of large ones."""
    impatient = directory / "alarms.yaml"
    text = re.sub(r"for: \w+", "for: 0s", ALARMS.read_text())
    for pattern, small in (
        (r"> (120|3600|5000|10)\b", "> 3"),
        (r"> 0\.5\n", "> 0\n"),
        (r"\[1h\]\)( >) 3", r"[1h])\1 0"),
        (r"\[5m\]", "[30s]"),
        (r"\[2m\]", "[30s]"),
    ):
        assert re.search(pattern, text), pattern
        text = re.sub(pattern, small, text)
    impatient.write_text(text)
    prometheus = Prometheus(directory / "prometheus", alarms=impatient, every="1s")
    prometheus.start(pages)
    try:
        yield Watch(prometheus)
    finally:
        prometheus.stop()


class Drilled(Scraped):
    """An outbox that is soon full, and events that are soon given up."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.environ |= {"PURCHASES_OUTBOX_MAX": str(OUTBOX_MAX), "RELAY_ATTEMPTS_MAX": "1"}

    def audit_pid(self) -> int | None:
        """The process that the consumer has started."""
        pid = self._running["consumer"].pid
        found = find(lambda process: process.parent == pid and "prove" in process.argv)
        return found[0].pid if found else None


@pytest.fixture
def processes(purchases_db: str, analytics_db: str, amqp_url: str, tmp_path: Path) -> Iterator[Drilled]:
    with Drilled.all_running(purchases_db, analytics_db, amqp_url, tmp_path) as running:
        sell(running, 1, 20)
        yield running


def test_the_numbers(processes: Drilled, purchases_db: str, analytics_db: str, amqp_url: str, tmp_path: Path) -> None:
    """What makes them wrong, old, or unproven."""
    with watching(processes.pages, tmp_path) as watch:
        with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
            connection.channel().basic_publish("purchases", "purchases.created", b"no event")
        watch.sees("Quarantine")

        with psycopg.connect(analytics_db, autocommit=True) as database:
            with database.transaction():
                database.execute("SELECT pg_current_xact_id()")
                watch.sees("VacuumHeldBack")
            database.execute("UPDATE daily_sales_by_branch SET revenue_sum = revenue_sum + 1")
            watch.sees("NumbersWrong")
            with database.transaction():  # somebody else has the summing's turn
                database.execute("SELECT pg_advisory_xact_lock(%s)", [SUMMING_LOCK])
                for seed in range(100, 108):
                    sell(processes, seed, 2)
                watch.sees("NotSummedUp")
            ahead = "UPDATE cell_marks SET complete_through_at = now() + interval '1 hour'"
            watch.sees("PromiseTakenBack", lambda: database.execute(ahead))  # the keeper may store its own just then

        dead = processes.audit_pid()
        assert dead
        os.kill(dead, signal.SIGKILL)
        watch.sees("AuditDies")
        assert wait_until(lambda: processes.audit_pid() not in (None, dead), PATIENCE_S)
        frozen = processes.audit_pid()
        assert frozen
        os.kill(frozen, signal.SIGSTOP)
        try:
            watch.sees("AuditStale")
        finally:
            os.kill(frozen, signal.SIGCONT)

        assert processes.stop("consumer") == 0
        watch.sees("ProcessDown")
        sell(processes, 3, 20)

        def sent() -> bool:
            return query(purchases_db, "SELECT 1 FROM outbox_events WHERE status <> 'SENT'") == []

        assert wait_until(sent, PATIENCE_S)
        with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
            assert connection.channel().queue_purge("purchases.created").method.message_count
        processes.start("consumer")
        processes.wait_ready("consumer")
        watch.sees("NumbersOld")
        watch.sees("LostByBroker")


def test_the_sales(processes: Drilled, purchases_db: str, tmp_path: Path) -> None:
    """What keeps tills from selling, and events from leaving."""
    with watching(processes.pages, tmp_path) as watch:
        outbox_events.make_days(purchases_db)
        outbox_events.write(purchases_db, 1, event_type="NobodyKnowsIt")
        watch.sees("FailedEvents")

        with psycopg.connect(purchases_db, autocommit=True) as database:
            database.execute("ALTER TABLE customers RENAME TO customers_gone")
            try:
                with connect(processes.address["purchases"]) as channel, suppress(PosError):
                    list(PosClient(channel, total_timeout_s=2).list_customers())
            finally:
                database.execute("ALTER TABLE customers_gone RENAME TO customers")
        watch.sees("Bug")

        with no_connections(purchases_db):
            for alarm in ("SalesFail", "PoolUsedUp"):
                watch.sees(alarm, lambda: try_to_sell(processes, 4, 2))
        processes.wait_ready("purchases")

        processes.kill("relay")
        processes.environ["AMQP_URL"] = f"amqp://relay:none@{free_address()}/%2F"
        processes.start("relay")
        processes.wait_ready("relay")
        sell(processes, 5, OUTBOX_MAX * 2 // 3)
        for alarm in ("BreakerOpen", "EventsStuck", "OutboxFilling"):
            watch.sees(alarm)
        books = itertools.count(6)
        watch.sees("Overloaded", lambda: try_to_sell(processes, next(books), 10))  # until there is no room


@contextmanager
def no_connections(url: str) -> Iterator[None]:
    """The database takes nobody in, as if its server were down."""
    name = str(psycopg.conninfo.conninfo_to_dict(url)["dbname"])
    with psycopg.connect(psycopg.conninfo.make_conninfo(url, dbname="postgres"), autocommit=True) as server:
        statement = sql.SQL("ALTER DATABASE {} WITH ALLOW_CONNECTIONS {}")
        server.execute(statement.format(sql.Identifier(name), sql.SQL("false")))
        try:
            server.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s", [name])
            yield
        finally:
            server.execute(statement.format(sql.Identifier(name), sql.SQL("true")))


def try_to_sell(processes: Processes, seed: int, count: int) -> None:
    """Tills that give up soon."""
    with connect(processes.address["purchases"]) as channel:
        client = PosClient(channel, attempt_timeout_s=3, total_timeout_s=4)
        for sale, _ in zip(simulate(seed), range(count), strict=False):
            with suppress(PosError):
                client.create_purchase(sale, register_customer=True)
        with suppress(PosError):
            client.get_purchase("01a21070-4022-7bf2-be3b-4be0ea9a41bf")


def test_certificates(purchases_db: str, analytics_db: str, amqp_url: str, tmp_path: Path) -> None:
    """One that ends soon, one that is broken, and callers who are not who they should be."""
    pki, authority = tmp_path / "certificates", Authority.new()
    pki.mkdir()
    authority.pair.write(pki, "ca")
    for path, hosts in (("service/purchases", certificates.LOOPBACK), ("operator/kim", ()), ("reader/hq", ())):
        pair = authority.issue(f"spiffe://retail.example/{path}", hosts=hosts, lasts=timedelta(days=5))
        pair.write(pki, certificates.name_of(path))

    class Certified(Scraped):
        credentials = Credentials(*certificates.environ(pki, "operator/kim").values())

        def identity(self, name: str) -> dict[str, str]:
            return certificates.environ(pki, f"service/{name}")

    ours = Certified(purchases_db, analytics_db, amqp_url, tmp_path)
    ours.start("purchases")
    try:
        ours.wait_ready("purchases")
        with watching({"purchases": ours.pages["purchases"]}, tmp_path) as watch:
            watch.sees("CertificateEnds")
            reader = Credentials(*certificates.environ(pki, "reader/hq").values())
            with connect(ours.address["purchases"].replace("127.0.0.1", "localhost"), reader) as channel:
                client, sale = PosClient(channel, total_timeout_s=2), next(simulate(1))

                def sell_as_a_reader() -> None:
                    with suppress(PosError):
                        client.create_purchase(sale)

                watch.sees("CallersRefused", sell_as_a_reader)
            another = authority.issue("spiffe://retail.example/service/purchases", hosts=certificates.LOOPBACK)
            (pki / "service-purchases.pem").write_bytes(another.certificate)  # without its key
            watch.sees("CertificateRefused")
            another.write(pki, "service-purchases")
            watch.is_over("CertificateRefused")
            watch.is_over("CertificateEnds")
    finally:
        ours.end_all()


def test_failover(pair: Replicated, purchases_url: str, analytics_url: str, amqp_url: str, tmp_path: Path) -> None:
    """Standbys that no commit waits for."""
    ours = Scraped(purchases_url, analytics_url, amqp_url, tmp_path)
    ours.start("purchases")
    try:
        ours.wait_ready("purchases")
        with watching({"purchases": ours.pages["purchases"]}, tmp_path) as watch:
            pair.require_standby("")
            watch.sees("FailoverUnsafe")
    finally:
        ours.end_all()


def test_every_alarm_was_raised(request: pytest.FixtureRequest) -> None:
    """By the tests above, or else by figures; none is forgotten here."""
    above = {item.name for item in request.session.items if item.path == Path(__file__)}
    if {name for name in globals() if name.startswith("test_")} <= above:
        assert {rule["alert"] for rule in RULES} == fired | ON_FIGURES
    figures = yaml.safe_load(ALARMS.with_name("alarms_test.yaml").read_text())["tests"]
    assert {it["name"] for it in figures} >= ON_FIGURES
