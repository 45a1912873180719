"""Sales that cannot go with the next flush by their time: they wait for their month, or are looked up."""

import asyncio
import datetime
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import psycopg
import structlog

from chassis.errors import TransactionConflict
from purchases_svc import answers
from purchases_svc.entry import Entry
from purchases_svc.partitions import Partitions
from purchases_svc.retention import horizon
from purchases_svc.sale import EARLIEST, FUTURE_MAX
from purchases_svc.tasks import Tasks
from purchases_svc.waiting import Waiting
from purchases_svc.writing import Writing

log = structlog.get_logger()


class Limits(NamedTuple):
    """Of the times of sales, at some moment. Months that retention may drop, and their keys with them, take in no
    sales: one could come in twice.
    """

    earliest: datetime.datetime
    open_from: datetime.datetime  # from here on, a sale may make its month; before, it has to be there
    latest: datetime.datetime


class Months:
    def __init__(
        self,
        partitions: Partitions,
        writing: Writing,
        waiting: Waiting,
        tasks: Tasks,
        go_on: Callable[[Entry], None],
        *,
        backlog_months: int,
        retention_months: Callable[[], int],
    ) -> None:
        """`go_on` takes a sale whose month is there."""
        self._partitions, self._writing, self._waiting, self._tasks = partitions, writing, waiting, tasks
        self._go_on = go_on
        self._backlog_months, self._retention_months = backlog_months, retention_months
        self._looking_up = asyncio.Lock()

    def limits(self, now: datetime.datetime) -> Limits:
        earliest = max(EARLIEST, _start(horizon(self._retention_months(), now.date())))
        return Limits(earliest, _start(horizon(self._backlog_months, now.date())), now + FUTURE_MAX)

    def send(self, entries: Sequence[Entry], limits: Limits) -> None:
        """Take sales that cannot go with the next flush."""
        early: list[Entry] = []
        out_of_range: list[Entry] = []
        for entry in entries:
            time = entry.sale.purchase_time
            in_range = max(limits.earliest, limits.open_from) <= time <= limits.latest
            (early if in_range else out_of_range).append(entry)
        self.make(early)
        if out_of_range:
            self._tasks.start(self._look_up(out_of_range))

    def make(self, entries: Sequence[Entry]) -> None:
        """Have the months of sales made; each month by itself."""
        for _, month in groupby(sorted(entries, key=_month), key=_month):
            self._tasks.start(self._wait_for_partition(list(month)))

    async def _look_up(self, entries: Sequence[Entry], *, closed: bool = False) -> None:
        """Answer sales of a time that is not taken in; `closed`: their month is. One look-up at a time: clocks that are
        wrong are no hurry.
        """
        try:
            async with self._looking_up, self._writing.connection() as connection:
                now = datetime.datetime.now(datetime.UTC)
                limits = self.limits(now)
                outcomes = await answers.known_or_out_of_time(
                    connection,
                    [entry.sale for entry in entries],
                    now,
                    earliest=limits.earliest,
                    open_from=limits.open_from,
                    closed=closed,
                )
                await self._writing.confirm(connection)
        except Exception as error:
            self._waiting.fail(entries, error)
            return
        for entry, outcome in zip(entries, outcomes, strict=True):
            if outcome is not None:
                self._waiting.settle(entry, outcome)
        self.make([entry for entry in entries if not entry.settled])

    async def _wait_for_partition(self, entries: Sequence[Entry]) -> None:
        """Sales of one month: have its partition made, and then go with the others."""
        try:
            async with asyncio.timeout(self._writing.patience_s):
                await self._partitions.ensure(
                    {_month(entry) for entry in entries}, {entry.purchase.created_at.date() for entry in entries}
                )
        except TimeoutError:
            log.warning("a partition cannot be made: somebody holds what it needs", seconds=self._writing.patience_s)
            self._waiting.fail(entries, TransactionConflict("the month of this sale cannot be made now; try again"))
        except psycopg.errors.DatetimeFieldOverflow:  # closed, by a retention that this process does not know of
            await self._look_up(entries, closed=True)
        except Exception as error:
            log.warning("a partition could not be made", error=error)
            self._waiting.fail(entries, error)
        else:
            for entry in entries:
                entry.had_partition = True
                self._go_on(entry)


def _month(entry: Entry) -> datetime.date:
    return entry.sale.purchase_time.date().replace(day=1)


def _start(month: datetime.date | None) -> datetime.datetime:
    return datetime.datetime.combine(month or EARLIEST.date(), datetime.time(), datetime.UTC)
