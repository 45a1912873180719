"""The sales of one till: recorded, sent, looked after."""

import datetime
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from pos.client import Item, PosClient, Sale
from pos.errors import PosError, SaleRefused
from pos.journal import sales
from pos.journal.answers import Answers
from pos.journal.reporting import Reporter
from pos.journal.rows import New, Row, Settled, State, boot
from pos.journal.sales import Flushed, JournalFull, JournalStatus, Limits, Receipt, RefusedSale, Resolution
from pos.journal.store import Store
from pos.sale import create_request

WARN_AT = 0.8  # of a limit
KEPT = datetime.timedelta(days=30)  # what is stored at the service stays here for so long
CLOCK_OFF = datetime.timedelta(minutes=2)  # a till's clock that is further off wants somebody to look at it
READ_SALES = 500  # rows read at a time while sending


class Journal:
    """The sales of one till. One process has it open at a time."""

    def __init__(
        self,
        directory: Path,
        *,
        branch_id: int,
        pos_id: str,
        limits: Limits = Limits(),
        zone: datetime.tzinfo | None = None,
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        """Opens the journal in `directory`, or begins one. `zone` is the chain's, which cuts business days: receipts
        have the day then. `now` is the till's clock.

        Raises:
            JournalLocked: another process has it open.
            JournalOfAnotherTill, JournalTooNew, JournalDamaged, JournalNotWritten
        """
        self.branch_id, self.pos_id, self.limits = branch_id, pos_id, limits
        self._directory, self._zone, self._now = directory, zone, now
        self._store = Store(directory, branch_id=branch_id, pos_id=pos_id)
        self._selling, self._flushing = threading.Lock(), threading.Lock()
        self._reporter = Reporter(self._store, branch_id, pos_id, now)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """What waits stays on the disk. A flush under way in another thread ends with an error."""
        self._store.close()

    def record_sale(
        self,
        items: Sequence[Item],
        *,
        cashier_id: int,
        customer_id: str | None = None,
        register_customer: bool = True,
        purchase_time: datetime.datetime | None = None,
    ) -> Receipt:
        """Write a sale to the disk. When this returns, no power cut loses it, and its receipt may be printed.

        `register_customer` registers the customer with the sale, if it is a new one. `purchase_time` is now unless
        given, as for a sale that was written down by hand.

        Raises:
            pos.errors.InvalidSale: no message can say what is in the sale; nothing was written.
            JournalFull: a limit is reached; nothing was written.
            JournalNotWritten: the disk refused. The sale is not in the journal and will not come up again: no receipt.
        """
        moment = self._now()
        draft = Sale(
            receipt_id="?",  # it is given its number by the row
            branch_id=self.branch_id,
            cashier_id=cashier_id,
            pos_id=self.pos_id,
            items=[Item(*item) for item in items],
            customer_id=customer_id,
            purchase_time=purchase_time or moment,
        )
        create_request(draft, register_customer)  # raises what cannot be sent, before it is in the way
        with self._selling:
            warnings = self._require_room(draft.total_cents)
            return self._append(draft, register_customer, moment)._replace(warnings=warnings)

    def flush(self, client: PosClient, *, within_s: float) -> Flushed:
        """Send what waits, each sale once, in the order in which they were sold, until nothing waits or the time is up.

        Sales that are recorded meanwhile are sent as well. Nothing is raised because of the network or the service:
        `trouble` tells, and what waits goes on waiting. A flush in another thread is waited for, as long.

        Raises:
            JournalNotWritten: an answer could not be noted; those sales are sent again with the next flush, which
                changes nothing.
        """
        until = time.monotonic() + within_s
        stored = refused = 0
        trouble: PosError | None = None
        if not self._flushing.acquire(timeout=max(within_s, 0)):
            return Flushed(0, 0, self._store.sums(State.WAITING)[0], None)
        try:
            answers = Answers(self._store, self._now)
            try:
                self._reporter.report(client, _left(until))
                uploads = client.upload_purchases(
                    self._waiting(until, answers),
                    register_customers=lambda sale: answers.registers[sale.idempotency_key],
                    within_s=_left(until),
                )
                for sale, outcome in uploads:
                    answers.take(sale, outcome)
                    if isinstance(outcome, PosError) and not isinstance(outcome, SaleRefused):
                        trouble = outcome
            except PosError as error:
                trouble = error
            finally:
                answers.write()
            stored, refused = answers.stored, answers.refused
            if answers.clock_offset_ms is not None:
                self._store.note_offset(answers.clock_offset_ms)
            self._store.forget(sales.text(self._now() - KEPT))
        finally:
            self._flushing.release()
        return Flushed(stored, refused, self._store.sums(State.WAITING)[0], trouble)

    def status(self) -> JournalStatus:
        """What waits, what was refused, how full the journal is, and what somebody should look at."""
        waiting, waiting_cents = self._store.sums(State.WAITING)
        refused, refused_cents = self._store.sums(State.REFUSED)
        oldest = self._store.rows([State.WAITING], limit=1)
        last = self._store.last()
        meta = self._store.meta()
        used = self._used(0)
        warnings = [*_near(used), *self._clock_warnings(last, meta.clock_offset_ms), *filter(None, [meta.note])]
        if refused:
            warnings.append(f"sales that were refused wait for somebody to look at them: {refused:,}")
        return JournalStatus(
            waiting=waiting,
            waiting_cents=waiting_cents,
            oldest_waiting=sales.moment(oldest[0].device_time) if oldest else None,
            refused=refused,
            refused_cents=refused_cents,
            last=sales.receipt(last) if last else None,
            bytes=self._store.bytes(),
            epoch=meta.epoch,
            clock_offset=sales.milliseconds(meta.clock_offset_ms),
            used=max(used.values()),
            warnings=tuple(warnings),
        )

    def refused(self) -> list[RefusedSale]:
        """The sales that wait for somebody to look at them, the oldest first."""
        return [
            RefusedSale(row.sequence, sales.as_sale(row)[0], row.reason, sales.moment(row.settled_time))
            for row in self._store.rows([State.REFUSED])
        ]

    def resolve(self, sequence: int, how: Resolution, *, note: str) -> Receipt | None:
        """Settle a refused sale. `note` says who decided, and why; it stays with the sale.

        The receipt is that of the new sale, for NEW_NUMBER.

        Raises:
            KeyError: no refused sale has that number.
            JournalNotWritten: nothing was changed.
        """
        row = next((row for row in self._store.rows([State.REFUSED], after=sequence - 1, limit=1)), None)
        if row is None or row.sequence != sequence:
            raise KeyError(f"no refused sale has the number {sequence}")
        receipt = None
        if how is Resolution.SEND_AGAIN:
            self._settle_refused(Settled(sequence, State.WAITING, row.reason, note=note))
            return None
        if how is Resolution.NEW_NUMBER:
            # The new one first: a till that dies in between has both, and the old one is still refused.
            receipt = self._replacement(sequence)
            if receipt is None:
                sale, register = sales.as_sale(row)
                with self._selling:
                    new = replace(sale, idempotency_key=str(uuid.uuid4()))
                    receipt = self._append(new, register, self._now(), replaces=sequence)
            note = f"{note} (sold again as {receipt.receipt_id})"
        self._settle_refused(Settled(sequence, State.RESOLVED, row.reason, note=note))
        return receipt

    def export(self, path: Path) -> int:
        """Write all sales as JSON lines, for a person or another machine; returns how many. The file is whole or is not
        there.
        """
        rows = self._store.rows()
        beside = path.with_name(path.name + ".part")
        with beside.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(sales.exported(row), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        return len(rows)

    def verify(self) -> list[str]:
        """What is wrong with what the disk has; empty when every sale is as it was written, and none is missing."""
        damage = self._store.verify()
        if not damage:
            damage = [text for row in self._store.rows() if (text := sales.mismatch(row))]
        return damage

    # --- how ---

    def _append(
        self, draft: Sale, register_customer: bool, moment: datetime.datetime, replaces: int | None = None
    ) -> Receipt:
        def payload(receipt_id: str) -> bytes:
            return sales.payload(replace(draft, receipt_id=receipt_id), register_customer, replaces)

        boot_id, boot_ns = boot()
        row = self._store.append(
            New(
                idempotency_key=draft.idempotency_key,
                business_date=self._day(draft.purchase_time),
                device_time=sales.text(moment),
                boot_id=boot_id,
                boot_ns=boot_ns,
                amount_cents=draft.total_cents,
                payload=payload,
            )
        )
        return sales.receipt(row)

    def _waiting(self, until: float, answers: Answers) -> Iterator[Sale]:
        """Sales as they are needed, those that are recorded meanwhile as well, each once. The last of the time is for
        answers.
        """
        after, until = 0, until - min(1.0, _left(until) / 5)
        while rows := self._store.rows([State.WAITING], after=after, limit=READ_SALES):
            for row in rows:
                if time.monotonic() > until:
                    return
                sale, register = sales.as_sale(row)
                answers.expect(sale, row.sequence, register)
                yield sale
                after = row.sequence

    def _settle_refused(self, settled: Settled) -> None:
        with self._selling:
            self._store.settle([settled], now=sales.text(self._now()), only_from=[State.REFUSED])

    def _replacement(self, sequence: int) -> Receipt | None:
        for row in self._store.rows(after=sequence):
            if row.state is not State.VOID and json.loads(row.payload).get("replaces") == sequence:
                return sales.receipt(row)
        return None

    def _require_room(self, cents: int) -> tuple[str, ...]:
        """Raises JournalFull; returns what is nearly full, and what the clock looks like."""
        free = os.statvfs(self._directory)
        if free.f_bavail * free.f_frsize < self.limits.free_bytes:
            raise JournalFull(f"the disk has less than {self.limits.free_bytes >> 20} MiB left: free some of it")
        used = self._used(cents)
        if full := [name for name, share in used.items() if share > 1]:
            raise JournalFull(
                f"the journal is full, as to {' and '.join(full)}: it sells on once what waits has been sent"
            )
        last = self._store.last()
        return (*_near(used), *self._clock_warnings(last, self._store.meta().clock_offset_ms))

    def _used(self, cents: int) -> dict[str, float]:
        """Of each limit, the share that is used, with one more sale of so many cents."""
        waiting, waiting_cents = self._store.sums(State.WAITING)
        oldest = self._store.rows([State.WAITING], limit=1)
        age = self._age(oldest[0]) if oldest else datetime.timedelta()
        more = 1 if cents else 0
        return {
            f"{self.limits.sales:,} sales": (waiting + more) / self.limits.sales,
            f"{self.limits.age} of age": age / self.limits.age,
            f"{self.limits.amount_cents // 100:,} of amount": (waiting_cents + cents) / self.limits.amount_cents,
            f"{self.limits.bytes >> 20:,} MiB": self._store.bytes() / self.limits.bytes,
        }

    def _age(self, row: Row) -> datetime.timedelta:
        """By the time since the machine's start, which nobody sets; across starts, by the till's clock."""
        boot_id, boot_ns = boot()
        if boot_id and boot_id == row.boot_id:
            return datetime.timedelta(microseconds=(boot_ns - row.boot_ns) // 1000)
        return max(self._now() - sales.moment(row.device_time), datetime.timedelta())

    def _clock_warnings(self, last: Row | None, clock_offset_ms: int | None) -> Iterator[str]:
        offset = sales.milliseconds(clock_offset_ms)
        if offset is not None and abs(offset) > CLOCK_OFF:
            behind = "behind" if offset > datetime.timedelta() else "ahead of"
            yield f"the till's clock is {abs(offset)} {behind} the service's"
        if last is not None and sales.moment(last.device_time) - self._now() > CLOCK_OFF:
            yield f"the till's clock went back: the latest sale was at {last.device_time}"

    def _day(self, moment: datetime.datetime) -> str | None:
        return moment.astimezone(self._zone).date().isoformat() if self._zone is not None else None


def _near(used: dict[str, float]) -> Iterator[str]:
    for name, share in used.items():
        if share >= WARN_AT:
            yield f"{share:.0%} of {name} are used"


def _left(until: float) -> float:
    return max(until - time.monotonic(), 0.0)
