"""The figures of the owner's page, asked for side by side; what many want is asked once."""

import asyncio
import datetime
from collections import defaultdict
from collections.abc import Awaitable, Callable, Hashable, Iterable
from typing import NamedTuple, TypeVar
from zoneinfo import ZoneInfo

from pages_svc import person
from pages_svc.owner import period
from pages_svc.owner.period import DAY, Period, Selection
from pages_svc.upstream.remembered import Remembered
from pages_svc.upstream.sales import Audit, Calendar, Customers, Daily, Marks, Products, Rows, Sales, Totals
from pages_svc.upstream.services import Problem
from pages_svc.upstream.watch import Watch

PRODUCTS, CUSTOMERS = 10, 10
LISTS_LAST_S = 1.5  # products and customers change slower than sums, and cost more
OLDER_LASTS_S = 15.0  # what is older than what is followed hardly changes, and may be years
AUDIT_LASTS_S = 2.0
PERMITTED_LASTS_S = 2.0
SOON_S = 0.5

T = TypeVar("T")
CALENDAR_LASTS_S = 30.0
BY_THEN_LASTS_S = 60.0  # what other days had sold by this time


class Today(NamedTuple):
    """The day so far, and what others had sold by this time; None when that cannot be asked."""

    day: datetime.date
    now: datetime.datetime
    totals: Totals
    yesterday: Totals | None
    last_week: Totals | None


class Figures(NamedTuple):
    """What the page shows."""

    selection: Selection
    period: Period
    zone: ZoneInfo
    today: Today
    rows: Rows  # of the period, and of what it is compared with
    marks: Marks  # how far they go
    totals: Totals
    before: Totals
    branches: dict[int, Totals]  # of the period; the best first
    all_branches: list[int]  # to choose from
    products: Products | Problem
    customers: Customers | Problem
    audit: Audit | Problem
    calendar: Calendar


class Reader:
    """Reads figures."""

    def __init__(self, sales: Sales, watch: Watch) -> None:
        self._sales, self._watch = sales, watch
        self._remembered = Remembered()
        self._calendar: Calendar | None = None  # the last that was known: it outlives an outage

    async def figures(self, selection: Selection, now: datetime.datetime | None = None) -> Figures:
        """All of it.

        Raises:
            Problem: there are no sums. What else is missing is told in its place.
        """
        now = now or datetime.datetime.now(datetime.UTC)
        calendar = await self.calendar(selection.branch_id)
        today = now.astimezone(calendar.zone).date()
        chosen = period.resolve(selection, today, calendar.last)
        branch_id = selection.branch_id
        if person.current():  # what follows may come from what all share
            await self._remembered.get(
                ("permitted", branch_id), PERMITTED_LASTS_S, lambda: self._sales.require_permitted(today, branch_id)
            )
        ((rows, marks), of_today, yesterday, last_week), (products, customers, audit) = await asyncio.gather(
            asyncio.gather(
                self._daily(min(chosen.before_first, chosen.first), chosen.last, branch_id),
                self._daily(today, today, branch_id),
                self._by_then(now, calendar.zone, 1, branch_id),
                self._by_then(now, calendar.zone, 7, branch_id),
            ),
            asyncio.gather(
                self._products(chosen, selection),
                self._customers(branch_id),
                self._soon("audit", AUDIT_LASTS_S, self._sales.audit),
            ),
        )
        of_branch: dict[int, list[Totals]] = defaultdict(list)
        of_before: list[Totals] = []
        for (day, branch), totals in rows.items():
            if chosen.first <= day:
                of_branch[branch].append(totals)
            elif day <= chosen.before_last:
                of_before.append(totals)
        branches = {branch: sum_up(parts) for branch, parts in of_branch.items()}
        return Figures(
            selection=selection,
            period=chosen,
            zone=calendar.zone,
            today=Today(today, now, sum_of(of_today.rows), yesterday, last_week),
            rows=rows,
            marks=marks,
            totals=sum_up(branches.values()),
            before=sum_up(of_before),
            branches=dict(sorted(branches.items(), key=lambda it: (-it[1].revenue_cents, it[0]))),
            all_branches=self._known_branches(branches.keys() | ({branch_id} if branch_id else set())),
            products=products,
            customers=customers,
            audit=audit,
            calendar=calendar,
        )

    async def calendar(self, branch_id: int | None = None) -> Calendar:
        """That of the chain; whoever may see one branch only has to say which. Raises Problem only while it was never
        known."""
        known = self._calendar
        try:
            found = await self._remembered.get(
                ("calendar", branch_id),
                CALENDAR_LASTS_S,
                lambda: self._sales.calendar(branch_id),
                patience_s=SOON_S if known else None,
            )
        except (Problem, TimeoutError):
            if known is None:
                raise
            return known
        self._calendar = found
        return found

    async def zone(self) -> datetime.tzinfo | None:
        """That of the chain; None while it was never known."""
        try:
            return (await self.calendar()).zone
        except Problem:
            return None

    async def _daily(self, first: datetime.date, last: datetime.date, branch_id: int | None) -> Daily:
        """The last weeks as they are followed, and what is before them as it was some seconds ago."""
        newer = max(first, self._watch.first or first)
        followed = self._watch.between(newer, last, branch_id)
        if followed is None:
            return await self._asked(first, last, branch_id, LISTS_LAST_S)
        if newer == first:
            return Daily(followed, self._watch.marks)
        older = await self._asked(first, min(newer - DAY, last), branch_id, OLDER_LASTS_S)
        return Daily(older.rows | followed, self._watch.marks.and_those(older.marks))

    async def _asked(self, first: datetime.date, last: datetime.date, branch_id: int | None, lasts_s: float) -> Daily:
        return await self._remembered.get(
            ("daily", first, last, branch_id), lasts_s, lambda: self._sales.daily(first, last, branch_id)
        )

    async def _by_then(self, now: datetime.datetime, zone: ZoneInfo, days: int, branch_id: int | None) -> Totals | None:
        """By the clock on the wall, which may have been set meanwhile; by whole minutes, so that many ask the same."""
        local = now.astimezone(zone).replace(second=0, microsecond=0, tzinfo=None)
        end = (local - days * DAY).replace(tzinfo=zone)
        found = await self._soon(
            ("by then", end, branch_id),
            BY_THEN_LASTS_S,
            lambda: self._sales.recorded_until(end.astimezone(datetime.UTC), end.date(), branch_id),
        )
        return None if isinstance(found, Problem) else found

    async def _soon(self, key: Hashable, lasts_s: float, ask: Callable[[], Awaitable[T]]) -> T | Problem:
        """For what the page can do without: a service that is down must not keep it from being shown."""
        try:
            return await self._remembered.get(key, lasts_s, ask, patience_s=SOON_S)
        except Problem as problem:
            return problem
        except TimeoutError:
            return Problem("There is no answer yet.", "")

    async def _products(self, chosen: Period, selection: Selection) -> Products | Problem:
        key = ("products", chosen.first, chosen.last, selection.branch_id, selection.by_units)
        try:
            return await self._remembered.get(
                key,
                LISTS_LAST_S,
                lambda: self._sales.products(
                    chosen.first, chosen.last, selection.branch_id, limit=PRODUCTS, by_units=selection.by_units
                ),
            )
        except Problem as problem:
            return problem

    async def _customers(self, branch_id: int | None) -> Customers | Problem:
        try:
            return await self._remembered.get(
                ("customers", branch_id), LISTS_LAST_S, lambda: self._sales.customers(branch_id, limit=CUSTOMERS)
            )
        except Problem as problem:
            return problem

    def _known_branches(self, named: set[int]) -> list[int]:
        who = person.current()
        if who and who.caller.branch_id:
            return [who.caller.branch_id]
        return sorted(named | {branch for _, branch in self._watch.rows or {}})


def sum_of(rows: Rows) -> Totals:
    return sum_up(rows.values())


def sum_up(parts: Iterable[Totals]) -> Totals:
    """As adding them one by one, for the tens of thousands that years have."""
    columns = zip(*parts, strict=True)
    return Totals(*map(sum, columns))
