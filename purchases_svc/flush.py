"""Group commit.

While one flush is on its way to the database, the sales that arrive gather and go with the next; nobody waits for a
timer. A flush is one statement in one transaction for key, receipt, customer, purchase, items and event of all its
sales, and each caller gets its own answer after the commit.

What takes long holds up nobody else: a flush that is slow goes on beside the next one, sales that came many at once go
in flushes of their own, and a sale that needs a row which somebody holds waits for it apart.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

import psycopg
import structlog
from prometheus_client import Counter, Histogram
from psycopg_pool import PoolTimeout

from chassis import traces
from chassis.errors import TransactionConflict
from chassis.logs import Sampled
from purchases_svc import answers
from purchases_svc.admission import Admission
from purchases_svc.answers import Recorded
from purchases_svc.aside import Aside
from purchases_svc.branches import Branches
from purchases_svc.entry import Entry
from purchases_svc.insert import NO_TRACES, insert
from purchases_svc.tasks import Tasks
from purchases_svc.waiting import Waiting
from purchases_svc.writing import Writing

ATTEMPTS_MAX = 4  # of a flush that meets a conflict or a lost connection
SLOW_FLUSH_S = 0.1  # after which the next one goes beside
FLUSHES_MAX = {"live": 3, "bulk": 2}  # at once; as a rule there is one
# For flushes; to make partitions, to look up keys, to look after those aside, to ring the relay's bell.
CONNECTIONS = sum(FLUSHES_MAX.values()) + 3
# Whoever holds a row that a sale needs costs a flush so much, once; then that sale waits apart.
LOCK_TIMEOUT = {"lock_timeout": "100ms"}

FLUSHES = Counter("purchases_flushes_total", "Group commits.")
FLUSHED = Counter("purchases_flushed_sales_total", "Sales that went through a group commit.")
FLUSH_SECONDS = Histogram("purchases_flush_seconds", "Time of a group commit.")
FLUSH_SALES = Histogram("purchases_flush_sales", "Sales in a group commit.", buckets=(1, 3, 10, 30, 100, 300, 1_000))

log = structlog.get_logger()
_failed = Sampled("warning", "flush failed")


class Flushes:
    """Stores sales, and answers each after it is durable."""

    def __init__(
        self,
        writing: Writing,
        admission: Admission,
        tasks: Tasks,
        batch_max: int,
        without_month: Callable[[Sequence[Entry]], None],
        branches: Branches,
    ) -> None:
        """`writing` has CONNECTIONS connections, and its patience for all that may happen to a flush of `batch_max`
        sales. `without_month` takes those whose month turns out not to be there.
        """
        self._writing, self._tasks, self._without_month = writing, tasks, without_month
        self._branches = branches
        self.waiting = Waiting(admission, batch_max, self.add)
        pool, patience_s = writing.pool, writing.patience_s
        self._aside = Aside(pool, self.add, self._flush_alone, self.waiting.settle, self.waiting.drop, patience_s)
        self._flushing: set[str] = set()  # of FLUSHES_MAX

    def add(self, entry: Entry) -> None:
        """Have a sale go with the next flush, unless it needs what somebody holds."""
        if self._aside.takes(entry):
            return
        self.waiting.put(entry)
        kind = "live" if entry.came_alone else "bulk"
        if kind not in self._flushing:
            self._flushing.add(kind)
            self._tasks.start(self._flush_all(kind))

    async def close(self) -> None:
        """Give up those that wait aside."""
        await self._aside.close()

    async def _flush_all(self, kind: str) -> None:
        """One flush after the other, as long as anybody waits; one that is slow goes on beside the next."""
        live = kind == "live"
        under_way: set[asyncio.Task[None]] = set()
        try:
            while self.waiting.any(live=live):
                await asyncio.sleep(0)  # who stands at the door comes along: a flush costs the same for some more
                if not (batch := self.waiting.next_batch(live=live)):
                    continue
                began = asyncio.get_running_loop().time()
                flush = self._tasks.start(self._flush(batch, self._until()))
                await asyncio.wait({flush}, timeout=SLOW_FLUSH_S)
                if not live and self.waiting.live_expected:  # half of the time is theirs, as are the processors
                    await asyncio.sleep(asyncio.get_running_loop().time() - began)
                under_way = {each for each in (*under_way, flush) if not each.done()}
                if len(under_way) == FLUSHES_MAX[kind]:
                    _, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._flushing.discard(kind)

    def _until(self) -> float:
        return asyncio.get_running_loop().time() + self._writing.patience_s

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
                    self._without_month(batch)
                    return None
                case psycopg.IntegrityError() | psycopg.DataError() | TransactionConflict():
                    # One row spoils the statement, such as a receipt number that two sales claim at this very moment:
                    # apart, the first gets it, and the others are told. Or what stood in the way is gone: a customer
                    # came with this very batch, say.
                    if len(batch) > 1 and attempt > 1:
                        return await self._flush_halves(batch, until)
                case psycopg.errors.QueryCanceled() if len(batch) > 1:
                    return await self._flush_halves(batch, until)  # whatever one of them takes so long for
                case PoolTimeout():
                    break  # the time is used up
                case psycopg.OperationalError() | psycopg.InterfaceError() | psycopg.errors.ReadOnlySqlTransaction():
                    pass  # a conflict; or a connection lost in mid-commit, of which the next attempt finds out; or slow
                case _:
                    break  # a bug: the callers must hear of it, and we go on
        self.waiting.fail(batch, failure)

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
            self.add(entry)
        return True

    async def _try(self, batch: list[Entry]) -> Exception:
        """Store a batch, and answer all that can be answered; returns why some could not."""
        began = time.perf_counter()
        spans = traces.together("INSERT purchases", "CLIENT", (entry.span for entry in batch), _said_of(batch))
        try:
            with spans:
                await self._store(batch, spans.traceparents)
            FLUSHES.inc()
            FLUSH_SALES.observe(len(batch))
        except Exception as error:
            if isinstance(error, psycopg.errors.LockNotAvailable):  # somebody is a little slow: no trouble yet
                log.info("flush failed", sales=len(batch), error=error)
            else:
                _failed(type(error).__name__, sales=len(batch), error=error)
            return error
        finally:
            FLUSH_SECONDS.observe(time.perf_counter() - began, spans.exemplar)
            FLUSHED.inc(sum(entry.settled for entry in batch))
        return TransactionConflict("other sales got in the way; try again")

    async def _store(self, batch: list[Entry], traceparents: Mapping[int, str] = NO_TRACES) -> None:
        async with self._writing.connection(at_a_till=batch[0].came_alone) as connection:
            refused_at = await insert(connection, [entry.purchase for entry in batch], traceparents)  # commits
            await self._writing.confirm(connection)
            for index, entry in enumerate(batch):
                if index not in refused_at:
                    self.waiting.settle(entry, Recorded(entry.purchase, replayed=False))
            if refused_at:
                refused = [batch[index] for index in refused_at]
                outcomes = await answers.explain(connection, [entry.purchase for entry in refused], self._branches)
                await self._writing.confirm(connection)
                for entry, outcome in zip(refused, outcomes, strict=True):
                    if outcome is not None:
                        self.waiting.settle(entry, outcome)


def _said_of(batch: Sequence[Entry]) -> traces.Attributes:
    """Of the statement, in traces."""
    return {
        "db.system.name": "postgresql",
        "db.operation.name": "INSERT",
        "db.collection.name": "purchases",
        "db.operation.batch.size": len(batch),
    }
