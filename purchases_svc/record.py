"""Recording sales: what is taken in, and the way that each sale takes."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from zoneinfo import ZoneInfo

from uuid_utils import uuid7

from chassis import traces
from chassis.postgres import Pool
from chassis.traces import Span
from chassis.zones import business_day
from purchases_svc.admission import Admission
from purchases_svc.answers import Outcome, Recorded
from purchases_svc.backlog import Backlog
from purchases_svc.branches import Branches
from purchases_svc.entry import Call, Entry
from purchases_svc.errors import OutboxFull
from purchases_svc.flush import Flushes
from purchases_svc.months import Months
from purchases_svc.partitions import Partitions
from purchases_svc.sale import Purchase, Sale, nanoseconds
from purchases_svc.tasks import Tasks
from purchases_svc.writing import Writing

NO_SPANS: Mapping[int, Span] = MappingProxyType({})


class Recorder:
    """Takes in sales and answers each after it is durable."""

    def __init__(
        self,
        pool: Pool,
        partitions: Partitions,
        backlog: Backlog,
        *,
        zone: ZoneInfo,
        batch_max: int,
        waiting_max: int,
        waiting_items_max: int,
        flush_timeout_s: float,
        backlog_months: int = 0,
        retention_months: Callable[[], int] = lambda: 0,
        standby_required: bool = False,
        branches: Branches | None = None,
    ) -> None:
        """`pool` has `flush.CONNECTIONS` connections; `zone` cuts business days. `batch_max` sales go in one flush,
        which has `flush_timeout_s` for all that may happen to it. `waiting_max` sales may be on their way, with
        `waiting_items_max` items in all. `branches` are those whose sales are recorded here; without it, all are.
        """
        self._partitions, self._backlog, self._zone = partitions, backlog, zone
        self._flush_timeout_s = flush_timeout_s
        self.branches = branches or Branches()
        self._admission = Admission(waiting_max, waiting_items_max)
        self._tasks = Tasks()
        writing = Writing(pool, flush_timeout_s, standby_required=standby_required)
        self._flushes = Flushes(writing, self._admission, self._tasks, batch_max, self._without_month, self.branches)
        self._months = Months(
            partitions,
            writing,
            self._flushes.waiting,
            self._tasks,
            self._flushes.add,
            backlog_months=backlog_months,
            retention_months=retention_months,
        )

    async def record(self, sale: Sale, caller: str = "") -> Recorded:
        """Store one sale, or find it stored; see `take_in`. Raises what becomes of it, if that is an error."""
        span = traces.current()
        call = self.take_in([sale], caller, {0: span} if span else NO_SPANS)
        await call.answered
        (outcome,) = call.outcomes
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def record_all(self, sales: Sequence[Sale], caller: str = "") -> list[Outcome]:
        """Store sales, or find them stored: for each what holds it, or why it was refused; see `take_in`."""
        call = self.take_in(sales, caller)
        await call.answered
        return call.outcomes

    def take_in(self, sales: Sequence[Sale], caller: str = "", spans: Mapping[int, Span] = NO_SPANS) -> Call:
        """Have sales stored, or found stored: once the call is answered, each has what holds it, or why it was refused.

        IdempotencyKeyReused, ReceiptExists, CustomerUnknown and PurchaseTimeOutOfRange mean that nothing is stored.
        With any other error it is not known: send the sale again with its key. So it is for a caller that gives up:
        what it sent is left out if it was still waiting, and goes its way if it was not. `spans` are of the sales that
        are traced, by their place.

        Raises:
            Overloaded, OutboxFull: too many sales, or too many events, wait already; none of these was taken in.
        """
        self._require_open()
        self._admission.enter(caller, sales)
        now = datetime.datetime.now(datetime.UTC)
        call = Call(caller, len(sales), kept=all(sale.was_kept(now) for sale in sales))
        limits = self._months.limits(now)
        apart = []  # as a rule none
        for place, sale in enumerate(sales):
            in_range = limits.earliest <= sale.purchase_time <= limits.latest
            time = sale.purchase_time if in_range else now
            # The one place in which a business day is decided: whoever needs it later reads what is stored.
            purchase = Purchase(_id(time), _id(now), now, business_day(time, self._zone), sale)
            entry = Entry(purchase, call, place, spans.get(place) if spans else None)
            if in_range and self._partitions.has(sale.purchase_time, now):
                self._flushes.add(entry)
            else:
                apart.append(entry)
        for place, span in spans.items():
            span.note({"retail.idempotency_key": sales[place].idempotency_key})
        if apart:
            self._months.send(apart, limits)
        return call

    def ours(self, sale: Sale) -> Sale:
        """The sale, if this is the cell that records its branch's.

        Raises:
            WrongCell, BranchMoving
        """
        self.branches.require_ours(sale.branch_id)
        return sale

    def require_room(self, caller: str, sales: int) -> None:
        """Whether so many sales could be taken in now, to be asked before they are looked at.

        Raises:
            Overloaded, OutboxFull
        """
        self._require_open()
        self._admission.require_room(caller, sales)

    def _require_open(self) -> None:
        if self._backlog.full:
            raise OutboxFull("too many events wait for the broker; try again later")

    def _without_month(self, entries: Sequence[Entry]) -> None:
        self._partitions.forget()
        self._months.make(entries)

    async def close(self) -> None:
        """Wait until everything taken in is answered, as long as a flush may take at most; what is not by then is cut
        off, and its callers find out by sending it again.
        """
        await self._flushes.close()
        await self._tasks.close(self._flush_timeout_s)


def _id(moment: datetime.datetime) -> str:
    """A UUIDv7 of that moment, which tells the partition; random ids would nearly halve the speed of inserting."""
    return str(uuid7(nanoseconds=nanoseconds(moment)))
