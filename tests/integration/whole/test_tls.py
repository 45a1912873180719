"""The whole path with TLS everywhere: tills, services, PostgreSQL and RabbitMQ, each checked by whoever calls it."""

import itertools
import json
import socket
import ssl
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote, urlsplit

import grpc
import pika
import psycopg
import pytest

from chassis.tls import Credentials
from deploy import certificates
from deploy.healthcheck import is_serving
from deploy.local.machine import wait_until
from deploy.local.rabbitmq import RabbitMQ, TlsFiles
from pos.__main__ import commands
from pos.backlog import Backlog
from pos.lines import Identities
from pos.simulator import simulate
from pos.tills import SaleFailed
from tests.integration.processes import COMMANDS, Processes
from tests.integration.tls_proxy import TlsProxy, tls_proxy

SALES = 300
TIMEOUT_S = 20.0
PATIENCE_S = 120.0
SERVERS = {f"server/{name}": certificates.LOOPBACK for name in ("postgres", "rabbitmq")}


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("all certificates")  # a space, as a checkout may have
    certificates.make(directory, {**certificates.EVERYBODY, **SERVERS})
    return directory


@pytest.fixture
def proxy(pki: Path, postgres_url: str) -> Iterator[tuple[TlsProxy, int]]:
    server = urlsplit(postgres_url)
    assert server.hostname and server.port
    files = pki / "server-postgres.pem", pki / "server-postgres-key.pem"
    with tls_proxy(*files, server.hostname, server.port) as made:
        yield made


def by_tls(url: str, port: int, pki: Path, host: str = "localhost") -> str:
    parts = urlsplit(url)
    netloc = f"{parts.netloc.rpartition('@')[0]}@{host}:{port}"
    return parts._replace(netloc=netloc, query=f"sslmode=verify-full&sslrootcert={quote(str(pki / 'ca.pem'))}").geturl()


@pytest.fixture(scope="module")
def broker(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The amqps URL of a node, as the local stack has one with certificates."""
    node = RabbitMQ(tmp_path_factory.mktemp("rabbitmq"))
    node.tls = TlsFiles(pki / "server-rabbitmq.pem", pki / "server-rabbitmq-key.pem", pki / "ca.pem")
    node.start()
    try:
        assert node.url.startswith("amqps://")
        yield node.url
    finally:
        node.stop()


@pytest.fixture
def processes(
    purchases_db: str, analytics_db: str, broker: str, pki: Path, proxy: tuple[TlsProxy, int], tmp_path: Path
) -> Iterator[Processes]:
    class Certified(Processes):
        credentials = Credentials(*certificates.environ(pki, "operator/kim").values())

        def identity(self, name: str) -> dict[str, str]:
            return certificates.environ(pki, f"service/{name}")

    _, port = proxy
    urls = by_tls(purchases_db, port, pki), by_tls(analytics_db, port, pki), broker
    with Certified.all_running(*urls, tmp_path) as running:
        yield running


def test_the_demo_with_tls_everywhere(
    processes: Processes,
    proxy: tuple[TlsProxy, int],
    pki: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each till sells with its own certificate; the audit, for which the consumer calls the others, agrees; and every
    connection to the database was encrypted."""
    for name in ("purchases", "analytics", "consumer"):
        monkeypatch.setenv(f"{name.upper()}_TARGET", processes.address[name].replace("127.0.0.1", "localhost"))
    for name, value in certificates.environ(pki, "operator/kim").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TILL_CERTIFICATES", str(pki))
    report = tmp_path / "report.json"
    assert commands.carry_out(["demo", "--limit", str(SALES), "--report", str(report)]) == 0
    said = json.loads(report.read_text())
    assert (said["purchases"], said["control_totals_agree"]) == (SALES, True)
    counted, _ = proxy
    assert counted.encrypted > 10
    assert counted.refused == 0
    for name in COMMANDS:
        assert "plaintext" not in processes.log(name)


def test_a_backlog_of_many_tills_goes_up_till_by_till(processes: Processes, pki: Path) -> None:
    """Each sends its own, as no other may; a till without a certificate is named."""
    sales = list(itertools.islice(simulate(7), SALES))
    target = processes.address["purchases"].replace("127.0.0.1", "localhost")
    with Backlog(sales, target, seed=7, identities=Identities(tills=pki)) as backlog:
        assert wait_until(lambda: backlog.wait(0), PATIENCE_S)
        assert backlog.recorded == SALES
    stranger = replace(sales[0], pos_id="POS-99", receipt_id="99", idempotency_key=str(uuid.uuid4()))
    with (
        pytest.raises(SaleFailed, match="POS-99"),
        Backlog([stranger], target, seed=7, identities=Identities(tills=pki)) as backlog,
    ):
        wait_until(lambda: backlog.wait(0), PATIENCE_S)


def test_nobody_without_a_certificate_of_ours_gets_an_answer(processes: Processes, pki: Path, tmp_path: Path) -> None:
    """Plaintext, no certificate, one of another CA, TLS 1.1: none gets as far as a call, at none of the four ports."""
    certificates.make(tmp_path / "other", {"operator/kim": ()})
    (tmp_path / "other" / "ca.pem").write_bytes((pki / "ca.pem").read_bytes())  # it believes ours
    stranger = Credentials(*certificates.environ(tmp_path / "other", "operator/kim").values())
    for address in processes.address.values():
        assert is_serving(address, processes.credentials)
        assert not is_serving(address)
        assert not is_serving(address, stranger)
        nobody = grpc.ssl_channel_credentials((pki / "ca.pem").read_bytes())
        with grpc.secure_channel(address, nobody) as channel, pytest.raises(grpc.FutureTimeoutError):
            grpc.channel_ready_future(channel).result(timeout=1)
        host, _, port = address.rpartition(":")
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.load_verify_locations(pki / "ca.pem")
        old.load_cert_chain(pki / "operator-kim.pem", pki / "operator-kim-key.pem")
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with socket.create_connection((host, int(port)), TIMEOUT_S) as plain, pytest.raises((ssl.SSLError, OSError)):
            old.wrap_socket(plain, server_hostname="localhost")
    for name in COMMANDS:  # strangers do not fill the log
        assert [line for line in processes.log(name).splitlines() if not line.startswith("{")] == []


def test_a_server_that_is_another_is_not_talked_to(processes: Processes, pki: Path, tmp_path: Path) -> None:
    """A till believes its own CA only, and only for the name that it calls."""
    certificates.make(tmp_path, {"branch/1/till/POS-3": ()})  # a CA of its own
    elsewhere = Credentials(*certificates.environ(tmp_path, "branch/1/till/POS-3").values())
    ours = Credentials(*certificates.environ(pki, "branch/1/till/POS-3").values())
    port = processes.address["purchases"].rpartition(":")[2]
    assert is_serving(f"localhost:{port}", ours)
    assert not is_serving(f"localhost:{port}", elsewhere)
    assert not is_serving(f"127.0.0.2:{port}", ours)  # no name in the certificate


def test_databases_and_brokers_are_checked(
    purchases_db: str, broker: str, pki: Path, proxy: tuple[TlsProxy, int], tmp_path: Path
) -> None:
    """Another CA, or another name: no connection, by what the URLs say."""
    certificates.make(tmp_path, {})
    _, port = proxy
    with psycopg.connect(by_tls(purchases_db, port, pki)) as connection:
        assert connection.pgconn.ssl_in_use
    with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
        psycopg.connect(by_tls(purchases_db, port, tmp_path))
    with pytest.raises(psycopg.OperationalError, match="certificate"):
        psycopg.connect(by_tls(purchases_db, port, pki, host="another.example") + "&hostaddr=127.0.0.1")
    with pika.BlockingConnection(pika.URLParameters(broker)):
        pass
    with pytest.raises(ssl.SSLCertVerificationError):
        pika.BlockingConnection(pika.URLParameters(broker.replace(quote(str(pki)), quote(str(tmp_path)))))
