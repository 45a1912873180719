"""Certificates: three PEM files say who this process is and whom it believes, as a server and as a client.

They are followed: what others write there takes effect by itself, once it is whole and fits together. Until then, what
was in use stays in use. A till uses this too, so it imports gRPC alone.
"""

import logging
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import grpc

from chassis.plaintext import TLS_FILES, PlaintextSettings
from chassis.settings import SettingsError, setting, text

LOOK_EVERY_S = 1.0
# How long a caller may resume a TLS session. Nobody looks then whether its certificate has ended meanwhile.
SESSIONS_S = 60.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TlsSettings(PlaintextSettings):
    """Of a process that serves or calls gRPC. All three files, or none."""

    certificate_file: str = setting(
        "TLS_CERTIFICATE_FILE",
        text,
        "PEM file",
        "its certificate, then those between it and the CA",
        default="",
    )
    key_file: str = setting("TLS_KEY_FILE", text, "PEM file", "the certificate's private key", default="")
    ca_file: str = setting("TLS_CA_FILE", text, "PEM file", "the CAs whose certificates are believed", default="")


class Pem(NamedTuple):
    """What the three files held when they last fitted together."""

    certificate: bytes
    key: bytes
    ca: bytes


class Broken(ValueError):
    """The files are no credentials: one cannot be read, is no PEM, or the key is another certificate's."""


class Credentials:
    """Who this process is; `now()` is cheap, may be asked before every call, and from any thread."""

    def __init__(self, certificate_file: str, key_file: str, ca_file: str) -> None:
        """Raises:
        Broken
        """
        self._paths = [Path(name) for name in (certificate_file, key_file, ca_file)]
        self._looking = threading.Lock()
        self._seen = self._signature()
        self._pem = self._read()
        self._look_at = time.monotonic() + LOOK_EVERY_S
        self.name = certificate_file
        self.broken = False  # what lies in the files now is not in use

    def now(self) -> Pem:
        """The newest that is right. Another object than before only when the files have changed."""
        if time.monotonic() >= self._look_at and self._looking.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._look_at = time.monotonic() + LOOK_EVERY_S
                self._looking.release()
        return self._pem

    def _look(self) -> None:
        seen = self._signature()
        if seen == self._seen and not self.broken:
            return
        try:
            pem = self._read()
        except Broken as error:
            if seen != self._seen:  # once
                log.error("certificates: %s; those that were in use stay in use", error)
            self.broken = True
        else:
            self.broken = False
            if pem != self._pem:
                self._pem = pem
                log.warning("certificates: new ones are in use from now on: %s", self._paths[0])
        self._seen = seen

    def _signature(self) -> object:
        """Changes with the files, whether they are written, replaced, or a link above them points elsewhere."""
        found: list[object] = []
        for path in self._paths:
            try:
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_ino, status.st_size))
            except OSError as error:
                found.append(error.errno)
        return found

    def _read(self) -> Pem:
        try:
            pem = self._bytes()
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(cadata=pem.ca.decode("ascii"))
            certificate, key, _ = self._paths
            context.load_cert_chain(certificate, key, password="")  # or OpenSSL asks for one at the terminal
            if pem != self._bytes():
                raise Broken("the files were written while they were read")
        except Broken:
            raise
        except (OSError, ValueError) as error:  # ssl's are OSErrors
            raise Broken(f"{', '.join(map(str, self._paths))}: {error}") from None
        return pem

    def _bytes(self) -> Pem:
        return Pem(*(path.read_bytes() for path in self._paths))


def credentials(config: TlsSettings) -> Credentials | None:
    """Those that the settings name; None when they name nothing, and all is plaintext.

    Raises:
        SettingsError: not all three files are named, or they do not fit together.
    """
    named = dict(zip(TLS_FILES, (config.certificate_file, config.key_file, config.ca_file), strict=True))
    if not any(named.values()):
        return None
    if missing := [f"{name} is not set, though others of TLS are" for name, file in named.items() if not file]:
        raise SettingsError(missing)
    try:
        return Credentials(*named.values())
    except Broken as error:
        raise SettingsError([f"{', '.join(TLS_FILES)}: {error}"]) from None


def channel_credentials(pem: Pem) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificate)


def server_credentials(credentials: Credentials, *, ask_callers: bool = True) -> grpc.ServerCredentials:
    """Each handshake takes the newest certificates, and asks the caller for one of the CA's, unless told otherwise."""
    served, since = credentials.now(), time.monotonic()

    def fetch() -> grpc.ServerCertificateConfiguration | None:  # in a thread of gRPC's
        nonlocal served, since
        newest, now = credentials.now(), time.monotonic()
        if newest is served and now - since < SESSIONS_S:
            return None
        served, since = newest, now
        return _configuration(newest)  # with other keys for session tickets

    return grpc.dynamic_ssl_server_credentials(
        _configuration(served),
        fetch,  # type: ignore[arg-type] # None: as before
        require_client_authentication=ask_callers,
    )


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], root_certificates=pem.ca)


def days_left(pem: Pem) -> float:
    """Until the certificate ends, or the first of those after it in its file; negative when it has ended."""
    from cryptography import x509  # not there where only a till runs

    ends = min(it.not_valid_after_utc.timestamp() for it in x509.load_pem_x509_certificates(pem.certificate))
    return (ends - time.time()) / 86_400
