"""The whole path on a PostgreSQL that has TLS of its own, as Debian's, and takes nothing else.

The wheel's has none; `test_tls.py` puts a proxy in front of it. So this needs `apt-get install postgresql`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import psycopg
import pytest

import purchases_svc.__main__ as purchases
from analytics_svc import database as analytics
from analytics_svc.settings import MigrateSettings as AnalyticsMigrateSettings
from deploy import certificates
from deploy.local.postgres import Postgres
from pos.__main__ import commands
from purchases_svc.settings import MigrateSettings as PurchasesMigrateSettings
from tests.integration.processes import Processes

INSTALLED = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda it: int(it.parts[-3]))
SALES = 100

pytestmark = pytest.mark.skipif(not INSTALLED, reason="Debian's PostgreSQL is not there: apt-get install postgresql")


class DebianPostgres(Postgres):
    locale = "--locale=C.UTF-8"  # which every version has

    @property
    def binaries(self) -> Path:
        return INSTALLED[-1].parent

    def by_tls(self, database: str, ca: Path, host: str = "localhost") -> str:
        """The owner's URL, checked in full."""
        url = urlsplit(self.url(database))
        netloc = f"{url.netloc.rpartition('@')[0]}@{host}:{url.port}"
        return url._replace(netloc=netloc, query=f"sslmode=verify-full&sslrootcert={quote(str(ca))}").geturl()


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates")
    certificates.make(directory, {"server/postgres": certificates.LOOPBACK})
    return directory


@pytest.fixture(scope="module")
def server(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DebianPostgres]:
    directory = tmp_path_factory.mktemp("postgres")
    (directory / "hba.conf").write_text("hostssl all all 127.0.0.1/32 scram-sha-256\n")
    settings = {
        "ssl": "on",
        "ssl_cert_file": str(pki / "server-postgres.pem"),
        "ssl_key_file": str(pki / "server-postgres-key.pem"),
        "ssl_min_protocol_version": "TLSv1.2",
        "hba_file": str(directory / "hba.conf"),
    }
    running = DebianPostgres(directory, settings=settings)
    running.start()
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def processes(server: DebianPostgres, pki: Path, amqp_url: str, tmp_path: Path) -> Iterator[Processes]:
    """On databases that the migrations made over TLS."""
    for name in ("purchases", "analytics"):
        server.ensure_database(name, "postgres")
    recorded, counted = (server.by_tls(name, pki / "ca.pem") for name in ("purchases", "analytics"))
    purchases.migrate_database(PurchasesMigrateSettings(recorded))
    analytics.migrate_database(AnalyticsMigrateSettings(counted))
    with Processes.all_running(recorded, counted, amqp_url, tmp_path) as running:
        yield running


def test_the_demo(
    processes: Processes, server: DebianPostgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sales are recorded, counted and audited, and every connection of ours is encrypted."""
    for name in ("purchases", "analytics", "consumer"):
        monkeypatch.setenv(f"{name.upper()}_TARGET", processes.address[name])
    report = tmp_path / "report.json"
    assert commands.carry_out(["demo", "--limit", str(SALES), "--report", str(report)]) == 0
    said = json.loads(report.read_text())
    assert (said["purchases"], said["control_totals_agree"]) == (SALES, True)
    with server.connect() as connection:
        ours = connection.execute(
            """
            SELECT application_name, ssl, version FROM pg_stat_activity JOIN pg_stat_ssl USING (pid)
            WHERE datname IN ('purchases', 'analytics')
            """
        ).fetchall()
    assert {name.split()[0] for name, _, _ in ours} >= {"purchases", "relay", "analytics"}
    assert {(ssl, version in ("TLSv1.2", "TLSv1.3")) for _, ssl, version in ours} == {(True, True)}


def test_nothing_else_connects(server: DebianPostgres, pki: Path, tmp_path: Path) -> None:
    """Plaintext, another CA, another name."""
    certificates.make(tmp_path, {})
    with psycopg.connect(server.by_tls("postgres", pki / "ca.pem")) as connection:
        assert connection.pgconn.ssl_in_use
    with pytest.raises(psycopg.OperationalError, match="no encryption"):
        psycopg.connect(server.url("postgres") + "?sslmode=disable")
    with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
        psycopg.connect(server.by_tls("postgres", tmp_path / "ca.pem"))
    with pytest.raises(psycopg.OperationalError, match="certificate"):
        psycopg.connect(server.by_tls("postgres", pki / "ca.pem", host="another.example") + "&hostaddr=127.0.0.1")
