"""Recording sales: group commit.

While one flush is on its way to the database, the sales that arrive gather and go with the next; nobody waits for a
timer. A flush is one statement in one transaction for key, receipt, customer, purchase, items and event of all its
sales, and each caller gets its own answer after the commit.
"""

import asyncio
import datetime
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import psycopg
import structlog
from prometheus_client import Counter, Histogram
from psycopg_pool import PoolTimeout
from uuid_utils import uuid7

from chassis.errors import Overloaded, ServiceError, TransactionConflict
from chassis.postgres import Connection, Pool
from purchases_svc import stored
from purchases_svc.backlog import Backlog
from purchases_svc.errors import (
    CustomerUnknown,
    IdempotencyKeyReused,
    OutboxFull,
    PurchaseTimeOutOfRange,
    ReceiptExists,
)
from purchases_svc.insert import insert
from purchases_svc.partitions import Partitions
from purchases_svc.relay_bell import RelayBell
from purchases_svc.retention import horizon
from purchases_svc.sale import EARLIEST, FUTURE_MAX, Purchase, Sale, nanoseconds, rfc3339

BATCH_ITEMS_MAX = 4_000  # of a flush: everybody waits for it, so the biggest sales must not make it take seconds
ATTEMPTS_MAX = 4  # of a flush that meets a conflict or a lost connection

FLUSHES = Counter("purchases_flushes_total", "Group commits.")
FLUSHED = Counter("purchases_flushed_sales_total", "Sales that went through a group commit.")
FLUSH_SECONDS = Histogram("purchases_flush_seconds", "Time of a group commit.")

log = structlog.get_logger()


class Recorded(NamedTuple):
    """The purchase that holds the sale, and whether it had been there before this call."""

    purchase: Purchase
    replayed: bool


class _Call:
    """A caller who waits for what becomes of its sales. One future for all of them, however many there are."""

    def __init__(self, sales: int) -> None:
        self.outcomes: list[Recorded | Exception | None] = [None] * sales
        self._open = sales
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def settle(self, place: int, outcome: Recorded | Exception) -> None:
        self.outcomes[place] = outcome
        self._open -= 1
        if not self._open and not self.answered.done():  # the caller may have given up
            self.answered.set_result(None)


class _Entry(NamedTuple):
    """A sale on its way, as the purchase it will be, and its place among the sales of its caller."""

    purchase: Purchase
    call: _Call
    place: int

    @property
    def settled(self) -> bool:
        return self.call.outcomes[self.place] is not None

    def settle(self, outcome: Recorded | Exception) -> None:
        self.call.settle(self.place, outcome)


class Recorder:
    """Takes in sales and answers each after it is durable."""

    def __init__(
        self,
        pool: Pool,
        partitions: Partitions,
        backlog: Backlog,
        *,
        time_zone: str,
        batch_max: int,
        waiting_max: int,
        waiting_items_max: int,
        retention_months: int = 0,
    ) -> None:
        """`batch_max` sales go in one flush; `waiting_max` may wait, with `waiting_items_max` items in all."""
        self._pool, self._partitions, self._backlog = pool, partitions, backlog
        self._time_zone, self._retention_months = time_zone, retention_months
        self._batch_max, self._waiting_max, self._waiting_items_max = batch_max, waiting_max, waiting_items_max
        self._waiting: deque[_Entry] = deque()
        self._waiting_items = 0
        self._flusher: asyncio.Task[None] | None = None
        self._looking_up = asyncio.Lock()
        self._relay_bell = RelayBell(pool)

    async def record(self, sale: Sale) -> Recorded:
        """Store one sale, or find it stored; see `record_all`. Raises what `record_all` returns."""
        (outcome,) = await self.record_all([sale])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def record_all(self, sales: Sequence[Sale]) -> list[Recorded | Exception]:
        """Store sales, or find them stored: for each what holds it, or why it was refused.

        IdempotencyKeyReused, ReceiptExists, CustomerUnknown and PurchaseTimeOutOfRange mean that nothing is stored.
        With any other error it is not known: send the sale again with its key. So it is for a caller that gives up:
        what it sent is left out if it was still waiting, and goes its way if it was not.

        Raises:
            Overloaded, OutboxFull: too many sales, or too many events, wait already; none of these was taken in.
        """
        if self._backlog.full:
            raise OutboxFull("too many events wait for the broker; try again later")
        items = sum(len(sale.items) for sale in sales)
        if len(self._waiting) + len(sales) > self._waiting_max or self._waiting_items + items > self._waiting_items_max:
            raise Overloaded(f"{len(self._waiting)} sales wait to be stored; try again a little later")
        call = _Call(len(sales))
        now = datetime.datetime.now(datetime.UTC)
        earliest, latest = self._earliest(now), now + FUTURE_MAX
        out_of_range = []
        for place, sale in enumerate(sales):
            if earliest <= sale.purchase_time <= latest:
                self._wait(_Entry(Purchase(_id(sale.purchase_time), _id(now), now, sale), call, place))
            else:
                out_of_range.append(place)
        if self._waiting and self._flusher is None:
            self._flusher = asyncio.create_task(self._flush_all())
        if out_of_range:
            outcomes = await self._known_or_out_of_range([sales[place] for place in out_of_range], now)
            for place, outcome in zip(out_of_range, outcomes, strict=True):
                call.settle(place, outcome)
        await call.answered
        return [outcome for outcome in call.outcomes if outcome is not None]

    async def close(self) -> None:
        """Wait until everything taken in is answered."""
        if self._flusher is not None:
            await self._flusher

    def _earliest(self, now: datetime.datetime) -> datetime.datetime:
        """Months that retention may drop, and their keys with them, take in no sales: one could come in twice."""
        kept = horizon(self._retention_months, now.date())
        return max(EARLIEST, datetime.datetime.combine(kept, datetime.time(), datetime.UTC)) if kept else EARLIEST

    async def _known_or_out_of_range(
        self, sales: Sequence[Sale], now: datetime.datetime
    ) -> Sequence[Recorded | Exception]:
        """A known key is answered before the time is checked: the clock may have been set back since.

        One look-up at a time: tills whose clocks are wrong must not take the connection of everybody's flush.
        """
        try:
            async with self._looking_up, self._pool.connection() as connection:
                holders = await stored.by_keys(connection, [sale.idempotency_key for sale in sales])
        except (psycopg.Error, PoolTimeout) as error:
            return [error] * len(sales)
        return [
            _replay(sale, holders[sale.idempotency_key])
            if sale.idempotency_key in holders
            else self._out_of_range(sale, now)
            for sale in sales
        ]

    def _out_of_range(self, sale: Sale, now: datetime.datetime) -> ServiceError:
        return PurchaseTimeOutOfRange(
            f"purchase.purchase_time {rfc3339(sale.purchase_time)} must not be before {rfc3339(self._earliest(now))}"
            f" or more than {FUTURE_MAX.seconds // 60} minutes after the server's time, {rfc3339(now)}",
            metadata={"purchase_time": rfc3339(sale.purchase_time), "server_time": rfc3339(now)},
        )

    async def _flush_all(self) -> None:
        try:
            while self._waiting:
                batch, repeats = self._next_batch()
                if batch:
                    await self._flush(list(batch.values()))
                for entry in repeats:
                    self._settle_repeat(entry, batch[entry.purchase.sale.idempotency_key])
        finally:
            self._flusher = None

    def _next_batch(self) -> tuple[dict[str, _Entry], list[_Entry]]:
        """The oldest sales by key, and those that repeat a key of them."""
        batch: dict[str, _Entry] = {}
        repeats: list[_Entry] = []
        items = 0
        while self._waiting and len(batch) < self._batch_max and items < BATCH_ITEMS_MAX:
            entry = self._waiting.popleft()
            self._waiting_items -= len(entry.purchase.sale.items)
            if entry.purchase.sale.idempotency_key in batch:
                repeats.append(entry)
            elif not entry.call.answered.cancelled():  # else the caller left before it was sent anywhere
                batch[entry.purchase.sale.idempotency_key] = entry
                items += len(entry.purchase.sale.items)
        return batch, repeats

    def _settle_repeat(self, entry: _Entry, first: _Entry) -> None:
        """Answer a sale by what became of the first with its key; if that was refused, it gets its own chance."""
        outcome = first.call.outcomes[first.place]
        if isinstance(outcome, Recorded):
            entry.settle(_replay(entry.purchase.sale, outcome.purchase))
        else:
            self._wait(entry)

    def _wait(self, entry: _Entry) -> None:
        self._waiting.append(entry)
        self._waiting_items += len(entry.purchase.sale.items)

    async def _flush(self, batch: list[_Entry]) -> None:
        """Store a batch and answer its callers; whatever happens, each gets an answer."""
        for attempt in range(1, ATTEMPTS_MAX + 1):
            failure: Exception = TransactionConflict("other sales got in the way; try again")
            try:
                with FLUSH_SECONDS.time():
                    await self._store(batch)
                FLUSHES.inc()
            except Exception as error:
                failure = error
                log.warning("flush failed", attempt=attempt, sales=len(batch), error=str(error).strip())
            tried, batch = len(batch), [entry for entry in batch if not entry.settled]
            FLUSHED.inc(tried - len(batch))
            if not batch:
                return
            match failure:
                case psycopg.errors.DatetimeFieldOverflow() if len(batch) == 1:
                    # Its month is closed, by a retention that this process does not know of.
                    entry = batch[0]
                    (outcome,) = await self._known_or_out_of_range([entry.purchase.sale], entry.purchase.created_at)
                    entry.settle(outcome)
                    return
                case psycopg.IntegrityError() | psycopg.DataError() | TransactionConflict():
                    # One row spoils the statement, such as a receipt number that two sales claim at this very moment:
                    # apart, the first gets it, and the others are told. Or what stood in the way is gone: a customer
                    # came with this very batch, say. Or retention closed a month that we counted on.
                    self._partitions.forget()
                    if len(batch) > 1 and attempt > 1:
                        await self._flush(batch[: len(batch) // 2])
                        await self._flush(batch[len(batch) // 2 :])
                        return
                case psycopg.errors.QueryCanceled() | PoolTimeout():
                    break  # the time is used up
                case psycopg.OperationalError() | psycopg.InterfaceError():
                    continue  # a conflict; or a connection lost in mid-commit, of which the next attempt finds out
                case _:
                    break  # a bug: the callers must hear of it, and we go on
        for entry in batch:
            entry.settle(failure)

    async def _store(self, batch: list[_Entry]) -> None:
        months = {entry.purchase.sale.purchase_time.date().replace(day=1) for entry in batch}
        days = {entry.purchase.created_at.date() for entry in batch}
        await self._partitions.ensure(months, days)
        async with self._pool.connection() as connection:
            inserted = await insert(connection, [entry.purchase for entry in batch], self._time_zone)  # commits
            for index, entry in enumerate(batch):
                if index not in inserted.refused:
                    entry.settle(Recorded(entry.purchase, replayed=False))
            if inserted.relay_waits:
                self._relay_bell.ring()
            if inserted.refused:
                await self._explain(connection, [batch[index] for index in inserted.refused])

    async def _explain(self, connection: Connection, entries: Sequence[_Entry]) -> None:
        """Answer sales that were not stored: replays first, since a stored sale also holds its receipt number.

        One that nothing speaks against any more is left unanswered.
        """
        holders = await stored.by_keys(connection, [entry.purchase.sale.idempotency_key for entry in entries])
        new = [entry for entry in entries if entry.purchase.sale.idempotency_key not in holders]
        unknown = await stored.unknown_customers(connection, [entry.purchase.sale for entry in new])
        receipts = await stored.receipt_holders(connection, [entry.purchase.sale for entry in new], self._time_zone)
        for entry in entries:
            sale = entry.purchase.sale
            holder = holders.get(sale.idempotency_key)
            if holder and holder.purchase_id == entry.purchase.purchase_id:
                entry.settle(Recorded(holder, replayed=False))  # our own: the answer to its commit was lost
            elif holder:
                entry.settle(_replay(sale, holder))
            elif sale.customer_id in unknown and not sale.register_customer:
                entry.settle(_customer_unknown(sale.customer_id))
            elif receipt_holder := receipts.get(sale.idempotency_key):
                entry.settle(_receipt_exists(sale, receipt_holder))


def _id(moment: datetime.datetime) -> str:
    """A UUIDv7 of that moment, which tells the partition; random ids would nearly halve the speed of inserting."""
    return str(uuid7(nanoseconds=nanoseconds(moment)))


def _replay(sale: Sale, holder: Purchase) -> Recorded | Exception:
    if holder.sale.content() == sale.content():
        return Recorded(holder, replayed=True)
    return IdempotencyKeyReused(
        f"idempotency_key {sale.idempotency_key} belongs to purchase {holder.purchase_id}, whose content differs",
        metadata={"idempotency_key": sale.idempotency_key, "purchase_id": holder.purchase_id},
    )


def _customer_unknown(customer_id: str) -> ServiceError:
    return CustomerUnknown(f"customer {customer_id} is not registered", metadata={"customer_id": customer_id})


def _receipt_exists(sale: Sale, holder_id: str) -> ServiceError:
    return ReceiptExists(
        f"receipt {sale.receipt_id} of {sale.pos_id} in branch {sale.branch_id} on that business day belongs to"
        f" purchase {holder_id}",
        metadata={"receipt_id": sale.receipt_id, "purchase_id": holder_id},
    )
