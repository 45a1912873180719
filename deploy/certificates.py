"""A small CA and certificates, for trying the system with TLS: `make dev-certs`, or

    python3 -m deploy.certificates [--keep-apart] [DIRECTORY] [URI_PATH[=HOST,HOST…] …]

writes into DIRECTORY (.local/certificates) what is missing there or ends soon: the CA (`ca.pem`, and `ca-key.pem`: who
has that can be anybody), and for each path such as branch/12/till/POS-3 or service/relay=relay,localhost a certificate
and its key, `branch-12-till-POS-3.pem` and `branch-12-till-POS-3-key.pem`. A certificate for which hosts are named is
also a server's. Without paths: those of the local stack, its tills, and one of each kind of person.

A chain has a CA of its own already, or SPIRE, or cert-manager: what they have to issue is the same.
"""

import argparse
import ipaddress
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

HERE = Path(__file__).resolve().parents[1] / ".local" / "certificates"
TRUST_DOMAIN = "retail.example"
CA_LASTS = timedelta(days=3_650)
LASTS = timedelta(days=30)
RENEWED_BEFORE = timedelta(days=10)  # its end

LOOPBACK = ("localhost", "127.0.0.1", "::1")
SECOND_CELL = ("purchases-2", "relay-2")  # whose processes are called so, and are who the first one's are
PROCESSES: Mapping[str, tuple[str, ...]] = {
    **{
        f"service/{name}": (name, *(other for other in SECOND_CELL if other == f"{name}-2"), *LOOPBACK)
        for name in ("purchases", "relay", "consumer", "analytics")
    },
    "reader/pages": ("pages", *LOOPBACK),  # browsers are shown it; the services, where nobody's token is
}
PEOPLE = ("operator/kim", "reader/hq", "branch/1/manager/anna")
TILLS = tuple(f"branch/{branch}/till/POS-{till}" for branch in range(1, 6) for till in range(1, 9))
EVERYBODY: Mapping[str, tuple[str, ...]] = {**PROCESSES, **dict.fromkeys((*PEOPLE, *TILLS), ())}


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as the files have them."""

    certificate: bytes
    key: bytes

    def write(self, directory: Path, name: str) -> None:
        """The key first: who looks in between finds a key without its certificate, and waits."""
        _replace(directory / f"{name}-key.pem", self.key, 0o600)
        _replace(directory / f"{name}.pem", self.certificate, 0o644)


class Authority:
    """A CA."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self._certificate = x509.load_pem_x509_certificate(pair.certificate)
        key = serialization.load_pem_private_key(pair.key, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key

    @classmethod
    def new(cls, name: str = "a CA for trying out") -> "Authority":
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _begin(subject, subject, key.public_key(), CA_LASTS)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
        return cls(_pair(builder.sign(key, hashes.SHA256()), key))

    def issue(
        self, *uris: str, hosts: Iterable[str] = (), lasts: timedelta = LASTS, begins: datetime | None = None
    ) -> Pair:
        """A certificate for who is named by `uris`, and for servers at `hosts`: DNS names or addresses."""
        hosts = list(hosts)
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _begin(x509.Name([]), self._certificate.subject, key.public_key(), lasts, begins)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        names += map(_host, hosts)
        if names:  # critical, as there is no other name in it
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if hosts else [])]
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(authority, critical=False)
        return _pair(builder.sign(self._key, hashes.SHA256()), key)


def make(
    directory: Path, wanted: Mapping[str, Iterable[str]] = EVERYBODY, trust_domain: str = TRUST_DOMAIN
) -> list[str]:
    """Write what is missing or ends soon; the names of what was written. `wanted`: paths of URIs, and hosts."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    written = []
    try:
        authority = Authority(_read(directory, "ca"))
    except FileNotFoundError:
        authority = Authority.new()
        authority.pair.write(directory, "ca")
        written.append("ca")
    for path, hosts in wanted.items():
        name = name_of(path)
        if "ca" in written or _ends_soon(directory / f"{name}.pem"):
            authority.issue(f"spiffe://{trust_domain}/{path}", hosts=hosts).write(directory, name)
            written.append(name)
    return written


def make_apart(directory: Path, trust_domain: str = TRUST_DOMAIN) -> None:
    """For containers, of which each sees its part only: `purchases` and so on have own.pem, own-key.pem and ca.pem,
    `people` has those of all others; `ca` has everything."""
    everything = directory / "ca"
    make(everything, EVERYBODY, trust_domain)
    for path in EVERYBODY:
        process, name = path in PROCESSES, name_of(path)
        part = directory / (path.rpartition("/")[2] if process else "people")
        part.mkdir(mode=0o700, exist_ok=True)
        _replace(part / "ca.pem", (everything / "ca.pem").read_bytes(), 0o644)
        _read(everything, name).write(part, "own" if process else name)


def name_of(path: str) -> str:
    """Of the files for branch/12/till/POS-3: branch-12-till-POS-3."""
    return path.replace("/", "-")


def environ(directory: Path, path: str) -> dict[str, str]:
    """The settings with which a process is who `path` says."""
    name = name_of(path)
    return {
        "TLS_CERTIFICATE_FILE": str(directory / f"{name}.pem"),
        "TLS_KEY_FILE": str(directory / f"{name}-key.pem"),
        "TLS_CA_FILE": str(directory / "ca.pem"),
    }


def _begin(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    lasts: timedelta,
    begins: datetime | None = None,
) -> x509.CertificateBuilder:
    begins = begins or datetime.now(UTC) - timedelta(minutes=5)  # others' clocks
    return (
        x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(begins + lasts)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Pair(certificate.public_bytes(serialization.Encoding.PEM), private)


def _read(directory: Path, name: str) -> Pair:
    return Pair((directory / f"{name}.pem").read_bytes(), (directory / f"{name}-key.pem").read_bytes())


def _ends_soon(file: Path) -> bool:
    try:
        ends = x509.load_pem_x509_certificate(file.read_bytes()).not_valid_after_utc
    except (FileNotFoundError, ValueError):
        return True
    return ends - datetime.now(UTC) < RENEWED_BEFORE


def _replace(path: Path, content: bytes, mode: int) -> None:
    """In one step: nobody reads half a file."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    fresh.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m deploy.certificates", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("directory", type=Path, nargs="?", default=HERE)
    parser.add_argument("paths", nargs="*", metavar="URI_PATH[=HOST,HOST]")
    parser.add_argument("--trust-domain", default=os.environ.get("TRUST_DOMAIN") or TRUST_DOMAIN)
    parser.add_argument("--keep-apart", action="store_true", help="each process's in a directory; stay, and look daily")
    asked = parser.parse_args()
    while asked.keep_apart:
        make_apart(asked.directory, asked.trust_domain)
        time.sleep(86_400)
    wanted = dict(_wanted(path) for path in asked.paths) or EVERYBODY
    written = make(asked.directory, wanted, asked.trust_domain)
    print(f"{asked.directory}: {len(written)} new, {len(wanted) + 1 - len(written)} as they were", file=sys.stderr)


def _wanted(argument: str) -> tuple[str, tuple[str, ...]]:
    path, _, hosts = argument.partition("=")
    return path.strip("/"), tuple(filter(None, hosts.split(",")))


if __name__ == "__main__":
    main()
