"""Certificates are followed; what is broken changes nothing, and is told."""

import logging
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from chassis import tls
from chassis.settings import SettingsError, load
from chassis.tls import Broken, Credentials, TlsSettings
from deploy import certificates
from deploy.certificates import Authority
from deploy.local.machine import wait_until

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"  # and empty SETTINGS
URI = "spiffe://retail.example/service/relay"


@pytest.fixture
def authority() -> Authority:
    return Authority.new()


@pytest.fixture
def files(tmp_path: Path, authority: Authority) -> list[Path]:
    """Certificate, key, CA."""
    (tmp_path / "ca.pem").write_bytes(authority.pair.certificate)
    authority.issue(URI, hosts=["localhost"]).write(tmp_path, "own")
    return [tmp_path / "own.pem", tmp_path / "own-key.pem", tmp_path / "ca.pem"]


@pytest.fixture
def credentials(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> Credentials:
    monkeypatch.setattr(tls, "LOOK_EVERY_S", 0.0)
    return Credentials(*map(str, files))


def test_nothing_changes_nothing(credentials: Credentials) -> None:
    """The same object as long as the files are the same: those who ask compare that."""
    assert credentials.now() is credentials.now()


def test_new_files_are_taken(credentials: Credentials, authority: Authority, files: list[Path]) -> None:
    before = credentials.now()
    authority.issue(URI).write(files[0].parent, "own")
    after = credentials.now()
    assert after != before
    assert after.certificate == files[0].read_bytes()
    assert not credentials.broken


def test_a_link_that_points_elsewhere_is_a_change(authority: Authority, tmp_path: Path) -> None:
    """As a secret that is mounted into a container changes."""
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "ca.pem").write_bytes(authority.pair.certificate)
        authority.issue(URI).write(tmp_path / version, "own")
    (tmp_path / "now").symlink_to("one")
    credentials = Credentials(*(str(tmp_path / "now" / name) for name in ("own.pem", "own-key.pem", "ca.pem")))
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").replace(tmp_path / "now")
    credentials._look_at = 0.0
    assert credentials.now().certificate == (tmp_path / "two" / "own.pem").read_bytes()


@pytest.mark.parametrize("half", ["own.pem", "own-key.pem"])
def test_half_swapped_files_wait_for_the_other_half(
    credentials: Credentials, authority: Authority, files: list[Path], half: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once, however often it is looked at."""
    before = credentials.now()
    fresh = authority.issue(URI)
    contents = {"own.pem": fresh.certificate, "own-key.pem": fresh.key}
    (files[0].parent / half).write_bytes(contents.pop(half))
    assert all(credentials.now() is before for _ in range(3))
    assert credentials.broken
    (line,) = [it for it in caplog.records if it.levelno == logging.ERROR]
    assert "stay in use" in line.getMessage()
    ((other, content),) = contents.items()
    (files[0].parent / other).write_bytes(content)
    assert credentials.now() == (fresh.certificate, fresh.key, before.ca)
    assert not credentials.broken


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff\x00", b"-----BEGIN CERTIFICATE-----\n", None])
def test_broken_files_change_nothing(
    credentials: Credentials, files: list[Path], which: int, content: bytes | None
) -> None:
    """Empty, garbage, cut off, gone."""
    before, whole = credentials.now(), files[which].read_bytes()
    if content is None:
        files[which].unlink()
    else:
        files[which].write_bytes(content)
    assert credentials.now() is before
    assert credentials.broken
    files[which].write_bytes(whole)
    assert credentials.now() is before
    assert not credentials.broken


def test_a_key_with_a_password_asks_nobody(files: list[Path]) -> None:
    """OpenSSL would ask at the terminal, and the process would hang there."""
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(files[1].read_bytes(), None)
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(Broken):
        Credentials(*map(str, files))


@pytest.mark.parametrize("named", [("TLS_CERTIFICATE_FILE",), ("TLS_KEY_FILE", "TLS_CA_FILE")])
def test_all_three_files_or_none(named: tuple[str, ...], files: list[Path]) -> None:
    assert tls.credentials(load(TlsSettings, {})) is None
    with pytest.raises(SettingsError) as caught:
        tls.credentials(load(TlsSettings, dict.fromkeys(named, str(files[0]))))
    told = {problem.split()[0] for problem in caught.value.problems}
    assert told == {"TLS_CERTIFICATE_FILE", "TLS_KEY_FILE", "TLS_CA_FILE"} - set(named)


def test_files_that_are_broken_at_the_start_stop_it(files: list[Path]) -> None:
    files[1].write_text("garbage")
    environ = dict(zip(("TLS_CERTIFICATE_FILE", "TLS_KEY_FILE", "TLS_CA_FILE"), map(str, files), strict=True))
    with pytest.raises(SettingsError, match="TLS_KEY_FILE"):
        tls.credentials(load(TlsSettings, environ))


def test_days_left(credentials: Credentials, authority: Authority) -> None:
    assert 29 < tls.days_left(credentials.now()) < 30


def test_certificates_are_made_once(tmp_path: Path) -> None:
    """What is there stays; what ends soon is made anew; with another CA, everything is."""
    wanted = {"service/relay": ("localhost",), "branch/12/till/POS-3": ()}
    assert certificates.make(tmp_path, wanted) == ["ca", "service-relay", "branch-12-till-POS-3"]
    assert (tmp_path / "service-relay-key.pem").stat().st_mode & 0o777 == 0o600
    assert certificates.make(tmp_path, wanted) == []
    authority = Authority(certificates._read(tmp_path, "ca"))
    authority.issue(URI, lasts=certificates.RENEWED_BEFORE).write(tmp_path, "service-relay")
    assert certificates.make(tmp_path, wanted) == ["service-relay"]
    (tmp_path / "ca.pem").unlink()
    assert certificates.make(tmp_path, wanted) == ["ca", "service-relay", "branch-12-till-POS-3"]


def test_a_certificate_that_has_ended_resumes_no_session(
    credentials: Credentials, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed session shows no certificate, so nobody would see that it has ended."""
    monkeypatch.setattr(tls, "SESSIONS_S", 0.0)
    lasts = timedelta(hours=1)
    begins = datetime.now(UTC) - lasts + timedelta(seconds=8)
    authority.issue(URI, begins=begins, lasts=lasts).write(tmp_path, "caller")
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", tls.server_credentials(credentials))
    server.start()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # one has the session when the handshake is over
    context.load_verify_locations(tmp_path / "ca.pem")
    context.load_cert_chain(tmp_path / "caller.pem", tmp_path / "caller-key.pem")
    context.set_alpn_protocols(["h2"])

    def greeted(session: ssl.SSLSession | None = None) -> ssl.SSLSession | None:
        """The session with a server that has let us in."""
        plain = socket.create_connection(("127.0.0.1", port), timeout=60)
        try:
            with context.wrap_socket(plain, server_hostname="localhost", session=session) as secured:
                secured.sendall(PREFACE)
                return secured.session if secured.recv(1) else None
        except OSError:
            return None

    session = greeted()
    assert session
    assert wait_until(lambda: not greeted(), 60)
    assert not greeted(session)
    server.stop(None)
