"""Who sells and who attacks where callers are known: each till has a certificate, and limits of its own."""

import os
from pathlib import Path

import grpc

from chassis import tls
from deploy import certificates

DIRECTORY = "TILL_CERTIFICATES"  # as `pos` has it; where it is not set, nobody is known
BRANCH = 1
ATTACKER = "POS-99"


def make(directory: Path, tills: int) -> dict[str, str]:
    """Certificates of the service, the tills and the attacker; the settings with which all of them use them."""
    whose = {f"branch/{BRANCH}/till/{name}": () for name in (ATTACKER, *map(pos_id, range(tills)))}
    certificates.make(directory, {"service/purchases": certificates.LOOPBACK, **whose})
    return {DIRECTORY: str(directory), **certificates.environ(directory, "service/purchases")}


def pos_id(till: int) -> str:
    return f"POS-{till}"


def channel(address: str, pos_id: str) -> grpc.aio.Channel:
    """A connection of its own: that of a till with its certificate, if there are any."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    if not (directory := os.environ.get(DIRECTORY)):
        return grpc.aio.insecure_channel(address, options=options)
    files = certificates.environ(Path(directory), f"branch/{BRANCH}/till/{pos_id}")
    pem = tls.Credentials(*files.values()).now()
    return grpc.aio.secure_channel(address, tls.channel_credentials(pem), options=options)
