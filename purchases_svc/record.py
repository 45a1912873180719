"""Recording sales: group commit.

While one flush is on its way to the database, the sales that arrive gather and go with the next; nobody waits for a
timer. A flush is one statement in one transaction for key, receipt, customer, purchase, items and event of all its
sales, and each caller gets its own answer after the commit.

What takes long holds up nobody else: a flush that is slow goes on beside the next one, a sale whose month has no
partition yet waits for it apart, and so does one that needs a row which somebody holds.
"""

import asyncio
import datetime
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from itertools import groupby
from typing import Any
from zoneinfo import ZoneInfo

import psycopg
import structlog
from prometheus_client import Counter, Histogram
from psycopg_pool import PoolTimeout
from uuid_utils import uuid7

from chassis.errors import TransactionConflict
from chassis.logs import Sampled
from chassis.postgres import Connection, Pool, patience
from chassis.zones import business_day
from purchases_svc import answers
from purchases_svc.admission import Admission, Turns
from purchases_svc.answers import Outcome, Recorded
from purchases_svc.aside import Aside
from purchases_svc.backlog import Backlog
from purchases_svc.entry import Call, Entry
from purchases_svc.errors import OutboxFull
from purchases_svc.insert import insert
from purchases_svc.partitions import Partitions
from purchases_svc.primary import require_standby
from purchases_svc.relay_bell import RelayBell
from purchases_svc.retention import horizon
from purchases_svc.sale import EARLIEST, FUTURE_MAX, Purchase, Sale, nanoseconds

BATCH_ITEMS_MAX = 4_000  # of a flush: everybody waits for it, so the biggest sales must not make it take seconds
ATTEMPTS_MAX = 4  # of a flush that meets a conflict or a lost connection
SLOW_FLUSH_S = 0.1  # after which the next one goes beside
COMPANY_S = 1.0  # for so long after two callers waited together, another one is expected at any moment
FLUSHES_MAX = 3  # at once; as a rule there is one
# For flushes; to make partitions, to look up keys, to look after those aside, to ring the relay's bell.
CONNECTIONS = FLUSHES_MAX + 3
# Whoever holds a row that a sale needs costs a flush so much, once; then that sale waits apart.
LOCK_TIMEOUT = {"lock_timeout": "100ms"}

FLUSHES = Counter("purchases_flushes_total", "Group commits.")
FLUSHED = Counter("purchases_flushed_sales_total", "Sales that went through a group commit.")
FLUSH_SECONDS = Histogram("purchases_flush_seconds", "Time of a group commit.")

log = structlog.get_logger()
_failed = Sampled("warning", "flush failed")


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
    ) -> None:
        """`pool` has CONNECTIONS connections; `zone` cuts business days. `batch_max` sales go in one flush, which has
        `flush_timeout_s` for all that may happen to it. `waiting_max` sales may be on their way, with
        `waiting_items_max` items in all.
        """
        self._pool, self._partitions, self._backlog = pool, partitions, backlog
        self._zone = zone
        self._backlog_months, self._retention_months = backlog_months, retention_months
        self._standby_required = standby_required
        self._batch_max, self._flush_timeout_s = batch_max, flush_timeout_s
        self._admission = Admission(waiting_max, waiting_items_max)
        self._waiting: Turns = Turns()
        self._on_their_way: dict[str, Entry] = {}  # by key
        self._aside = Aside(pool, self._wait, self._flush_alone, self._settle, self._drop, flush_timeout_s)
        self._relay_bell = RelayBell(pool)
        self._looking_up = asyncio.Lock()
        self._company_until = 0.0
        self._flusher: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # all that is under way

    async def record(self, sale: Sale, caller: str = "") -> Recorded:
        """Store one sale, or find it stored; see `take_in`. Raises what becomes of it, if that is an error."""
        (outcome,) = await self.record_all([sale], caller)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def record_all(self, sales: Sequence[Sale], caller: str = "") -> list[Outcome]:
        """Store sales, or find them stored: for each what holds it, or why it was refused; see `take_in`."""
        call = self.take_in(sales, caller)
        await call.answered
        return [outcome for outcome in call.outcomes if outcome is not None]

    def take_in(self, sales: Sequence[Sale], caller: str = "") -> Call:
        """Have sales stored, or found stored: once the call is answered, each has what holds it, or why it was refused.

        IdempotencyKeyReused, ReceiptExists, CustomerUnknown and PurchaseTimeOutOfRange mean that nothing is stored.
        With any other error it is not known: send the sale again with its key. So it is for a caller that gives up:
        what it sent is left out if it was still waiting, and goes its way if it was not.

        Raises:
            Overloaded, OutboxFull: too many sales, or too many events, wait already; none of these was taken in.
        """
        self._require_open()
        self._admission.enter(caller, sales)
        call = Call(caller, len(sales))
        now = datetime.datetime.now(datetime.UTC)
        earliest, open_from, latest = self._earliest(now), self._open_from(now), now + FUTURE_MAX
        out_of_range, early = [], []  # as a rule none
        for place, sale in enumerate(sales):
            in_range = earliest <= sale.purchase_time <= latest and (
                sale.purchase_time >= open_from or self._partitions.has(sale.purchase_time, now)
            )
            time = sale.purchase_time if earliest <= sale.purchase_time <= latest else now
            # The one place in which a business day is decided: whoever needs it later reads what is stored.
            entry = Entry(Purchase(_id(time), _id(now), now, business_day(time, self._zone), sale), call, place)
            if not in_range:
                out_of_range.append(entry)
            elif not self._partitions.has(sale.purchase_time, now):
                early.append(entry)
            else:
                self._wait(entry)
        self._send_for_partitions(early)
        if out_of_range:
            self._start(self._look_up(out_of_range))
        return call

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

    async def close(self) -> None:
        """Wait until everything taken in is answered, as long as a flush may take at most; what is not by then is cut
        off, and its callers find out by sending it again.
        """
        await self._aside.close()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=self._flush_timeout_s)
            for task in late:
                task.cancel()

    def _start(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _wait(self, entry: Entry) -> None:
        if self._aside.takes(entry):
            return
        self._waiting.put(entry)
        if self._flusher is None:
            self._flusher = self._start(self._flush_all())

    def _settle(self, entry: Entry, outcome: Outcome) -> None:
        """Answer a sale, and those that repeat its key: they share its outcome, unless they ask for something else and
        it was refused; then one of them gets its own chance.
        """
        entry.settle(outcome)
        self._leave(entry)
        repeats, entry.repeats = entry.repeats, []
        others = []
        for repeat in repeats:
            if isinstance(outcome, Recorded):
                self._settle(repeat, answers.replay(repeat.sale, outcome.purchase))
            elif _asks_for(repeat) == _asks_for(entry):
                self._settle(repeat, answers.for_one(outcome))
            else:
                others.append(repeat)
        self._pass_on(others)

    def _fail(self, entries: Sequence[Entry], error: Exception) -> None:
        for entry in entries:
            self._settle(entry, answers.for_one(error))

    def _leave(self, entry: Entry) -> None:
        self._admission.leave(entry.caller, entry.sale)
        if self._on_their_way.get(entry.sale.idempotency_key) is entry:
            del self._on_their_way[entry.sale.idempotency_key]

    # Sales that cannot go with the next flush.

    def _earliest(self, now: datetime.datetime) -> datetime.datetime:
        """Months that retention may drop, and their keys with them, take in no sales: one could come in twice."""
        return max(EARLIEST, _start(horizon(self._retention_months(), now.date())))

    def _open_from(self, now: datetime.datetime) -> datetime.datetime:
        """From here on, a sale may make its month; before, it has to be there."""
        return _start(horizon(self._backlog_months, now.date()))

    async def _look_up(self, entries: Sequence[Entry], *, closed: bool = False) -> None:
        """Answer sales of a time that is not taken in; `closed`: their month is. One look-up at a time: clocks that are
        wrong are no hurry.
        """
        try:
            async with self._looking_up, self._connection() as connection:
                now = datetime.datetime.now(datetime.UTC)
                sales = [entry.sale for entry in entries]
                outcomes = await answers.known_or_out_of_time(
                    connection, sales, now, earliest=self._earliest(now), open_from=self._open_from(now), closed=closed
                )
                await self._confirm(connection)
        except Exception as error:
            self._fail(entries, error)
            return
        for entry, outcome in zip(entries, outcomes, strict=True):
            if outcome is not None:
                self._settle(entry, outcome)
        self._send_for_partitions([entry for entry in entries if not entry.settled])

    def _send_for_partitions(self, entries: Sequence[Entry]) -> None:
        for _, month in groupby(sorted(entries, key=_month), key=_month):
            self._start(self._wait_for_partition(list(month)))

    async def _wait_for_partition(self, entries: Sequence[Entry]) -> None:
        """Sales of one month: have its partition made, and then go with the others."""
        try:
            async with asyncio.timeout(self._flush_timeout_s):
                await self._partitions.ensure(
                    {_month(entry) for entry in entries}, {entry.purchase.created_at.date() for entry in entries}
                )
        except psycopg.errors.DatetimeFieldOverflow:  # closed, by a retention that this process does not know of
            await self._look_up(entries, closed=True)
        except Exception as error:
            log.warning("a partition could not be made", error=error)
            self._fail(entries, error)
        else:
            for entry in entries:
                entry.had_partition = True
                self._wait(entry)

    # Flushes.

    async def _flush_all(self) -> None:
        """One flush after the other, as long as anybody waits; one that is slow goes on beside the next."""
        under_way: set[asyncio.Task[None]] = set()
        try:
            while self._waiting:
                await asyncio.sleep(0)  # who stands at the door comes along: a flush costs the same for some more
                if not (batch := self._next_batch()):
                    continue
                flush = self._start(self._flush(batch, self._until()))
                await asyncio.wait({flush}, timeout=SLOW_FLUSH_S)
                under_way = {each for each in (*under_way, flush) if not each.done()}
                if len(under_way) == FLUSHES_MAX:
                    _, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._flusher = None

    def _until(self) -> float:
        return asyncio.get_running_loop().time() + self._flush_timeout_s

    def _next_batch(self) -> list[Entry]:
        """The sales whose turn it is, each key once: what repeats a key that is on its way waits for its outcome."""
        batch: list[Entry] = []
        items, most = 0, self._batch_size()
        while self._waiting and len(batch) < most and items < BATCH_ITEMS_MAX:
            entry = self._waiting.take()
            first = self._on_their_way.setdefault(entry.sale.idempotency_key, entry)
            if first is not entry:
                first.repeats.append(entry)
            elif entry.abandoned:  # before it was sent anywhere
                self._drop(entry)
            else:
                batch.append(entry)
                items += len(entry.sale.items)
        return batch

    def _batch_size(self) -> int:
        """Of a flush: while others sell, too, what one sends by the hundred goes in small ones, for which they wait."""
        now = asyncio.get_running_loop().time()
        if self._waiting.callers > 1:
            self._company_until = now + COMPANY_S
        if now > self._company_until:
            return self._batch_max
        return min(max(self._waiting.callers, self._batch_max // 5), self._batch_max)

    def _drop(self, entry: Entry) -> None:
        """Forget a sale that was not sent; the next one with its key takes its place."""
        self._leave(entry)
        self._pass_on(entry.repeats)

    def _pass_on(self, repeats: list[Entry]) -> None:
        """The first of them gets its chance; the others wait for its outcome, besides those that do already."""
        if repeats:
            heir, *others = repeats
            heir.repeats += others
            self._wait(heir)

    async def _flush(self, batch: list[Entry], until: float) -> None:
        """Store a batch and answer its callers; whatever happens, each gets an answer, or waits apart for it."""
        for attempt in range(1, ATTEMPTS_MAX + 1):
            failure = await self._try(batch)
            batch = [entry for entry in batch if not entry.settled]
            if not batch:
                return None
            if asyncio.get_running_loop().time() > until:
                break
            match failure:
                case psycopg.errors.LockNotAvailable():
                    waiting, batch = len(batch), await self._aside.sort_out(batch)
                    if not batch:
                        return None
                    if len(batch) == waiting:  # who holds what, and from whom, cannot be told
                        return await self._flush_halves(batch, until)
                case psycopg.errors.CheckViolation() if not all(entry.had_partition for entry in batch):
                    # A month that we counted on is closed or dropped, by a retention that we have not heard of.
                    self._partitions.forget()
                    self._send_for_partitions(batch)
                    return None
                case psycopg.IntegrityError() | psycopg.DataError() | TransactionConflict():
                    # One row spoils the statement, such as a receipt number that two sales claim at this very moment:
                    # apart, the first gets it, and the others are told. Or what stood in the way is gone: a customer
                    # came with this very batch, say.
                    if len(batch) > 1 and attempt > 1:
                        return await self._flush_halves(batch, until)
                case psycopg.errors.QueryCanceled() if len(batch) > 1:
                    return await self._flush_halves(batch, until)  # whatever one of them takes so long for
                case psycopg.errors.QueryCanceled() | PoolTimeout():
                    break  # the time is used up
                case psycopg.OperationalError() | psycopg.InterfaceError() | psycopg.errors.ReadOnlySqlTransaction():
                    pass  # a conflict; or a connection lost in mid-commit, of which the next attempt finds out
                case _:
                    break  # a bug: the callers must hear of it, and we go on
        self._fail(batch, failure)

    async def _flush_halves(self, batch: list[Entry], until: float) -> None:
        middle = (len(batch) + 1) // 2
        for half in filter(None, (batch[:middle], batch[middle:])):
            await self._flush(half, until)

    async def _flush_alone(self, entry: Entry) -> bool:
        """Try a sale that waits aside; False when what it needs is still held."""
        try:
            await self._store([entry])
        except psycopg.errors.LockNotAvailable:
            return False
        except Exception as error:
            log.warning("a sale that had waited aside was not stored", error=error)
        if not entry.settled:
            self._wait(entry)
        return True

    async def _try(self, batch: list[Entry]) -> Exception:
        """Store a batch, and answer all that can be answered; returns why some could not."""
        try:
            with FLUSH_SECONDS.time():
                await self._store(batch)
            FLUSHES.inc()
        except Exception as error:
            if isinstance(error, psycopg.errors.LockNotAvailable):  # somebody is a little slow: no trouble yet
                log.info("flush failed", sales=len(batch), error=error)
            else:
                _failed(type(error).__name__, sales=len(batch), error=error)
            return error
        finally:
            FLUSHED.inc(sum(entry.settled for entry in batch))
        return TransactionConflict("other sales got in the way; try again")

    async def _store(self, batch: list[Entry]) -> None:
        async with self._connection() as connection:
            inserted = await insert(connection, [entry.purchase for entry in batch])  # commits
            await self._confirm(connection)
            for index, entry in enumerate(batch):
                if index not in inserted.refused:
                    self._settle(entry, Recorded(entry.purchase, replayed=False))
            if inserted.relay_waits:
                self._relay_bell.ring()
            if inserted.refused:
                refused = [batch[index] for index in inserted.refused]
                outcomes = await answers.explain(connection, [entry.purchase for entry in refused])
                await self._confirm(connection)
                for entry, outcome in zip(refused, outcomes, strict=True):
                    if outcome is not None:
                        self._settle(entry, outcome)

    async def _confirm(self, connection: Connection) -> None:
        """Nothing is acknowledged without a standby that is required: commits may have stopped waiting for one."""
        if self._standby_required:
            await require_standby(connection)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        """A connection that is given up when the server is frozen and does not even end its statements in time."""
        async with self._pool.connection() as connection:
            with patience(connection, self._flush_timeout_s):
                yield connection


def _asks_for(entry: Entry) -> tuple[object, ...]:
    return entry.sale.content(), entry.sale.register_customer


def _month(entry: Entry) -> datetime.date:
    return entry.sale.purchase_time.date().replace(day=1)


def _start(month: datetime.date | None) -> datetime.datetime:
    return datetime.datetime.combine(month or EARLIEST.date(), datetime.time(), datetime.UTC)


def _id(moment: datetime.datetime) -> str:
    """A UUIDv7 of that moment, which tells the partition; random ids would nearly halve the speed of inserting."""
    return str(uuid7(nanoseconds=nanoseconds(moment)))
