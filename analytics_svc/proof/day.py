"""The proof of one day, row by row, while sales go on.

The read models and the ids in the log are read in one snapshot, and then the day is exported. Whatever counts in that
snapshot was recorded before, so the rows must say exactly what the exported purchases with these ids say.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import NamedTuple
from uuid import UUID

from analytics_svc.proof import contradictions
from analytics_svc.proof.contradictions import Finding
from analytics_svc.proof.verdicts import Comparison, Row, Verdict, at_most, difference
from analytics_svc.purchase import PurchaseCreated
from analytics_svc.upstream.source import Recorded, Source, Totals
from chassis.postgres import Connection, Pool

# Purchases of a day; their ids are held in memory, some 100 bytes each. A larger day is compared by sums only.
PURCHASES_MAX = 1_000_000
FOREIGN_IDS_MAX = 1_000  # named


async def prove_day(pool: Pool, source: Source, day: date) -> Comparison | None:
    """Compare a day row by row; None when only its sums can be: it is too large, or moves and its log has gaps.

    Raises:
        PurchasesUnavailable, TimeZonesDiffer: there is nothing to compare with.
    """
    before = await source.control_totals(day, day)
    if sum(row.purchases for row in before.totals.values()) > PURCHASES_MAX:
        return None
    snapshot = await _read_day(pool, source, day, all_logged=bool(await logged_days(pool, [day])))
    truth = _Truth(snapshot)
    async with aclosing(source.export(day, day)) as chunks:  # type: ignore[type-var]
        async for chunk in chunks:
            truth.add(chunk)
    complete = snapshot.complete_through is not None and snapshot.complete_through >= before.read_at
    if snapshot.logged is None:
        after = await source.control_totals(day, day)
        if not complete or after.totals != before.totals:
            return None
    foreign = sorted(snapshot.logged - truth.ids) if snapshot.logged else []
    rows = _rows(day, before, snapshot, truth, len(foreign), complete)
    findings = []
    if not foreign:  # of whose products and customers we know nothing
        findings = [*_wrong_products(day, snapshot, truth), *await _wrong_customers(pool, day, snapshot, truth)]
    return Comparison(rows, findings, foreign[:FOREIGN_IDS_MAX])


async def logged_days(pool: Pool, days: Sequence[date]) -> list[date]:
    """Those days whose events are all in the log, with their day."""
    async with pool.connection() as connection:
        cursor = await connection.execute("SELECT log_has_days_from, log_floor::text FROM audit_status, freshness")
        ((first, floor),) = await cursor.fetchall()
    if floor:  # ids are made by time, and a day's events on that day or later
        floor_day = datetime.fromtimestamp((UUID(floor).int >> 80) / 1000, UTC).date() + timedelta(days=2)
        first = max(first or floor_day, floor_day)
    return [day for day in days if first is None or day >= first]


class _Day(NamedTuple):
    """A day's rows in one snapshot."""

    totals: dict[tuple[date, int], Totals]
    products: dict[tuple[int, int], tuple[int, int]]  # by branch and product: units, cents
    last_visits: dict[tuple[str, int], datetime]  # of those whose last purchase was on that day, by customer and branch
    logged: set[str] | None  # ids that count on that day; None: the log has gaps
    quarantined: set[str]  # ids, of all days, that do not count, from the log's floor on
    complete_through: datetime | None


class _Truth:
    """What the exported purchases say that the rows must say. Where the log has gaps, all purchases must count."""

    def __init__(self, snapshot: _Day) -> None:
        self._logged, self._quarantined = snapshot.logged, snapshot.quarantined
        self.ids: set[str] = set()
        self.counted: Counter[tuple[int, int]] = Counter()  # by branch and column
        self.quarantined: Counter[tuple[int, int]] = Counter()
        self.products: dict[tuple[int, int], list[int]] = {}
        self.visits: dict[tuple[str, int], tuple[int, datetime]] = {}

    def add(self, events: Sequence[PurchaseCreated]) -> None:
        for event in events:
            self.ids.add(event.event_id)
            if event.event_id in self._quarantined:
                _add(self.quarantined, event)
            elif self._logged is None or event.event_id in self._logged:
                self._count(event)

    def _count(self, event: PurchaseCreated) -> None:
        _add(self.counted, event)
        for product_id, quantity, cents in event.items:
            sold = self.products.setdefault((event.branch_id, product_id), [0, 0])
            sold[0] += quantity
            sold[1] += cents
        if event.customer_id:
            key = (event.customer_id, event.branch_id)
            count, last = self.visits.get(key, (0, event.purchase_time))
            self.visits[key] = (count + 1, max(last, event.purchase_time))


def _add(sums: Counter[tuple[int, int]], event: PurchaseCreated) -> None:
    items = sum(item.quantity for item in event.items)
    for column, value in enumerate((1, int(event.customer_id is not None), items, event.cents)):
        sums[event.branch_id, column] += value


def _of_branch(sums: Counter[tuple[int, int]], branch_id: int) -> Totals:
    return Totals(*(sums[branch_id, column] for column in range(len(Totals._fields))))


async def _read_day(pool: Pool, source: Source, day: date, *, all_logged: bool) -> _Day:
    async with pool.connection() as connection, connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        totals = await read_totals(connection, day, day)
        products = await connection.execute(
            "SELECT branch_id, product_id, qty_sum, revenue_sum FROM product_sales_daily WHERE day = %s", [day]
        )
        last_visits = await connection.execute(
            """
            SELECT customer_id::text, branch_id, last_purchase_at FROM customer_loyalty
            WHERE last_purchase_at >= %(day)s::date - 1 AND last_purchase_at < %(day)s::date + 2 -- it lies in there
            """,
            {"day": day},
        )
        logged = await connection.execute("SELECT event_id::text FROM analytics_event_log WHERE day = %s", [day])
        # Below the floor, nobody can tell by its id whether an event is counted: what is recorded must be. So a
        # duplicate in quarantine excuses nothing, and what RebuildDay counts there is right.
        quarantined = await connection.execute(
            """
            SELECT event_id::text FROM quarantined_events AS kept
            WHERE event_id >= coalesce((SELECT log_floor FROM freshness), '00000000-0000-0000-0000-000000000000')
                AND NOT EXISTS (SELECT FROM analytics_event_log AS log WHERE log.event_id = kept.event_id)
            """
        )
        return _Day(
            totals,
            {(branch, product): (qty, _cents(revenue)) for branch, product, qty, revenue in await products.fetchall()},
            {
                (customer, branch): last
                for customer, branch, last in await last_visits.fetchall()
                if source.day_of(last) == day
            },
            {event_id for (event_id,) in await logged.fetchall()} if all_logged else None,
            {event_id for (event_id,) in await quarantined.fetchall()},
            await complete_through(connection),
        )


def _rows(day: date, before: Recorded, snapshot: _Day, truth: _Truth, foreign: int, complete: bool) -> list[Row]:
    branches = {branch for _, branch in before.totals.keys() | snapshot.totals.keys()}
    branches |= {branch for branch, _ in truth.counted}
    rows = []
    stored = {branch: snapshot.totals.get((day, branch), Totals()) for branch in branches}
    counted = {branch: _of_branch(truth.counted, branch) for branch in branches}
    surplus = sum(stored[branch].purchases - counted[branch].purchases for branch in branches)
    for branch in sorted(branches):
        recorded = before.totals.get((day, branch), Totals())
        settled = Totals(*map(sum, zip(stored[branch], _of_branch(truth.quarantined, branch), strict=True)))
        verdict, detail = Verdict.AGREED, ""
        if stored[branch] != counted[branch]:
            what = difference(stored[branch], counted[branch])
            if foreign and surplus == foreign and at_most(counted[branch], stored[branch]):
                verdict, detail = Verdict.FOREIGN, f"{what} of events that nobody recorded"
            else:
                verdict, detail = Verdict.DIFFERENT, f"{what} against the events in the log"
        elif not at_most(recorded, settled):
            what = difference(settled, recorded)
            if complete:
                verdict, detail = Verdict.DIFFERENT, f"{what}: recorded, but neither counted nor quarantined"
            else:
                verdict, detail = Verdict.PENDING, "purchases are on their way"
        rows.append(Row(day, branch, recorded, settled, verdict, detail))
    return rows


def _wrong_products(day: date, snapshot: _Day, truth: _Truth) -> list[Finding]:
    wrong = []
    for key in sorted(snapshot.products.keys() | truth.products.keys()):
        stored, should = snapshot.products.get(key, (0, 0)), tuple(truth.products.get(key, (0, 0)))
        if stored != should:
            branch, product = key
            detail = (
                f"qty_sum {stored[0]}, not {should[0]}; revenue {stored[1]} cents, not {should[1]}, say the purchases"
            )
            name = f"day {day}, branch_id {branch}, product_id {product}"
            wrong.append(Finding("product_sales_daily", name, detail, day))
    return wrong[: contradictions.NAMED_MAX]


async def _wrong_customers(pool: Pool, day: date, snapshot: _Day, truth: _Truth) -> list[Finding]:
    """Customers who came on that day and whose rows do not say so; the rows only grow, so they may be read later."""
    wrong = {
        key: f"last_purchase_at {last}, when nothing was bought"
        for key, last in snapshot.last_visits.items()
        if key not in truth.visits or truth.visits[key][1] != last
    }
    keys = list(truth.visits)
    async with pool.connection() as connection:
        cursor = await connection.execute(
            """
            SELECT customer_id::text, branch_id, stored.purchases_count, stored.last_purchase_at
            FROM unnest(%s::uuid[], %s::int[], %s::bigint[], %s::timestamptz[])
                AS visit (customer_id, branch_id, purchases_count, last_purchase_at)
            LEFT JOIN customer_loyalty AS stored USING (customer_id, branch_id)
            WHERE stored.purchases_count IS NULL OR stored.purchases_count < visit.purchases_count
                OR stored.last_purchase_at < visit.last_purchase_at
            """,
            [
                [customer for customer, _ in keys],
                [branch for _, branch in keys],
                [truth.visits[key][0] for key in keys],
                [truth.visits[key][1] for key in keys],
            ],
        )
        for customer, branch, count, last in await cursor.fetchall():
            bought, at = truth.visits[customer, branch]
            wrong[customer, branch] = (
                f"purchases_count {count}, last {last}, but {bought} on that day, the last at {at}"
            )
    return [
        Finding("customer_loyalty", f"customer_id {customer}, branch_id {branch}", detail, day)
        for (customer, branch), detail in sorted(wrong.items())[: contradictions.NAMED_MAX]
    ]


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


async def complete_through(connection: Connection) -> datetime | None:
    cursor = await connection.execute("SELECT complete_through_at FROM freshness")
    ((complete_through,),) = await cursor.fetchall()
    return complete_through  # type: ignore[no-any-return]


def _cents(amount: Decimal) -> int:
    return int(amount.scaleb(2))
