"""The client library, once for each till that has a certificate; without, all tills of a cell share one client."""

import threading
from collections.abc import Callable
from pathlib import Path

from chassis.cells import Cell, Cells
from chassis.tls import Broken, Credentials
from pos.client import PosClient, connect

ATTEMPT_TIMEOUT_S, TOTAL_TIMEOUT_S = 3.0, 8.0  # somebody waits at the till
TILLS_MAX = 256  # that are remembered


class Clients:
    """Safe to share between threads."""

    def __init__(self, cells: Callable[[], Cells], own: Credentials | None, certificates: Path | None) -> None:
        """`certificates` is a directory of the tills' own: branch-1-till-POS-3.pem, …-key.pem, and ca.pem."""
        self._cells, self._own, self._certificates = cells, own, certificates
        self._opening = threading.Lock()
        self._tills: dict[tuple[int, str], PosClient] = {}
        self._readers: dict[str, PosClient] = {}  # by target

    def readers(self, branch_id: int | None = None) -> list[PosClient]:
        """Of whoever runs the pages: read customers and receipts, in each cell, or in the one that has the branch."""
        having = branch_id and self._cells().of_branch(branch_id)
        with self._opening:
            return [self._reader(cell) for cell in ([having] if having else self._cells().by_name.values())]

    def _reader(self, cell: Cell) -> PosClient:
        if cell.purchases not in self._readers:
            self._readers[cell.purchases] = self._open(cell.purchases, self._own)
        return self._readers[cell.purchases]

    def of_till(self, branch_id: int, pos_id: str) -> PosClient:
        """Who sells there.

        Raises:
            chassis.tls.Broken: the till has no certificate here.
        """
        if self._certificates is None:
            return self.readers(branch_id)[0]
        with self._opening:
            till = (branch_id, pos_id)
            if till not in self._tills:
                if "/" in pos_id or "\0" in pos_id or len(self._tills) >= TILLS_MAX:
                    raise Broken(f"no certificate for {pos_id}")
                files = self._certificates / f"branch-{branch_id}-till-{pos_id}"
                ca = str(self._certificates / "ca.pem")
                cells = self._cells()
                at = cells.of_branch(branch_id) or next(iter(cells.by_name.values()))
                self._tills[till] = self._open(at.purchases, Credentials(f"{files}.pem", f"{files}-key.pem", ca))
            return self._tills[till]

    def _open(self, target: str, credentials: Credentials | None) -> PosClient:
        return PosClient(
            connect(target, credentials),
            attempt_timeout_s=ATTEMPT_TIMEOUT_S,
            total_timeout_s=TOTAL_TIMEOUT_S,
            reach=lambda address: connect(address, credentials),  # where the branch has moved to another cell
        )
