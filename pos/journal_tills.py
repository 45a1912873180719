"""Tills of the simulated chain that keep a journal: each sells into it as one after the other comes, and now and then
there is a network.
"""

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pos.client import PosClient, Sale
from pos.errors import PosError
from pos.journal import Journal
from pos.lines import TOTAL_TIMEOUT_S

SOLD_OFFLINE = 25  # sales, before the next time that there is a network
FLUSH_S = 10.0
PAUSE_S = 0.1  # after a flush that did not get through

KEEPS_JOURNAL = "POS-1"  # of each branch


def divided(sales: Iterable[Sale]) -> tuple[list[Sale], dict[int, list[Sale]]]:
    """The sales of tills without a journal, and of those with one, by branch."""
    without: list[Sale] = []
    kept: dict[int, list[Sale]] = {}
    for sale in sales:
        (kept.setdefault(sale.branch_id, []) if sale.pos_id == KEEPS_JOURNAL else without).append(sale)
    return without, kept


class JournalTill:
    """One of them. Its disk stays: begun again, with the same sales, it goes on behind those that it has."""

    def __init__(self, directory: Path, sales: Sequence[Sale], client: PosClient, stop: threading.Event) -> None:
        """`sales` are all of this till, in their order; the disk is below `directory`."""
        self._sales, self._client, self._stop = sales, client, stop
        self._till = (sales[0].branch_id, sales[0].pos_id)
        self._directory = directory / f"branch-{self._till[0]}-{self._till[1]}"

    def sell(self, stored: Callable[[int, int], None], trouble: Callable[[PosError | None], None]) -> str:
        """Sell all, and send all. `stored` is told how many sales are stored, and how many of them were before;
        `trouble`, why some wait. Returns why one was refused; empty if none was.

        Raises:
            PosError: the service does not tell what it knows of the till.
            JournalError: the disk does not do.
        """
        with self._opened() as journal:
            sold = last.sequence if (last := journal.status().last) else 0
            before = sold - journal.status().waiting - journal.status().refused
            stored(min(before, len(self._sales)), min(before, len(self._sales)))
            for number, sale in enumerate(self._sales[sold:], 1):
                if self._stop.is_set():
                    return ""
                journal.record_sale(
                    sale.items,
                    cashier_id=sale.cashier_id,
                    customer_id=sale.customer_id,
                    purchase_time=sale.purchase_time,
                )
                if number % SOLD_OFFLINE == 0:
                    self._send(journal, stored, trouble)
            until = time.monotonic() + TOTAL_TIMEOUT_S
            while not self._stop.is_set() and (why := self._send(journal, stored, trouble)):
                if time.monotonic() > until:
                    raise why
                self._stop.wait(PAUSE_S)
            return "; ".join(refused.reason for refused in journal.refused())

    def _send(
        self, journal: Journal, stored: Callable[[int, int], None], trouble: Callable[[PosError | None], None]
    ) -> PosError | None:
        """Why some still wait."""
        flushed = journal.flush(self._client, within_s=FLUSH_S)
        stored(flushed.stored, 0)
        trouble(flushed.trouble)
        return flushed.trouble

    def _opened(self) -> Journal:
        """The disk that was there, unless it is another chain's: one whose service has never heard of its journal."""
        branch_id, pos_id = self._till
        journal = Journal(self._directory, branch_id=branch_id, pos_id=pos_id)
        if (last := journal.status().last) is None or last.sequence == journal.status().waiting:
            return journal
        if any(state.epoch == journal.status().epoch for state in self._client.till_states(branch_id, pos_id)):
            return journal
        journal.close()
        shutil.rmtree(self._directory)
        return Journal(self._directory, branch_id=branch_id, pos_id=pos_id)
