"""Watching daily sales: every row that matches first, then each row that changes, in its latest state.

One reader (`Watchers.run`) reads for all, and a watcher gets the rows in the order of its reads, so no row ever goes
back in time. A changed row is read once for all watchers, a page once for all who wait for it with the same filter.
What a slow watcher has not been sent yet is overwritten by what is newer, so its memory is bounded; beyond that bound,
it is forgotten and read again.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import date
from typing import NamedTuple

import structlog

from analytics_svc.ingest.announce import EVERYTHING, Announcement, Row
from analytics_svc.serve.queries import Days, Freshness
from chassis.errors import DatabaseUnavailable, Overloaded, ShuttingDown
from chassis.lifecycle import Backoff, wait_set
from chassis.postgres import UNAVAILABLE, Connection, Pool, patience

WATCHERS_MAX = 1_000  # at once: each gets a message per round of reading
PAUSE_S = 0.1  # between rounds; rows that change more often are sent in their latest state
PAUSE_EACH_S = 0.0005  # more of it for each watcher: sending to all of them must leave time for other calls
PASS_EVERY_S = 1.0  # a watcher's rows are all read again at most so often
MARKS_EVERY_S = 1.0  # a watcher whose rows do not change still learns how fresh they are
PAGE_ROWS = 1_000
PENDING_ROWS_MAX = 5_000  # kept for a watcher; a message of so many has about 300 KB
CHANGED_ROWS_MAX = 10_000  # heard of and not read yet
PATIENCE_S = 10.0  # with a database that answers nobody: a restart of it takes seconds

log = structlog.get_logger()


class DailySales(NamedTuple):
    """A row as it is sent; revenue is an exact decimal as text."""

    day: date
    branch_id: int
    revenue: str
    items: int
    purchases: int
    purchases_with_customer: int


class Marks(NamedTuple):
    """How fresh what a read has found is."""

    announced_count: int  # announcements that the read could see
    freshness: Freshness


NO_MARKS = Marks(-1, Freshness(None, None, 0, ""))


class Update(NamedTuple):
    """What a watcher is sent next."""

    rows: list[DailySales]
    freshness: Freshness  # of all that it was sent; empty until it has every row


class Watch:
    """One watcher, and what it is still to be sent."""

    def __init__(self, days: Days, branch_ids: Iterable[int]) -> None:
        self.days, self.branch_ids = days, frozenset(branch_ids)
        self.ready = asyncio.Event()  # there is something to do for it
        self.ended = False
        self._pending: dict[Row, DailySales] = {}
        self._again = True  # every row that matches is to be read (again)
        self._after: Row | None = None  # in a pass over all rows: the last one read
        self._pass_due = 0.0
        self._pass_marks = NO_MARKS  # of the first page of the present pass
        self._marks = NO_MARKS
        self._sent: Freshness | None = None

    def begin_pass(self) -> bool:
        """Whether there is a page to read, at `after`."""
        now = asyncio.get_running_loop().time()
        if self._after is None and self._again and now >= self._pass_due:
            self._again, self._after, self._pass_due = False, (self.days.first, 0), now + PASS_EVERY_S
            self._marks = self._pass_marks = NO_MARKS
        return self._after is not None

    @property
    def after(self) -> Row:
        assert self._after is not None
        return self._after

    def take_page(self, rows: list[DailySales], marks: Marks) -> None:
        """One page of the pass. With the last one, all rows are at least as new as at its beginning."""
        if self._pass_marks is NO_MARKS:
            self._pass_marks = marks
        self._pending.update(((row.day, row.branch_id), row) for row in rows)
        if len(rows) == PAGE_ROWS:
            self._after = (rows[-1].day, rows[-1].branch_id)
        else:
            self._after = None
            self._marks = _later(self._marks, self._pass_marks)

    def offer(self, rows: Iterable[DailySales], marks: Marks | None) -> None:
        """Changed rows; with marks, when no row is older than they say."""
        for row in rows:
            if self.days.first <= row.day <= self.days.last and (
                not self.branch_ids or row.branch_id in self.branch_ids
            ):
                self._pending[row.day, row.branch_id] = row
        if len(self._pending) > PENDING_ROWS_MAX:
            self._pending.clear()
            self.start_over()
        if marks:
            self._marks = _later(self._marks, marks)
        if self._pending:
            self.ready.set()

    def start_over(self) -> None:
        """Read every row again, after the pass that goes on: otherwise, that would never reach its end."""
        self._again = True
        self.ready.set()

    def next_update(self) -> Update | None:
        """What there is to be sent; None when it is nothing. Without any rows, the first update says so."""
        whole = self._after is None and not self._again
        if not self._pending and not (whole and self._marks.freshness != self._sent):
            return None
        if whole:
            self._sent = self._marks.freshness
        rows, self._pending = sorted(self._pending.values()), {}
        return Update(rows, self._sent or NO_MARKS.freshness)


class PageKey(NamedTuple):
    """Which rows to read next."""

    days: Days
    branch_ids: frozenset[int]
    after: Row


class WantedPage:
    """A page that is read for all who want it before the reading begins: so it lacks nothing that they miss."""

    def __init__(self) -> None:
        self.watches: set[Watch] = set()
        self.taken: asyncio.Future[bool] = asyncio.get_running_loop().create_future()  # False: ask again

    def end(self, taken: bool) -> None:
        if not self.taken.done():
            self.taken.set_result(taken)


class Watchers:
    """All watchers of this server, and the one who reads for them."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._watches: set[Watch] = set()
        self._changed: set[Row] = set()
        self._heard = 0  # number of the last announcement whose rows are in `_changed`, or were
        self._early_marks: Marks | None = None  # of a read that saw more than was heard of by then
        self._announced = False  # since the changed rows were read last
        self._wanted: dict[PageKey, WantedPage] = {}  # the one that is read next first
        self._wake = asyncio.Event()
        self._due = 0.0  # when changed rows may be read again
        self._answered_at = 0.0  # when the database has answered last
        self._draining = False

    def on_announcement(self, announcement: Announcement) -> None:
        self._heard = announcement.number
        if announcement.rows is EVERYTHING or len(self._changed) > CHANGED_ROWS_MAX:
            self._changed.clear()
            self._early_marks = None
            for watch in self._watches:
                watch.start_over()
        elif self._watches:
            self._changed |= announcement.rows
        self._announced = True
        self._wake.set()

    def drain(self) -> None:
        """Send everybody to another server."""
        self._draining = True
        for watch in self._watches:
            watch.ended = True
            watch.ready.set()
        for page in self._wanted.values():
            page.end(False)

    async def watch(self, days: Days, branch_ids: Iterable[int]) -> AsyncGenerator[Update, None]:
        """Updates without end.

        Raises:
            Overloaded, ShuttingDown, DatabaseUnavailable
        """
        with self._admitted(Watch(days, branch_ids)) as watch:
            while not watch.ended:
                if watch.begin_pass():
                    await self._page(watch)
                else:
                    await wait_set(watch.ready, MARKS_EVERY_S)
                    watch.ready.clear()
                if update := watch.next_update():
                    yield update
            raise ShuttingDown("this server is shutting down; watch another one")

    async def _page(self, watch: Watch) -> None:
        """Wait until the watcher has its next page. However long the line is, it waits while others get theirs.

        Raises:
            DatabaseUnavailable: nobody gets an answer.
        """
        now = asyncio.get_running_loop().time
        key, began = PageKey(watch.days, watch.branch_ids, watch.after), now()
        while not watch.ended:
            silent_s = now() - max(began, self._answered_at)
            if silent_s >= PATIENCE_S:
                raise DatabaseUnavailable("the database does not answer")
            page = self._wanted.setdefault(key, WantedPage())
            page.watches.add(watch)
            self._wake.set()
            try:
                await asyncio.wait({page.taken}, timeout=PATIENCE_S - silent_s)
            finally:
                if not page.taken.done():
                    page.watches.discard(watch)
            if page.taken.done() and page.taken.result():
                return

    async def run(self) -> None:
        """Read what is wanted and what changes, until cancelled."""
        backoff, now = Backoff(0.05, 1.0), asyncio.get_running_loop().time
        while True:
            self._wake.clear()
            try:
                await self.run_once()
                backoff.reset()
            except UNAVAILABLE as error:
                log.warning("rows are not read for watchers", error=error)
                await asyncio.sleep(backoff.next_s())
            if not self._wanted:
                await wait_set(self._wake, max(self._due - now(), 0) if self._announced else MARKS_EVERY_S)

    async def run_once(self) -> None:
        """Read one page, and the changed rows if that was not done a moment ago."""
        now = asyncio.get_running_loop().time
        if self._wanted:
            await self._read_page()
        if self._announced and now() >= self._due:
            self._announced = False
            await self._read_changed()
            self._due = now() + PAUSE_S + len(self._watches) * PAUSE_EACH_S

    async def _read_page(self) -> None:
        key = next(iter(self._wanted))
        page = self._wanted.pop(key)  # who comes now may have missed what this read does not see
        try:
            if not page.watches:
                return
            async with self._connection() as connection:
                rows, marks = await read_page(connection, key)
            self._answered_at = asyncio.get_running_loop().time()
            for watch in page.watches:
                watch.take_page(rows, marks)
            page.end(True)
        except UNAVAILABLE:
            raise
        except Exception as error:  # a bug that this page meets is not everybody's
            page.taken.set_exception(error)
        finally:
            page.end(False)

    async def _read_changed(self) -> None:
        """The rows that have changed, once for all watchers."""
        changed, self._changed = self._changed, set()
        if not self._watches:
            return
        heard = self._heard
        try:
            async with self._connection() as connection:
                rows, marks = await read_rows(connection, changed)
        except UNAVAILABLE:
            for watch in self._watches:
                watch.start_over()
            raise
        self._answered_at = asyncio.get_running_loop().time()
        # A read may see changes that are not heard of yet. Its marks would promise them, so they come later.
        valid = next((m for m in (marks, self._early_marks) if m and m.announced_count <= heard), None)
        if valid is not marks and (valid or not self._early_marks):
            self._early_marks = marks
        for watch in self._watches:
            watch.offer(rows, valid)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        """One that is given up when the server is frozen: nobody else reads."""
        async with self._pool.connection() as connection:
            with patience(connection, PATIENCE_S):
                yield connection

    @contextmanager
    def _admitted(self, watch: Watch) -> Iterator[Watch]:
        if self._draining:
            raise ShuttingDown("this server is shutting down; watch another one")
        if len(self._watches) >= WATCHERS_MAX:
            raise Overloaded(f"{WATCHERS_MAX} watchers are here already")
        self._watches.add(watch)
        try:
            yield watch
        finally:
            self._watches.discard(watch)


def _later(one: Marks, other: Marks) -> Marks:
    return one if one.announced_count > other.announced_count else other


async def read_page(connection: Connection, key: PageKey) -> tuple[list[DailySales], Marks]:
    """The next rows that match, and the marks of the same snapshot."""
    return await _ask(
        connection,
        """
        SELECT applied_at, complete_through_at, quarantined_count, furthest_behind, announced_count, sales.*
        FROM freshness LEFT JOIN LATERAL (
            SELECT day, branch_id, revenue_sum::text, items_sum, purchases_count, purchases_with_customer_count
            FROM daily_sales_by_branch
            WHERE day BETWEEN %(after_day)s AND %(last)s AND (day, branch_id) > (%(after_day)s, %(after_branch_id)s)
                AND (branch_id = ANY (%(branch_ids)s::int[]) OR %(branch_ids)s::int[] = '{}')
            ORDER BY day, branch_id
            LIMIT %(limit)s
        ) AS sales ON true
        """,
        {
            "after_day": key.after[0],
            "after_branch_id": key.after[1],
            "last": key.days.last,
            "branch_ids": list(key.branch_ids),
            "limit": PAGE_ROWS,
        },
    )


async def read_rows(connection: Connection, rows: Iterable[Row]) -> tuple[list[DailySales], Marks]:
    """These rows, with zeros when a repair has taken them away, and the marks of the same snapshot."""
    ordered = sorted(rows)
    return await _ask(
        connection,
        """
        SELECT applied_at, complete_through_at, quarantined_count, furthest_behind, announced_count, day, branch_id,
            coalesce(revenue_sum, 0.00)::text, coalesce(items_sum, 0), coalesce(purchases_count, 0),
            coalesce(purchases_with_customer_count, 0)
        FROM freshness LEFT JOIN (
            unnest(%(days)s::date[], %(branch_ids)s::int[]) AS changed (day, branch_id)
            LEFT JOIN daily_sales_by_branch USING (day, branch_id)
        ) ON true
        """,
        {"days": [day for day, _ in ordered], "branch_ids": [branch_id for _, branch_id in ordered]},
    )


async def _ask(connection: Connection, question: str, parameters: dict[str, object]) -> tuple[list[DailySales], Marks]:
    rows = await (await connection.execute(question, parameters)).fetchall()
    *freshness, announced_count = rows[0][:5]
    return [DailySales(*row[5:]) for row in rows if row[5] is not None], Marks(announced_count, Freshness(*freshness))
