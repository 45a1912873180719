"""Recording sales: group commit.

While one flush is on its way to the database, the sales that arrive gather and go with the next; nobody waits for a
timer. A flush is one statement in one transaction for key, receipt, customer, purchase, items and event of all its
sales, and each caller gets its own answer after the commit.
"""

import asyncio
import datetime
from collections import deque
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as json_text  # the C implementation
from typing import NamedTuple

import psycopg
import structlog
from prometheus_client import Counter, Histogram
from psycopg_pool import PoolTimeout
from uuid_utils import uuid7

from chassis.errors import Overloaded, ServiceError, TransactionConflict
from chassis.postgres import UNAVAILABLE, Connection, Pool
from chassis.wire import cents_text
from purchases_svc import stored
from purchases_svc.backlog import Backlog
from purchases_svc.errors import (
    CustomerUnknown,
    IdempotencyKeyReused,
    OutboxFull,
    PurchaseTimeOutOfRange,
    ReceiptExists,
)
from purchases_svc.partitions import Partitions
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
        retention_months: int = 0,
    ) -> None:
        """`batch_max` sales go in one flush, `waiting_max` may wait for theirs."""
        self._pool, self._partitions, self._backlog = pool, partitions, backlog
        self._time_zone, self._retention_months = time_zone, retention_months
        self._batch_max, self._waiting_max = batch_max, waiting_max
        self._waiting: deque[_Entry] = deque()
        self._flusher: asyncio.Task[None] | None = None

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
        if len(self._waiting) + len(sales) > self._waiting_max:
            raise Overloaded(f"{len(self._waiting)} sales wait to be stored; try again a little later")
        call = _Call(len(sales))
        now = datetime.datetime.now(datetime.UTC)
        earliest, latest = self._earliest(now), now + FUTURE_MAX
        out_of_range = []
        for place, sale in enumerate(sales):
            if earliest <= sale.purchase_time <= latest:
                self._waiting.append(_Entry(Purchase(_id(sale.purchase_time), _id(now), now, sale), call, place))
            else:
                out_of_range.append(place)
        if self._waiting and self._flusher is None:
            self._flusher = asyncio.create_task(self._flush_all())
        for place in out_of_range:
            call.settle(place, await self._known_or_out_of_range(sales[place], now))
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

    async def _known_or_out_of_range(self, sale: Sale, now: datetime.datetime) -> Recorded | Exception:
        """A known key is answered before the time is checked: the clock may have been set back since."""
        try:
            async with self._pool.connection() as connection:
                holders = await stored.by_keys(connection, [sale.idempotency_key])
        except UNAVAILABLE as error:
            return error
        if holder := holders.get(sale.idempotency_key):
            return _replay(sale, holder)
        return self._out_of_range(sale, now)

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
            self._waiting.append(entry)

    async def _flush(self, batch: list[_Entry]) -> None:
        """Store a batch and answer its callers; whatever happens, each gets an answer."""
        for attempt in range(1, ATTEMPTS_MAX + 1):
            batch = [entry for entry in batch if not entry.settled]
            try:
                with FLUSH_SECONDS.time():
                    await self._store(batch)
                FLUSHES.inc()
                FLUSHED.inc(len(batch))
                return
            except (psycopg.IntegrityError, psycopg.DataError) as error:
                failure: Exception = error
                if len(batch) == 1 and isinstance(error, psycopg.errors.DatetimeFieldOverflow):
                    failure = self._out_of_range(batch[0].purchase.sale, batch[0].purchase.created_at)
                    break  # its month was dropped, by a retention that this process does not know of
                # Either retention dropped a partition that we knew ("no partition found" is a check violation) ...
                self._partitions.forget()
                # ... or one row spoils the statement, such as a receipt number that two sales claim at this very
                # moment. Apart, the first gets it, and the others are told.
                if len(batch) > 1 and attempt > 1:
                    await self._flush(batch[: len(batch) // 2])
                    await self._flush(batch[len(batch) // 2 :])
                    return
            except (psycopg.errors.QueryCanceled, PoolTimeout) as error:
                failure = error  # the time is used up
                break
            except (psycopg.OperationalError, psycopg.InterfaceError) as error:
                # A conflict, or a connection lost in mid-commit, which leaves the outcome open: with its key, trying
                # again settles it.
                failure = error
            except Exception as error:  # a bug: the callers must hear of it, and we go on
                failure = error
                break
            log.warning("flush failed", attempt=attempt, sales=len(batch), error=str(failure).strip())
        for entry in batch:
            entry.settle(failure)

    async def _store(self, batch: list[_Entry]) -> None:
        months = {entry.purchase.sale.purchase_time.date().replace(day=1) for entry in batch}
        days = {entry.purchase.created_at.date() for entry in batch}
        await self._partitions.ensure(months, days)
        async with self._pool.connection() as connection:
            refused = await _insert(connection, [entry.purchase for entry in batch], self._time_zone)  # commits
            for index, entry in enumerate(batch):
                if index not in refused:
                    entry.settle(Recorded(entry.purchase, replayed=False))
            if refused:
                await self._explain(connection, [batch[index] for index in refused])

    async def _explain(self, connection: Connection, entries: Sequence[_Entry]) -> None:
        """Answer sales that were not stored: replays first, since a stored sale also holds its receipt number."""
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
            else:
                entry.settle(TransactionConflict("another sale got in the way and is gone; try again"))


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


# One statement is one transaction. Everything hangs on `new_receipt` and `new_key`: what gets in has both, what does
# not leaves nothing behind. Of sales whose key and customer allow it, those with a free receipt number get in.
# (The same sale on its way twice has the same receipt number, so the second waits for the first and is not accepted.
# Should another sale take its key at this very moment, the statement fails as a whole; `_flush` sorts it out.)
# Receipts, keys and customers are inserted in sorted order, and the tables in an order that PostgreSQL chooses but that
# is the same in every flush: two that share some wait for each other, but never in a circle.
# LIMIT 1 makes each look-up a probe of the index, whatever the statistics say; nothing looks into all partitions.
_INSERT = """
WITH input AS MATERIALIZED (
    SELECT r.n, r.register_customer, r.event, e.event_id, e.occurred_at, p.*,
           (p.purchase_time AT TIME ZONE %(time_zone)s)::date AS business_day
    FROM jsonb_to_recordset(%(rows)s::jsonb) AS r(n int, register_customer boolean, event jsonb)
    CROSS JOIN LATERAL jsonb_to_record(r.event) AS e(event_id uuid, occurred_at timestamptz, purchase jsonb)
    CROSS JOIN LATERAL jsonb_to_record(e.purchase) AS p(
        purchase_id uuid, receipt_id text, idempotency_key uuid, branch_id int, cashier_id int, pos_id text,
        customer_id uuid, purchase_time timestamptz, total_amount numeric, items jsonb)
), new_receipt AS (
    INSERT INTO receipts (branch_id, pos_id, business_day, receipt_id, purchase_id, purchase_time)
    SELECT branch_id, pos_id, business_day, receipt_id, purchase_id, purchase_time
    FROM input
    LEFT JOIN LATERAL (
        SELECT true AS known FROM idempotency_keys k WHERE k.idempotency_key = input.idempotency_key LIMIT 1
    ) AS key ON true
    LEFT JOIN LATERAL (
        SELECT true AS known FROM customers c WHERE c.customer_id = input.customer_id LIMIT 1
    ) AS customer ON input.customer_id IS NOT NULL AND NOT register_customer
    WHERE key.known IS NULL AND (input.customer_id IS NULL OR register_customer OR customer.known)
    ORDER BY branch_id, pos_id, business_day, receipt_id
    ON CONFLICT DO NOTHING
    RETURNING purchase_id
), accepted AS MATERIALIZED (
    SELECT input.* FROM input JOIN new_receipt USING (purchase_id)
), new_key AS (
    INSERT INTO idempotency_keys (idempotency_key, purchase_id, purchase_time, event_id)
    SELECT idempotency_key, purchase_id, purchase_time, event_id FROM accepted ORDER BY idempotency_key
), new_customer AS (
    INSERT INTO customers (customer_id)
    SELECT DISTINCT customer_id FROM accepted WHERE register_customer AND customer_id IS NOT NULL ORDER BY customer_id
    ON CONFLICT DO NOTHING
), new_purchase AS (
    INSERT INTO purchases (purchase_id, receipt_id, idempotency_key, branch_id, cashier_id, pos_id, customer_id,
                           purchase_time, total_amount, item_count, event_id, created_at)
    SELECT purchase_id, receipt_id, idempotency_key, branch_id, cashier_id, pos_id, customer_id,
           purchase_time, total_amount, jsonb_array_length(items), event_id, occurred_at
    FROM accepted
), new_item AS (
    INSERT INTO purchase_items (purchase_id, purchase_time, product_id, qty, unit_price, line_total)
    SELECT purchase_id, purchase_time, item.product_id, item.qty, item.unit_price, item.unit_price * item.qty
    FROM accepted
    CROSS JOIN LATERAL jsonb_to_recordset(items) AS item(product_id int, qty int, unit_price numeric)
), new_event AS (
    INSERT INTO outbox_events (event_id, event_type, aggregate_id, occurred_at, payload_json)
    SELECT event_id, 'PurchaseCreated', purchase_id, occurred_at, event FROM accepted
)
SELECT n FROM input WHERE purchase_id NOT IN (SELECT purchase_id FROM accepted)
"""


async def _insert(connection: Connection, purchases: Sequence[Purchase], time_zone: str) -> set[int]:
    """Store purchases; returns the positions of those that were not, because something in the database forbids it."""
    rows = f"[{','.join(_row(n, purchase) for n, purchase in enumerate(purchases))}]"
    cursor = await connection.execute(_INSERT, {"rows": rows, "time_zone": time_zone}, prepare=True)
    return {n for (n,) in await cursor.fetchall()}


def _row(n: int, purchase: Purchase) -> str:
    """The event, which is all there is to know of a purchase; what else the statement needs beside it."""
    register = "true" if purchase.sale.register_customer else "false"
    return f'{{"n":{n},"register_customer":{register},"event":{event_json(purchase)}}}'


def event_json(purchase: Purchase) -> str:
    """The PurchaseCreated event, version 1: `proto/events/purchase_created.v1.schema.json`.

    Written by hand: amounts stay the exact decimals that they are, which no float and no `json.dumps` would keep.
    """
    sale = purchase.sale
    items = ",".join(
        f'{{"product_id":{product_id},"qty":1,"unit_price":{cents_text(cents)}}}' for product_id, cents in sale.items
    )
    customer = f'"customer_id":"{sale.customer_id}",' if sale.customer_id else ""
    return (
        f'{{"event_id":"{purchase.event_id}","event_type":"PurchaseCreated"'
        f',"occurred_at":"{rfc3339(purchase.created_at)}","purchase":{{"purchase_id":"{purchase.purchase_id}"'
        f',"receipt_id":{json_text(sale.receipt_id)},"idempotency_key":"{sale.idempotency_key}"'
        f',"branch_id":{sale.branch_id},"cashier_id":{sale.cashier_id},"pos_id":{json_text(sale.pos_id)},{customer}'
        f'"purchase_time":"{rfc3339(sale.purchase_time)}","total_amount":{cents_text(sale.total_cents)}'
        f',"items":[{items}]}}}}'
    )
