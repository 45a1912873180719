"""The client library, once for each till that has a certificate; without certificates, all tills share one client."""

import threading
from pathlib import Path

from chassis.tls import Broken, Credentials
from pos.client import PosClient, connect

ATTEMPT_TIMEOUT_S, TOTAL_TIMEOUT_S = 3.0, 8.0  # somebody waits at the till
TILLS_MAX = 256  # that are remembered


class Clients:
    """Safe to share between threads."""

    def __init__(self, target: str, own: Credentials | None, certificates: Path | None) -> None:
        """`certificates` is a directory of the tills' own: branch-1-till-POS-3.pem, …-key.pem, and ca.pem."""
        self._target, self._certificates = target, certificates
        self._opening = threading.Lock()
        self._tills: dict[tuple[int, str], PosClient] = {}
        self.own = self._open(own)  # of whoever runs the pages: reads customers and receipts

    def of_till(self, branch_id: int, pos_id: str) -> PosClient:
        """Who sells there.

        Raises:
            chassis.tls.Broken: the till has no certificate here.
        """
        if self._certificates is None:
            return self.own
        with self._opening:
            till = (branch_id, pos_id)
            if till not in self._tills:
                if "/" in pos_id or "\0" in pos_id or len(self._tills) >= TILLS_MAX:
                    raise Broken(f"no certificate for {pos_id}")
                files = self._certificates / f"branch-{branch_id}-till-{pos_id}"
                ca = str(self._certificates / "ca.pem")
                self._tills[till] = self._open(Credentials(f"{files}.pem", f"{files}-key.pem", ca))
            return self._tills[till]

    def _open(self, credentials: Credentials | None) -> PosClient:
        return PosClient(
            connect(self._target, credentials),
            attempt_timeout_s=ATTEMPT_TIMEOUT_S,
            total_timeout_s=TOTAL_TIMEOUT_S,
            reach=lambda address: connect(address, credentials),  # where a till's branch is in another cell
        )
