"""Making what is wrong right, in short transactions, each alone with the apply lock, while sales go on.

Every transaction leaves the read models no worse than it found them, so a repair may die at any point: the next one
finds what is left to do.
"""

import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import date
from decimal import Decimal
from typing import NamedTuple, TypeVar

from analytics_svc.ingest import event_log, summing
from analytics_svc.ingest.announce import EVERYTHING, announce
from analytics_svc.proof import parts, read_models
from analytics_svc.proof.day import Difference, Proof, Visits
from analytics_svc.proof.parts import Part
from analytics_svc.proof.read_models import BRANCHES, CUSTOMERS, DAILY_SALES_BY_BRANCH, PRODUCT_SALES_DAILY, PRODUCTS
from analytics_svc.proof.verdicts import Comparison
from analytics_svc.purchase import PurchaseCreated
from chassis.postgres import Connection, Pool, end_within

# Written by one transaction, in less than a second.
ROWS_AT_ONCE = 5_000  # differences
IDS_AT_ONCE = 5_000
WRITING_S = 0.5  # of one transaction, that makes products, customers or branches anew from their history

Repaired = Counter[str]  # wrong rows by read model
T = TypeVar("T")


@asynccontextmanager
async def writing(pool: Pool) -> AsyncIterator[Connection]:
    """A transaction that nothing is counted beside, and in which everything that was noted is summed up."""
    async with pool.connection() as connection, connection.transaction():
        await end_within(connection, event_log.HOLD_MAX_S)
        await event_log.exclude_applies(connection)
        await summing.sum_up(connection)
        yield connection
        await announce(connection, EVERYTHING, counted=False)


async def prove_range(pool: Pool, part: Part) -> Comparison:
    """Look at all models whose rows in this range follow from others."""
    findings, count = [], 0
    for model in read_models.of_kind(part.kind):
        async with pool.connection() as connection:
            wrong = await read_models.find_wrong(connection, model, part.first, part.last)
        findings += wrong.findings
        count += wrong.rows
    return Comparison([], findings, [], more_findings=count - len(findings))


async def mend_range(pool: Pool, part: Part) -> Repaired:
    """Make the rows of this range what the others say; what is right is only looked at."""
    repaired = Repaired()
    for model in read_models.of_kind(part.kind):
        async with pool.connection() as connection:
            wrong = await read_models.find_wrong(connection, model, part.first, part.last)
        keys = deque(map(str, wrong.keys))
        while keys:
            async with writing(pool) as connection:
                until = time.monotonic() + WRITING_S
                while keys and time.monotonic() < until:
                    key = keys.popleft()
                    repaired[model.name] += await read_models.replace(connection, model, key, key)
    return repaired


class Touched(NamedTuple):
    """Whose rows follow from what was changed."""

    customers: set[str]
    products: set[int]
    branches: set[int]


async def mend_day(pool: Pool, proof: Proof, touched: Touched) -> Repaired:
    """Write what the proof found to be different. What follows from it, as is noted in `touched`, is for `mend_touched`
    or `mend_range`.

    The sums of months and of all time are not changed by the same difference: whether they have it, too, is another
    question, which they are asked themselves.
    """
    repaired = Repaired()
    for portion in _portions(proof.difference):
        async with writing(pool) as connection:
            repaired += await _add(connection, proof.day, portion)
    touched.branches.update(proof.difference.sums)
    touched.products.update(product for _, product in proof.difference.products)
    for ids in _some(proof.foreign, IDS_AT_ONCE):
        async with writing(pool) as connection:
            touched.customers.update(await _take_out(connection, proof.day, ids))
    if proof.mistold or proof.visits is not None:
        async with writing(pool) as connection:
            touched.customers.update(await _correct(connection, proof.day, proof.mistold))
            if proof.visits is not None:
                touched.customers.update(await _write_visits(connection, proof.day, proof.visits))
    repaired["analytics_event_log"] += len(proof.foreign) + len(proof.mistold)
    repaired += await mend_range(pool, parts.of_day(proof.day))
    return +repaired


async def mend_touched(pool: Pool, touched: Touched) -> Repaired:
    """Each of these customers, products and branches by itself, and the chain."""
    repaired = Repaired()
    for kind, keys in (
        (CUSTOMERS, touched.customers),
        (PRODUCTS, touched.products),
        (BRANCHES, touched.branches | {0}),
    ):
        for key in sorted(map(str, keys)):
            repaired += await mend_range(pool, Part(kind, key, key))
    return repaired


def _some(values: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    return (values[start : start + most] for start in range(0, len(values), most))


def _portions(found: Difference) -> Iterator[Difference]:
    """Some branches at a time: their sums and their products change together."""
    products: dict[int, dict[tuple[int, int], tuple[int, int]]] = {branch: {} for branch in found.sums}
    for key, sold in found.products.items():
        products.setdefault(key[0], {})[key] = sold
    portion = Difference({}, {})
    for branch in sorted(products):
        if branch in found.sums:
            portion.sums[branch] = found.sums[branch]
        portion.products.update(products[branch])
        if len(portion.sums) + len(portion.products) >= ROWS_AT_ONCE:
            yield portion
            portion = Difference({}, {})
    if portion != ({}, {}):
        yield portion


async def _add(connection: Connection, day: date, found: Difference) -> Repaired:
    sums = [
        (day, branch, _amount(by.cents), by.items, by.purchases, by.with_customer) for branch, by in found.sums.items()
    ]
    sold = [
        (day, branch, product, units, _amount(cents)) for (branch, product), (units, cents) in found.products.items()
    ]
    repaired = Repaired()
    for model, rows in ((DAILY_SALES_BY_BRANCH, sums), (PRODUCT_SALES_DAILY, sold)):
        repaired[model.name] += await read_models.add(connection, model, rows)
    return repaired


def _amount(cents: int) -> Decimal:
    return Decimal(cents).scaleb(-2)


async def _take_out(connection: Connection, day: date, ids: Sequence[str]) -> set[str]:
    """Let these events count no more; returns their customers. Their ids stay: delivered again, they must not count."""
    cursor = await connection.execute(
        "UPDATE analytics_event_log SET day = NULL WHERE day = %s AND event_id = ANY (%s::uuid[])"
        " RETURNING customer_id::text",
        [day, list(ids)],
    )
    return {customer for (customer,) in await cursor.fetchall() if customer}


async def _correct(connection: Connection, day: date, events: Sequence[PurchaseCreated]) -> set[str]:
    """Let the log know of these events what was recorded; returns the customers that it had and has."""
    cursor = await connection.execute(
        "SELECT DISTINCT customer_id::text FROM analytics_event_log WHERE event_id = ANY (%s::uuid[])",
        [[event.event_id for event in events]],
    )
    had = {customer for (customer,) in await cursor.fetchall() if customer}
    await connection.execute(
        """
        UPDATE analytics_event_log AS log SET day = event.day, branch_id = event.branch_id,
            customer_id = event.customer_id, purchase_time = event.purchase_time, purchase_id = event.purchase_id,
            checksum = event.checksum
        FROM jsonb_populate_recordset(NULL::analytics_event_log, %s::jsonb) AS event
        WHERE log.event_id = event.event_id
        """,
        [
            read_models.records(
                ("event_id", "day", "branch_id", "customer_id", "purchase_time", "purchase_id", "checksum"),
                (
                    (e.event_id, day, e.branch_id, e.customer_id, e.purchase_time, e.purchase_id, e.checksum())
                    for e in events
                ),
            )
        ],
    )
    return had | {event.customer_id for event in events if event.customer_id}


async def _write_visits(connection: Connection, day: date, visits: Visits) -> set[str]:
    """What the log has forgotten of this day; returns the customers concerned. Nothing may be forgotten meanwhile."""
    cursor = await connection.execute("DELETE FROM forgotten_visits WHERE day = %s RETURNING customer_id::text", [day])
    had = {customer for (customer,) in await cursor.fetchall()}
    columns = ("day", "customer_id", "branch_id", "purchases_count", "last_purchase_at")
    rows = ((day, *visit, *times) for visit, times in visits.items())
    await connection.execute(
        "INSERT INTO forgotten_visits SELECT * FROM jsonb_populate_recordset(NULL::forgotten_visits, %s::jsonb)",
        [read_models.records(columns, rows)],
    )
    return had | {customer for customer, _ in visits}
