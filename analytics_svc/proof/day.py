"""The proof of one day, row by row, while sales go on.

The day's rows and what the log knows of it are read in one snapshot; then the day is exported. Whatever counts in that
snapshot was recorded before, so the rows must say exactly what the exported purchases say that count in it: those whose
ids are in the log, and those below its floor, which the log may have forgotten. What the rows lack or have too much is
a difference that stays the same while sales go on, as they add to both sides: a repair adds it whenever it likes.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from datetime import date, datetime
from decimal import Decimal
from itertools import islice
from typing import NamedTuple

from analytics_svc.errors import HistoryDropped
from analytics_svc.proof import read_models
from analytics_svc.proof.keeper import unsettled
from analytics_svc.proof.settled import wait_until_complete
from analytics_svc.proof.verdicts import Comparison, Finding, Row, Verdict, at_most, difference
from analytics_svc.purchase import PurchaseCreated
from analytics_svc.upstream.source import Source, Totals
from chassis.postgres import Connection, Pool

PURCHASES_MAX = 1_000_000  # of a day; what the log knows of each is held in memory, some 150 bytes
FOREIGN_IDS_MAX = 1_000  # named
FETCH_ROWS = 5_000  # at a time, so that nothing else in this process waits for long
MISTOLD_MAX = 1_000  # log entries that are corrected at once; a repair comes back for the rest

Visit = tuple[str, int]  # customer and branch
Visits = dict[Visit, tuple[int, datetime]]  # how often, and when last
# By branch and product, what was sold less what the rows say; both packed into whole numbers, as there may be millions.
Unsold = dict[int, int]
PRODUCT_BITS, CENTS_BITS = 64, 100


class DayTooLarge(Exception):
    """It has more purchases than one proof can hold."""


class Difference(NamedTuple):
    """What the rows of a day lack: by branch, and by branch and product. Negative is what they have too much."""

    sums: dict[int, Totals]
    products: dict[tuple[int, int], tuple[int, int]]  # units and cents


class Proof(NamedTuple):
    day: date
    purchases: int  # exported
    comparison: Comparison
    difference: Difference
    foreign: list[str]  # ids that count on this day without having been recorded on it
    mistold: list[PurchaseCreated]  # recorded, of which the log knows something else; some
    visits: Visits | None  # what the log's forgotten part should say of this day; None: it says so

    @property
    def right(self) -> bool:
        return self.comparison.verdict in (Verdict.AGREED, Verdict.PENDING)


async def prove_day(
    pool: Pool,
    source: Source,
    day: date,
    *,
    wait_s: float = 0.0,
    count: Callable[[Sequence[PurchaseCreated]], Awaitable[None]] | None = None,
) -> Proof:
    """Compare a day row by row, and wait `wait_s` at most for what is on its way; `count` is given what never counted.

    Of a day that the retention has dropped, its rows are compared with each other.

    Raises:
        DayTooLarge: compare its sums.
        HistoryDropped: the retention has just dropped some of it; the next time is another case.
        PurchasesUnavailable, TimeZonesDiffer: there is nothing to compare with.
    """
    before = await source.control_totals(day, day)
    if (purchases := sum(row.purchases for row in before.totals.values())) > PURCHASES_MAX:
        raise DayTooLarge(f"{purchases:,} purchases, more than {PURCHASES_MAX:,}")
    if before.complete_from and day < before.complete_from:
        return Proof(day, 0, await _contradictions(pool, day), Difference({}, {}), [], [], None)
    snapshot = await _read_day(pool, day)
    truth = _Truth(snapshot)
    async with aclosing(source.export(day, day)) as chunks:
        async for chunk in chunks:
            if missing := truth.add(chunk):
                elsewhere = await _logged_elsewhere(pool, day, missing)
                missing = truth.add_missing(missing, elsewhere)
            if missing and count:
                await count(missing)
    after = await source.control_totals(day, day)
    if after.complete_from != before.complete_from:
        raise HistoryDropped(f"the retention has just dropped purchases before {after.complete_from}; try again")
    waiting: set[str] = set()
    complete = False
    if truth.missing:
        complete = await wait_until_complete(pool, source, after.read_at, wait_s)
        waiting = await _waiting(pool, list(truth.missing))
    foreign = sorted(snapshot.logged)
    rows = _rows(day, snapshot, truth, waiting, len(foreign), complete)
    lack = _difference(snapshot, truth)
    wrong_visits = truth.visits != snapshot.forgotten
    named, more = _findings(day, truth, lack, bool(foreign), wrong_visits)
    some = foreign[:FOREIGN_IDS_MAX]
    return Proof(
        day,
        truth.purchases,
        Comparison(rows, [*snapshot.chain, *named], some, more, len(foreign) - len(some)),
        lack,
        foreign,
        truth.mistold,
        truth.visits if wrong_visits else None,
    )


class _Day(NamedTuple):
    """A day in one snapshot."""

    sums: dict[int, Totals]
    products: Unsold
    logged: dict[str, int]  # ids that count on that day, and what the log knows of each, as a number
    forgotten: Visits  # of those that the log has forgotten
    floor: str
    chain: list[Finding]


class _Truth:
    """What the exported purchases say that the rows must say."""

    def __init__(self, snapshot: _Day) -> None:
        """It takes from `snapshot.logged` what was recorded: foreign is what is left. So with the products."""
        self._logged, self._floor, self._products = snapshot.logged, snapshot.floor, snapshot.products
        self.purchases = 0
        self.sums: dict[int, list[int]] = {}
        self.visits: Visits = {}
        self.mistold: list[PurchaseCreated] = []
        self.mistold_count = 0
        self.missing: dict[str, tuple[int, Totals]] = {}  # neither logged nor forgotten: branch and amounts by id

    def add(self, events: Sequence[PurchaseCreated]) -> list[PurchaseCreated]:
        """Returns those that do not count on this day in the snapshot."""
        missing = []
        for event in events:
            self.purchases += 1
            known = self._logged.pop(event.event_id, None)
            if known is None and event.event_id >= self._floor:
                missing.append(event)
                continue
            self._count(event)
            if known is None and event.customer_id:
                key = (event.customer_id, event.branch_id)
                times, last = self.visits.get(key, (0, event.purchase_time))
                self.visits[key] = (times + 1, max(last, event.purchase_time))
            elif known is not None and known != _told(event):
                self._mistold(event)
        return missing

    def add_missing(self, events: Sequence[PurchaseCreated], elsewhere: set[str]) -> list[PurchaseCreated]:
        """Those that the log has on another day, or on none, will not count by themselves; returns the others."""
        missing = []
        for event in events:
            if event.event_id in elsewhere:
                self._count(event)
                self._mistold(event)
            else:
                self.missing[event.event_id] = (event.branch_id, _totals(event))
                missing.append(event)
        return missing

    def _mistold(self, event: PurchaseCreated) -> None:
        self.mistold_count += 1
        if len(self.mistold) < MISTOLD_MAX:
            self.mistold.append(event)

    def _count(self, event: PurchaseCreated) -> None:
        sums = self.sums.setdefault(event.branch_id, [0] * len(Totals._fields))
        for column, value in enumerate(_totals(event)):
            sums[column] += value
        for product_id, quantity, cents in event.items:
            _add_sold(self._products, event.branch_id, product_id, quantity, cents)


def _totals(event: PurchaseCreated) -> Totals:
    return Totals(1, int(event.customer_id is not None), sum(item.quantity for item in event.items), event.cents)


def _add_sold(products: Unsold, branch_id: int, product_id: int, units: int, cents: int) -> None:
    key = (branch_id << PRODUCT_BITS) + product_id
    if left := products.pop(key, 0) + (units << CENTS_BITS) + cents:
        products[key] = left


def _unpacked(products: Unsold) -> dict[tuple[int, int], tuple[int, int]]:
    half = 1 << (CENTS_BITS - 1)
    found = {}
    for key in sorted(products):
        units = (products[key] + half) >> CENTS_BITS
        branch_id = key >> PRODUCT_BITS
        found[branch_id, key - (branch_id << PRODUCT_BITS)] = (units, products[key] - (units << CENTS_BITS))
    return found


def _told(event: PurchaseCreated) -> int:
    """What the log should know of an event."""
    return hash((event.branch_id, event.customer_id, event.purchase_time, event.checksum()))


async def _read_day(pool: Pool, day: date) -> _Day:
    async with pool.connection() as connection, connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        totals = await read_totals(connection, day, day)
        products: Unsold = {}
        logged: dict[str, int] = {}
        async with connection.cursor(name="products") as cursor:
            await cursor.execute(
                "SELECT branch_id, product_id, qty_sum, revenue_sum FROM product_sales_daily WHERE day = %s", [day]
            )
            while rows := await cursor.fetchmany(FETCH_ROWS):
                for branch, product, units, revenue in rows:
                    _add_sold(products, branch, product, -units, -_cents(revenue))
        async with connection.cursor(name="log") as cursor:
            await cursor.execute(
                "SELECT event_id::text, branch_id, customer_id::text, purchase_time, checksum"
                " FROM analytics_event_log WHERE day = %s",
                [day],
            )
            while rows := await cursor.fetchmany(FETCH_ROWS):
                logged |= {event_id: hash(tuple(known)) for event_id, *known in rows}
        forgotten = await connection.execute(
            "SELECT customer_id::text, branch_id, purchases_count, last_purchase_at FROM forgotten_visits"
            " WHERE day = %s",
            [day],
        )
        floor = await connection.execute("SELECT coalesce(log_floor::text, '') FROM freshness")
        chain = await read_models.find_wrong(connection, read_models.DAILY_SALES_OF_CHAIN, str(day), str(day))
        return _Day(
            {branch: row for (_, branch), row in totals.items()},
            products,
            logged,
            {(customer, branch): (count, last) for customer, branch, count, last in await forgotten.fetchall()},
            (await floor.fetchall())[0][0],
            chain.findings,
        )


async def _logged_elsewhere(pool: Pool, day: date, events: Sequence[PurchaseCreated]) -> set[str]:
    async with pool.connection() as connection:
        cursor = await connection.execute(
            "SELECT event_id::text FROM analytics_event_log WHERE event_id = ANY (%s::uuid[])"
            " AND day IS DISTINCT FROM %s",
            [[event.event_id for event in events], day],
        )
        return {event_id for (event_id,) in await cursor.fetchall()}


async def _waiting(pool: Pool, ids: list[str]) -> set[str]:
    """Those of the ids that are neither counted nor quarantined by now."""
    async with pool.connection() as connection:
        rest = await unsettled(connection, "{" + ",".join(ids) + "}")
    return set(rest.ids.strip("{}").split(",")) if rest else set()


def _rows(day: date, snapshot: _Day, truth: _Truth, waiting: set[str], foreign: int, complete: bool) -> list[Row]:
    waits: dict[int, list[Totals]] = {}
    settled: dict[int, list[Totals]] = {}
    for event_id, (branch, amounts) in truth.missing.items():
        (waits if event_id in waiting else settled).setdefault(branch, []).append(amounts)
    branches = snapshot.sums.keys() | truth.sums.keys() | waits.keys() | settled.keys()
    stored = {branch: snapshot.sums.get(branch, Totals()) for branch in branches}
    should = {branch: Totals(*truth.sums.get(branch, Totals())) for branch in branches}
    surplus = sum(stored[branch].purchases - should[branch].purchases for branch in branches)
    rows = []
    for branch in sorted(branches):
        counted = _sum([stored[branch], *settled.get(branch, [])])
        recorded = _sum([should[branch], *settled.get(branch, []), *waits.get(branch, [])])
        verdict, detail = Verdict.AGREED, ""
        if stored[branch] != should[branch]:
            what = difference(stored[branch], should[branch])
            if foreign and surplus == foreign and at_most(should[branch], stored[branch]):
                verdict, detail = Verdict.FOREIGN, f"{what} of events that nobody recorded"
            else:
                verdict, detail = Verdict.DIFFERENT, f"{what} against the purchases that count"
        elif waits.get(branch):
            if complete:
                what = difference(counted, recorded)
                verdict, detail = Verdict.DIFFERENT, f"{what}: recorded, but neither counted nor quarantined"
            else:
                verdict, detail = Verdict.PENDING, "purchases are on their way"
        rows.append(Row(day, branch, recorded, counted, verdict, detail))
    return rows


def _sum(parts: Sequence[Totals]) -> Totals:
    return Totals(*map(sum, zip(*parts, strict=True)))


def _difference(snapshot: _Day, truth: _Truth) -> Difference:
    sums = {}
    for branch in snapshot.sums.keys() | truth.sums.keys():
        stored, should = snapshot.sums.get(branch, Totals()), truth.sums.get(branch, Totals())
        by = Totals(*(ought - is_ for is_, ought in zip(stored, should, strict=True)))
        if any(by):
            sums[branch] = by
    return Difference(sums, _unpacked(snapshot.products))


def _findings(
    day: date, truth: _Truth, found: Difference, foreign: bool, wrong_visits: bool
) -> tuple[list[Finding], int]:
    """Some, and how many there are beyond them."""
    findings = [
        Finding("analytics_event_log", f"event_id {event.event_id}", "what was counted is not what was recorded", day)
        for event in truth.mistold[: read_models.NAMED_MAX]
    ]
    more = truth.mistold_count - len(findings)
    if wrong_visits:
        findings.append(Finding("forgotten_visits", f"day {day}", "are not those of the purchases", day))
    if foreign:  # whose products nobody knows
        return findings, more
    for (branch, product), (units, cents) in islice(found.products.items(), read_models.NAMED_MAX):
        detail = f"{-units:+,} in qty_sum and {-cents:+,} cents of revenue against the purchases that count"
        name = f"day {day}, branch_id {branch}, product_id {product}"
        findings.append(Finding("product_sales_daily", name, detail, day))
    return findings, more + max(len(found.products) - read_models.NAMED_MAX, 0)


async def _contradictions(pool: Pool, day: date) -> Comparison:
    """Where a day's tables do not say the same."""
    async with pool.connection() as connection:
        wrong = [
            await read_models.find_wrong(connection, model, str(day), str(day))
            for model in (read_models.DAILY_SALES_OF_CHAIN, read_models.PRODUCTS_AND_SUMS)
        ]
    named = [finding for each in wrong for finding in each.findings]
    return Comparison([], named, [], more_findings=sum(each.rows for each in wrong) - len(named))


async def read_totals(connection: Connection, first: date, last: date) -> dict[tuple[date, int], Totals]:
    cursor = await connection.execute(
        """
        SELECT day, branch_id, purchases_count, purchases_with_customer_count, items_sum, revenue_sum
        FROM daily_sales_by_branch WHERE day BETWEEN %s AND %s
        """,
        [first, last],
    )
    return {
        (day, branch): Totals(purchases, with_customer, items, _cents(revenue))
        for day, branch, purchases, with_customer, items, revenue in await cursor.fetchall()
    }


def _cents(amount: Decimal) -> int:
    return int(amount.scaleb(2))
