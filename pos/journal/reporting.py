"""What the till tells the service of its journal, and what it learns from the answer."""

import datetime
import time
from collections.abc import Callable

from grpc import StatusCode

from pos.client import PosClient, TillReport, TillState
from pos.errors import CallFailed
from pos.journal.rows import State
from pos.journal.store import Store

REPORT_EVERY_S = 300.0  # and with the first flush after a start, which is when a disk may be another
VOIDS_MAX = 1_000  # that a report may have


class Reporter:
    """Reports, and begins a new epoch when this disk turns out to be an old copy of itself, or to have a twin."""

    def __init__(self, store: Store, branch_id: int, pos_id: str, now: Callable[[], datetime.datetime]) -> None:
        self._store, self._branch_id, self._pos_id, self._now = store, branch_id, pos_id, now
        self._next_at = 0.0

    def report(self, client: PosClient, within_s: float) -> None:
        """Once in a while.

        Raises:
            PosError: the service did not answer, or does not let this till report.
            JournalNotWritten
        """
        until = time.monotonic() + within_s
        if time.monotonic() < self._next_at:
            return
        try:
            for epoch, first, last in self._store.epochs():
                state = self._tell(client, epoch, first, last, until)
                if epoch == self._store.meta().epoch and (why := _twin(state, last)):
                    note = f"this disk was restored from an image, or cloned: {why}; found {self._now():%Y-%m-%d %H:%M}"
                    began = self._store.begin_epoch(max(state.reported_through, state.highest_sequence, last) + 1, note)
                    self._tell(client, began.epoch, began.epoch_first, began.epoch_first - 1, until)
        except CallFailed as error:
            if error.status.code is not StatusCode.UNIMPLEMENTED:  # a service of a version before
                raise
        self._next_at = time.monotonic() + REPORT_EVERY_S

    def _tell(self, client: PosClient, epoch: str, first: int, last: int, until: float) -> TillState:
        gone = self._store.rows([State.VOID, State.RESOLVED])
        voids = tuple(row.sequence for row in gone if row.epoch == epoch)[-VOIDS_MAX:]
        asked_at = self._now()
        report = TillReport(
            self._branch_id, self._pos_id, epoch, first, last, voids, self._store.meta().clock_offset_ms
        )
        reported = client.report_till(report, within_s=until - time.monotonic())
        answered_at = self._now()
        offset = reported.server_time - (asked_at + (answered_at - asked_at) / 2)
        self._store.note_offset(round(offset.total_seconds() * 1000))
        return reported.state


def _twin(state: TillState, last: int) -> str:
    """Why somebody else must have had this journal; empty when nobody has."""
    known = max(state.reported_through, state.highest_sequence)
    if known > last:
        return f"the service knows its sales up to {known}, and this disk up to {last}"
    if state.conflict_count:
        return f"{state.conflict_count} of its numbers came with two sales"
    return ""
