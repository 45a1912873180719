"""What may be said in plaintext, and to whom: within this machine everything, beyond it nothing unless it is allowed.

`settings.load` holds every process and command to it, by the kinds of its settings: where it listens, whom it calls,
its databases, its broker.
"""

import dataclasses
import ipaddress
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from chassis import settings
from chassis.settings import Setting, choice, setting

TLS_FILES = ("TLS_CERTIFICATE_FILE", "TLS_KEY_FILE", "TLS_CA_FILE")
ALLOW = "ALLOW_PLAINTEXT"
BUT_FOR = f"unless {ALLOW}=yes says that something else, such as a mesh, keeps others out"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaintextSettings:
    allow_plaintext: str = setting(
        ALLOW,
        choice("yes", "no"),
        "yes or no",
        "yes: other machines are spoken to without TLS, or without checking who they are; for a mesh that does that",
        default="no",
    )


def problems(declared: Sequence[Setting], values: Mapping[str, Any]) -> list[str]:
    """A line for each setting by which something would leave this machine in plaintext; by name, as `values` are."""
    if values.get(ALLOW) == "yes":
        return []
    certified = all(values.get(name) for name in TLS_FILES)
    found = []
    for each in declared:
        reached = _REACHED.get(each.parse)
        if reached and (value := values.get(each.name)) and (hosts := list(reached(value, certified))):
            missing = _MISSING[each.parse]
            found.append(f"{each.name}: {', '.join(hosts)} is beyond this machine: {missing}, {BUT_FOR}")
    return found


def is_local(host: str) -> bool:
    """Whether what is said to that host stays within this machine."""
    if host == "localhost" or host.startswith(("/", "@")):  # a directory of sockets, an abstract socket
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def called(address: str, certified: bool) -> Iterator[str]:
    """The hosts beyond this machine that would be called in plaintext.

    Of `host:port`, or of a target as gRPC has them: dns:///host:port, ipv4:1.2.3.4:5,6.7.8.9:10, unix:/path.
    """
    scheme, colon, rest = address.partition(":")
    if certified or (colon and scheme in ("unix", "unix-abstract")):
        return
    schemed = colon and (scheme in ("dns", "ipv4", "ipv6"))
    for each in rest.rpartition("/")[2].split(",") if schemed else [address]:
        host = each.rpartition(":")[0] or each
        if not is_local(host):
            yield host


def _databases(url: str, _: bool) -> Iterator[str]:
    """As libpq reads it: what the URL leaves out is taken from PGHOST, PGSSLMODE and their like."""
    from psycopg import conninfo, pq

    options = {it.keyword.decode(): it.val.decode() for it in pq.Conninfo.get_defaults() if it.val is not None}
    options |= {name: str(value) for name, value in conninfo.conninfo_to_dict(url).items()}
    if options.get("sslmode") == "verify-full" and options.get("ssl_min_protocol_version") not in ("TLSv1", "TLSv1.1"):
        return
    if "service" in options:
        yield f"the service {options['service']}"  # a file says where that is, and may say another thing tomorrow
    for host in (options.get("hostaddr") or options.get("host") or "").split(","):
        if host and not is_local(host):
            yield host


def _brokers(url: str, _: bool) -> Iterator[str]:
    from chassis import amqp

    for node in amqp.nodes(url):
        if not is_local(node.host) and not amqp.is_verified(node):
            yield node.host


def _collectors(url: str, _: bool) -> Iterator[str]:
    scheme, authority, _rest = settings.pieces(url)
    host = authority.rpartition(":")[0]
    if scheme == "http" and not is_local(host):
        yield host


_REACHED: Mapping[Callable[[str], Any], Callable[[str, bool], Iterator[str]]] = {
    settings.listen_address: called,
    settings.target: called,
    settings.postgres_url: _databases,
    settings.amqp_url: _brokers,
    settings.collector_url: _collectors,
}
_MISSING: Mapping[Callable[[str], Any], str] = {
    settings.listen_address: f"set {', '.join(TLS_FILES)}",
    settings.target: f"set {', '.join(TLS_FILES)}",
    settings.postgres_url: "the URL needs sslmode=verify-full, and no older TLS than 1.2",
    settings.collector_url: "the URL must begin with https://",
    settings.amqp_url: "the URL must begin with amqps:// and leave the broker's name and certificate checked",
}
