"""How the run's own callers reach the system: with certificates, where the system has them, each caller its own."""

from pathlib import Path
from typing import Any

import grpc

from chassis import grpc_client
from chassis.tls import Credentials
from deploy import certificates

OPERATOR, READER = "operator/faults", "reader/faults"


class Identities:
    """Without a directory for them there are no certificates, and all is in plaintext."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def settings(self, service: str) -> dict[str, str]:
        """With which a service has its certificates."""
        path = f"service/{service}"
        return self._made(path, certificates.LOOPBACK) if self._directory else {}

    def credentials(self, path: str) -> Credentials | None:
        return Credentials(*self._made(path).values()) if self._directory else None

    def channel(
        self, target: str, path: str = OPERATOR, options: list[tuple[str, Any]] = grpc_client.OPTIONS
    ) -> grpc.Channel:
        """A channel of whom the path names, such as branch/1/till/POS-3."""
        return grpc_client.connect_blocking(target, self.credentials(path), options)

    def _made(self, path: str, hosts: tuple[str, ...] = ()) -> dict[str, str]:
        assert self._directory
        certificates.make(self._directory, {path: hosts})
        return certificates.environ(self._directory, path)
