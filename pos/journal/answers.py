"""What the service says of sales, noted on the till's disk."""

import datetime
import time
from collections.abc import Callable

from pos.client import Recorded, Sale
from pos.errors import PosError, SaleRefused
from pos.journal import sales
from pos.journal.rows import Settled, State
from pos.journal.store import Store

SETTLE_S, SETTLE_SALES = 0.2, 500  # answers are noted together: one sync of the disk for so many


class Answers:
    """Notes what became of sales, some at a time."""

    def __init__(self, store: Store, now: Callable[[], datetime.datetime]) -> None:
        self.stored = self.refused = 0
        self.clock_offset_ms: int | None = None
        self.registers: dict[str, bool] = {}  # by key: whether the customer is registered with the sale
        self._store, self._now = store, now
        self._sequences: dict[str, int] = {}  # by key
        self._open: list[Settled] = []
        self._since = time.monotonic()

    def expect(self, sale: Sale, sequence: int, register: bool) -> None:
        """It is about to be sent."""
        self._sequences[sale.idempotency_key], self.registers[sale.idempotency_key] = sequence, register

    def take(self, sale: Sale, outcome: Recorded | PosError) -> None:
        sequence = self._sequences.pop(sale.idempotency_key)
        self.registers.pop(sale.idempotency_key)
        if isinstance(outcome, Recorded):
            self._open.append(Settled(sequence, State.STORED, purchase_id=outcome.purchase.purchase_id))
            if not outcome.replayed:
                self._see_clock(outcome.purchase.create_time)
        elif isinstance(outcome, SaleRefused):
            self._open.append(Settled(sequence, State.REFUSED, str(outcome)))
        if len(self._open) >= SETTLE_SALES or time.monotonic() - self._since > SETTLE_S:
            self.write()

    def write(self) -> None:
        """Raises JournalNotWritten: those answers are not noted."""
        settled, self._open, self._since = self._open, [], time.monotonic()
        if settled:
            self._store.settle(settled, now=sales.text(self._now()))
            self.stored += sum(each.state is State.STORED for each in settled)
            self.refused += sum(each.state is State.REFUSED for each in settled)

    def _see_clock(self, create_time: datetime.datetime) -> None:
        """The answer came after that moment, so the service's clock is ahead by so much at least; the fastest answer
        tells it best.
        """
        offset_ms = round((create_time - self._now()).total_seconds() * 1000)
        if self.clock_offset_ms is None or offset_ms > self.clock_offset_ms:
            self.clock_offset_ms = offset_ms
