"""Many tills at work at once: sends a list of sales as fast as the service takes them, some of them twice."""

import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Self

from chassis.tls import Broken
from pos.client import Recorded, Sale
from pos.errors import PosError
from pos.journal import JournalError
from pos.journal_tills import JournalTill, divided
from pos.lines import Identities, Lines

# The service commits what arrives together in one transaction, so it wants many sales in flight; beyond some
# dozens the threads only wait for each other, since Python runs one at a time.
TILLS = 32
TILLS_PER_CHANNEL = 8  # a connection each: the service's workers share connections, not calls

# Real tills repeat themselves when an answer is late. Of 1,000 sales, this many are sent twice on purpose:
AGAIN_PER_MILLE = 25  # once more after the answer
AT_ONCE_PER_MILLE = 25  # two at the same time

Way = Callable[..., Recorded]  # of a sale to the service


class SaleFailed(Exception):
    """A sale was refused, or its outcome is unknown after all patience; no till goes on."""

    def __init__(self, sale: Sale, reason: str) -> None:
        super().__init__(
            f"sale {sale.receipt_id} (branch {sale.branch_id}, till {sale.pos_id}, "
            f"{sale.purchase_time:%Y-%m-%d %H:%M}): {reason}"
        )


class Repetition(Enum):
    """How a sale is sent a second time."""

    AT_ONCE = "both at the same time"
    AGAIN = "once more after the answer"


def repeats(sale: Sale, seed: int) -> Repetition | None:
    """Whether and how a sale is sent twice; depends on the seed and the sale alone."""
    lot = zlib.crc32(sale.idempotency_key.encode(), seed & 0xFFFFFFFF) % 1000
    if lot < AT_ONCE_PER_MILLE:
        return Repetition.AT_ONCE
    return Repetition.AGAIN if lot < AT_ONCE_PER_MILLE + AGAIN_PER_MILLE else None


def check_same(sale: Sale, first: Recorded, second: Recorded) -> None:
    """Raises SaleFailed if the two answers to one sale are not the same purchase, stored once."""
    same = first.purchase.purchase_id == second.purchase.purchase_id
    if not same or not (first.replayed or second.replayed):
        raise SaleFailed(sale, "it was sent twice, and stored twice")


class Tills:
    """Threads that send sales while the block runs; leaving it early stops them at once.

    The counters may be read at any time.
    """

    def __init__(
        self,
        sales: Iterable[Sale],
        target: str,
        *,
        seed: int,
        identities: Identities = Identities(),
        streams: bool = False,
        journals: Path | None = None,
    ) -> None:
        """`seed` decides which sales are sent twice; with `streams`, they go over open streams instead of by calls.
        `journals`: a directory that stays, in which one till of each branch keeps a journal.
        """
        self.recorded = 0  # sales answered, each counted once
        self.replayed = 0  # of those, sales that had been stored before
        self.duplicates_sent = 0
        self.trouble: PosError | None = None  # why the tills wait; None while sales get through
        self._seed, self._streams = seed, streams
        without, self._kept = divided(sales) if journals else (sales, {})
        self._waiting, self._journals = deque(without), journals
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._lines = Lines(target, identities, shared=TILLS // TILLS_PER_CHANNEL, pause=self._pause)
        self._threads = ThreadPoolExecutor(TILLS + len(self._kept), "till")
        self._twins = ThreadPoolExecutor(TILLS, "twin")  # at most one sale's twin for each till
        self._futures: set[Future[None]] = set()

    def __enter__(self) -> Self:
        self._futures = {self._threads.submit(self._work, number) for number in range(TILLS)}
        self._futures |= {self._threads.submit(self._keep, sales) for sales in self._kept.values()}
        return self

    def wait(self, timeout_s: float) -> bool:
        """Wait until all sales are sent, `timeout_s` at most; True when they are.

        Raises:
            SaleFailed: one of them was not stored, or nobody knows.
        """
        done, pending = wait(self._futures, timeout_s, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        return not pending

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._lines.close()  # ends the calls in flight
        self._threads.shutdown(cancel_futures=True)
        self._twins.shutdown(cancel_futures=True)

    def _work(self, number: int) -> None:
        while not self._stop.is_set():
            try:
                sale = self._waiting.popleft()
            except IndexError:
                return
            try:
                self._sell(self._way_of(sale, number), sale)
            except (PosError, Broken) as error:
                raise SaleFailed(sale, str(error)) from error

    def _keep(self, sales: Sequence[Sale]) -> None:
        assert self._journals
        try:
            till = JournalTill(self._journals, sales, self._lines.of(sales[0]), self._stop)
            refused = till.sell(self._note_stored, self._note_trouble)
        except (PosError, Broken, JournalError) as error:
            raise SaleFailed(sales[-1], str(error)) from error
        if refused:
            raise SaleFailed(sales[-1], refused)

    def _note_stored(self, stored: int, before: int) -> None:
        with self._lock:
            self.recorded += stored
            self.replayed += before

    def _note_trouble(self, why: PosError | None) -> None:
        self.trouble = why

    def _way_of(self, sale: Sale, number: int) -> Way:
        if self._streams:
            return self._lines.stream_of(sale, number).record
        return self._lines.of(sale, number).create_purchase

    def _sell(self, way: Way, sale: Sale) -> None:
        def send() -> Recorded:
            return way(sale, register_customer=True)

        twin: Recorded | None = None
        repetition = repeats(sale, self._seed)
        if repetition is Repetition.AT_ONCE:
            concurrent = self._twins.submit(send)
            first, twin = send(), concurrent.result()
        else:
            first = send()
            if repetition is Repetition.AGAIN:
                twin = send()
        if twin:
            check_same(sale, first, twin)
        self.trouble = None
        with self._lock:
            self.recorded += 1
            self.replayed += first.replayed and (twin is None or twin.replayed)
            self.duplicates_sent += twin is not None

    def _pause(self, pause_s: float, why: PosError) -> None:
        self.trouble = why
        if self._stop.wait(pause_s):
            raise why
