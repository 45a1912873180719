"""Each alarm is raised by what it is for, on the real processes' own pages, and ends by what the runbook tells to do.

Prometheus has no patience here. What only time ends, such as a death an hour ago, is not waited for.

`make test ARGS='tests/integration/whole/test_alarm_drills.py -s'` prints them as they fire; the runbook shows that.
"""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import grpc
import pika
import psycopg
import pytest
from psycopg import sql

from analytics_svc.ingest.summing import SUMMING_LOCK
from chassis.tls import Credentials
from deploy import certificates
from deploy.certificates import Authority
from deploy.local.machine import wait_until
from pos.client import PosClient, connect
from pos.errors import PosError
from pos.sale import JournalPlace
from pos.simulator import simulate
from pos.values import TillReport
from purchases_svc.partitions import DAYS_AHEAD
from retail.analytics.v1 import quarantine_service_pb2
from retail.analytics.v1.quarantine_service_pb2_grpc import QuarantineServiceStub
from tests.conftest import today
from tests.integration import outbox_events
from tests.integration.chain import TABLES
from tests.integration.conftest import free_address
from tests.integration.ingest.test_events_dropped import AGE_DAYS, send_long_ago
from tests.integration.processes import Processes
from tests.integration.purchase_events import query, sold
from tests.integration.whole.alarm_watch import OUTBOX_MAX, PATIENCE_S, Drilled, fired, watching
from tests.integration.whole.test_alarms import RULES, Scraped, sell
from tests.replication import Replicated


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
        discard_quarantine(processes)
        watch.is_over("Quarantine")

        with psycopg.connect(analytics_db, autocommit=True) as database:
            with database.transaction():
                database.execute("SELECT pg_current_xact_id()")
                watch.sees("VacuumHeldBack")
            watch.is_over("VacuumHeldBack")
            database.execute("UPDATE daily_sales_by_branch SET revenue_sum = revenue_sum + 1")
            watch.sees("NumbersWrong")
            rebuild(processes)
            watch.is_over("NumbersWrong")
            with database.transaction():  # somebody else has the summing's turn
                database.execute("SELECT pg_advisory_xact_lock(%s)", [SUMMING_LOCK])
                for seed in range(100, 108):
                    sell(processes, seed, 2)
                watch.sees("NotSummedUp")
            watch.is_over("NotSummedUp")
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
            query(analytics_db, "UPDATE audit_status SET compared_at = compared_at - interval '16 minutes'")
            watch.sees("AuditStale")  # as if so much time had passed
        finally:
            os.kill(frozen, signal.SIGCONT)
        watch.is_over("AuditStale")

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
        watch.is_over("ProcessDown")
        watch.sees("NumbersOld")
        watch.sees("LostByBroker")
        watch.is_over("NumbersOld")


def test_the_sales(processes: Drilled, purchases_db: str, amqp_url: str, tmp_path: Path) -> None:
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
        for alarm in ("SalesFail", "PoolUsedUp"):
            watch.is_over(alarm)

        processes.kill("relay")
        processes.environ["AMQP_URL"] = f"amqp://relay:none@{free_address()}/%2F"
        processes.start("relay")
        processes.wait_ready("relay")
        sell(processes, 5, OUTBOX_MAX * 2 // 3)
        for alarm in ("BreakerOpen", "EventsStuck", "OutboxFilling"):
            watch.sees(alarm)
        books = itertools.count(6)
        watch.sees("Overloaded", lambda: try_to_sell(processes, next(books), 10))  # until there is no room
        processes.kill("relay")
        processes.environ["AMQP_URL"] = amqp_url
        processes.start("relay")
        for alarm in ("BreakerOpen", "EventsStuck", "OutboxFilling", "Overloaded"):
            watch.is_over(alarm)


def test_the_past(processes: Drilled, purchases_db: str, analytics_db: str, amqp_url: str, tmp_path: Path) -> None:
    """What a consumer dies of and keeps, and an outbox that has dropped what was not counted."""
    with watching(processes.pages, tmp_path) as watch:
        processes.kill("consumer")
        sell(processes, 11, 10)
        with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
            connection.channel().basic_publish("purchases", "purchases.created", sold("1.00").body(pos_id="POISON"))
        processes.poisoned = True
        processes.start("consumer")

        def start_again() -> None:
            if processes.died("consumer"):
                processes.start("consumer")

        watch.sees("MessageKills", start_again)

        def quarantined() -> bool:
            start_again()
            return query(analytics_db, "SELECT reason FROM quarantined_events") == [("KILLS_CONSUMER",)]

        assert wait_until(quarantined, PATIENCE_S)

        processes.kill("consumer")
        processes.poisoned = False
        processes.environ["CONSUMER_LOG_RETENTION_DAYS"] = "30"
        long_ago = timedelta(days=40)
        (old,) = outbox_events.new_ids(1, age_s=long_ago.total_seconds())
        with psycopg.connect(analytics_db) as database:
            statement = "UPDATE quarantined_events SET event_id = %s, quarantined_at = quarantined_at - %s"
            database.execute(statement, [old, long_ago])
        processes.start("consumer")
        watch.sees("EventLogHeld")
        discard_quarantine(processes)
        processes.kill("consumer")  # it forgets every ten minutes, and when it starts
        processes.start("consumer")
        watch.is_over("EventLogHeld")

        day = today() - timedelta(days=AGE_DAYS)
        outbox_events.make_days(purchases_db, -AGE_DAYS, -AGE_DAYS)
        send_long_ago(purchases_db)
        query(purchases_db, f"UPDATE chain_settings SET keep_outbox_days = {AGE_DAYS - 1}")
        dropped = f"SELECT drop_outbox_day('{day}') IS NULL"  # once the keeper has said what it knows
        assert wait_until(lambda: query(purchases_db, dropped) == [(True,)], PATIENCE_S)
        processes.kill("consumer")
        query(analytics_db, f"TRUNCATE {TABLES}, cell_marks")
        processes.start("consumer")
        watch.sees("RebuildNeeded")
        rebuild(processes)
        watch.is_over("RebuildNeeded")
        watch.is_over("NumbersWrong")


def test_the_tills(purchases_db: str, analytics_db: str, amqp_url: str, tmp_path: Path) -> None:
    """Two sales with one number, one that does not come; and partitions that nobody can make."""
    ours = Drilled(purchases_db, analytics_db, amqp_url, tmp_path)
    page = {"purchases": ours.pages["purchases"]}
    try:
        ours.start("purchases")
        ours.wait_ready("purchases")
        with connect(ours.address["purchases"]) as channel:
            client, epoch = PosClient(channel), str(uuid4())
            for receipt, number, sale in zip("abc", (1, 1, 3), simulate(1), strict=False):
                place = JournalPlace(epoch, number, None)
                sold_there = dataclasses.replace(sale, branch_id=1, pos_id="POS-3", receipt_id=receipt, journal=place)
                client.create_purchase(sold_there, register_customer=True)
            client.report_till(TillReport(1, "POS-3", epoch, 1, 3))
        ours.kill("purchases")
        query(purchases_db, "UPDATE till_journals SET complete_since = complete_since - interval '2 days'")
        ours.start("purchases")
        with watching(page, tmp_path) as watch:
            watch.sees("TillCloned")
            watch.sees("TillIncomplete")
            with connect(ours.address["purchases"]) as channel:
                PosClient(channel).report_till(TillReport(1, "POS-3", epoch, 1, 3, void_sequences=(2,)))
            watch.is_over("TillIncomplete")

            ours.kill("purchases")
            to_come = today() + timedelta(days=DAYS_AHEAD)
            query(purchases_db, f"DELETE FROM outbox_calendar WHERE day = '{to_come}'")
            query(purchases_db, f"DROP TABLE outbox_events_{to_come:%Y_%m_%d}")
            with psycopg.connect(purchases_db) as database:
                database.execute("LOCK TABLE purchases, outbox_events IN SHARE UPDATE EXCLUSIVE MODE")
                ours.start("purchases")
                watch.sees("PartitionsEnd")
            watch.is_over("PartitionsEnd")
    finally:
        ours.end_all()


def discard_quarantine(processes: Processes) -> None:
    with grpc.insecure_channel(processes.address["consumer"]) as channel:
        stub = QuarantineServiceStub(channel)
        kept = stub.ListQuarantinedEvents(quarantine_service_pb2.ListQuarantinedEventsRequest()).quarantined_events
        ids = [event.quarantine_id for event in kept]
        reply = stub.DiscardEvents(quarantine_service_pb2.DiscardEventsRequest(quarantine_ids=ids))
    assert reply.discarded_count == len(ids) > 0


def rebuild(processes: Processes) -> None:
    """As an operator does. What the outbox has dropped can only be told by it."""
    command = [sys.executable, "-m", "analytics_svc", "rebuild"]
    done = subprocess.run(
        command, env=processes.environ, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)


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
            pair.require_standby()
            watch.is_over("FailoverUnsafe")
    finally:
        ours.end_all()


def test_every_alarm_was_raised(request: pytest.FixtureRequest) -> None:
    """By the tests above; none is forgotten here."""
    above = {item.name for item in request.session.items if item.path == Path(__file__)}
    if {name for name in globals() if name.startswith("test_")} <= above:
        assert {rule["alert"] for rule in RULES} == fired
