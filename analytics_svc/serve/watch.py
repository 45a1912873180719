"""Watching daily sales: every row that matches first, then each row that changes, in its latest state.

Reads follow one another (`Watchers._reading`), and a watcher gets their rows in that order, so no row ever goes back in
time. A changed row is read once for all watchers. What a slow watcher has not been sent yet is overwritten by what is
newer, so its memory is bounded; beyond that bound, it is forgotten and read again.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import date
from typing import NamedTuple, TypeVar

import structlog

from analytics_svc.ingest.announce import EVERYTHING, Announcement, Row
from analytics_svc.serve.queries import Days, Freshness
from chassis.errors import DatabaseUnavailable, Overloaded, ShuttingDown
from chassis.lifecycle import Backoff, wait_set
from chassis.postgres import POOL_WAIT_S, UNAVAILABLE, Connection, Pool

WATCHERS_MAX = 200  # at once: each gets a message per round of reading
PAUSE_S = 0.1  # between rounds; rows that change more often are sent in their latest state
PASS_EVERY_S = 1.0  # a watcher's rows are all read again at most so often
MARKS_EVERY_S = 1.0  # a watcher whose rows do not change still learns how fresh they are
PAGE_ROWS = 1_000
PENDING_ROWS_MAX = 5_000  # kept for a watcher; a message of so many has about 300 KB
CHANGED_ROWS_MAX = 10_000  # heard of and not read yet
PATIENCE_S = 10.0  # for the database, and for those who read before: a restart of it takes seconds
LAST_WAIT_S = 0.1  # at least, for a connection, however little patience is left

log = structlog.get_logger()
T = TypeVar("T")


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


NO_MARKS = Marks(-1, Freshness(None, None, 0))


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


class Watchers:
    """All watchers of this server, and the one who reads for them."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._watches: set[Watch] = set()
        self._changed: set[Row] = set()
        self._heard = 0  # number of the last announcement whose rows are in `_changed`, or were
        self._early_marks: Marks | None = None  # of a read that saw more than was heard of by then
        self._news = asyncio.Event()
        self._reading = asyncio.Lock()
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
        self._news.set()

    def drain(self) -> None:
        """Send everybody to another server."""
        self._draining = True
        for watch in self._watches:
            watch.ended = True
            watch.ready.set()

    async def watch(self, days: Days, branch_ids: Iterable[int]) -> AsyncGenerator[Update, None]:
        """Updates without end.

        Raises:
            Overloaded, ShuttingDown, DatabaseUnavailable
        """
        with self._admitted(Watch(days, branch_ids)) as watch:
            while not watch.ended:
                if watch.begin_pass():
                    async with self._turn() as until:
                        watch.take_page(*await self._read(lambda connection: read_page(connection, watch), until))
                else:
                    await wait_set(watch.ready, MARKS_EVERY_S)
                    watch.ready.clear()
                if update := watch.next_update():
                    yield update
            raise ShuttingDown("this server is shutting down; watch another one")

    async def run(self) -> None:
        """Read what changes, until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self.run_once()
            except (*UNAVAILABLE, DatabaseUnavailable) as error:
                log.warning("changed rows are not read", error=error)
                for watch in self._watches:
                    watch.start_over()
            await asyncio.sleep(PAUSE_S)

    async def run_once(self) -> None:
        """Read the rows that have changed, once for all watchers."""
        if not self._watches:
            self._changed.clear()
            return
        async with self._turn() as until:
            changed, self._changed = self._changed, set()
            heard = self._heard
            rows, marks = await self._read(lambda connection: read_rows(connection, changed), until)
            # A read may see changes that are not heard of yet. Its marks would promise them, so they come later.
            valid = next((m for m in (marks, self._early_marks) if m and m.announced_count <= heard), None)
            if valid is not marks and (valid or not self._early_marks):
                self._early_marks = marks
            for watch in self._watches:
                watch.offer(rows, valid)

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

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[float]:
        """The turn to read; yields until when to be patient. That includes the wait for the turn: nobody waits longer.

        Raises:
            DatabaseUnavailable: those before have got no answer all the while.
        """
        until = asyncio.get_running_loop().time() + PATIENCE_S
        try:
            async with asyncio.timeout_at(until):
                await self._reading.acquire()
        except TimeoutError:
            raise DatabaseUnavailable("the database does not answer") from None
        try:
            yield until
        finally:
            self._reading.release()

    async def _read(self, read: Callable[[Connection], Awaitable[T]], until: float) -> T:
        """Read, and try again until then when the database is not there: watchers outlive its restart."""
        backoff, now = Backoff(0.05, 1.0), asyncio.get_running_loop().time
        while True:
            try:
                async with self._pool.connection(min(POOL_WAIT_S, max(until - now(), LAST_WAIT_S))) as connection:
                    return await read(connection)
            except UNAVAILABLE:
                if now() > until:
                    raise
                await asyncio.sleep(backoff.next_s())


def _later(one: Marks, other: Marks) -> Marks:
    return one if one.announced_count > other.announced_count else other


async def read_page(connection: Connection, watch: Watch) -> tuple[list[DailySales], Marks]:
    """The next rows that match, and the marks of the same snapshot."""
    return await _ask(
        connection,
        """
        SELECT applied_at, complete_through_at, quarantined_count, announced_count, sales.*
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
            "after_day": watch.after[0],
            "after_branch_id": watch.after[1],
            "last": watch.days.last,
            "branch_ids": list(watch.branch_ids),
            "limit": PAGE_ROWS,
        },
    )


async def read_rows(connection: Connection, rows: Iterable[Row]) -> tuple[list[DailySales], Marks]:
    """These rows, with zeros when a repair has taken them away, and the marks of the same snapshot."""
    ordered = sorted(rows)
    return await _ask(
        connection,
        """
        SELECT applied_at, complete_through_at, quarantined_count, announced_count, day, branch_id,
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
    *freshness, announced_count = rows[0][:4]
    return [DailySales(*row[4:]) for row in rows if row[4] is not None], Marks(announced_count, Freshness(*freshness))
