"""The one watch for all who look: what each branch sold on each of the last days, as it changes."""

import asyncio
import datetime

import grpc
import structlog
from prometheus_client import Gauge

from chassis import wire
from chassis.lifecycle import Backoff
from pages_svc.upstream.bell import Bell
from pages_svc.upstream.sales import Marks, Rows, date_of, marks_of, totals_of
from pages_svc.upstream.services import Problem, Services
from retail.analytics.v1 import analytics_service_pb2 as pb

DAYS = 70  # two months: what is shown most, and what it is compared with
FIRST_BACKOFF_S, MOST_BACKOFF_S = 0.2, 2.0

WATCHING = Gauge("pages_watching", "1 while the query server's changes are followed.")

log = structlog.get_logger()


class Watch:
    """`rows` are those of all branches from `first` on; both are None until all have come.

    `bell` rings whenever something here has changed, `row_changes` counts changes of rows.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self.rows: Rows | None = None
        self.first: datetime.date | None = None
        self.marks = Marks()
        self.problem: Problem | None = None  # why nothing is followed now
        self.row_changes = 0
        self.bell = Bell()

    async def run(self) -> None:
        """Follow for ever. A server ends each watch after half an hour; the next one begins with newer days."""
        backoff = Backoff(FIRST_BACKOFF_S, MOST_BACKOFF_S)
        while True:
            try:
                await self._follow(backoff)
            except grpc.aio.AioRpcError as error:
                problem = self._services.problem("analytics", error)
                if problem.reason != "SHUTTING_DOWN" and self.problem is None:
                    log.warning("the watch of daily sales is lost", problem=problem.text)
                self.problem = problem
            finally:
                WATCHING.set(0)
            self.bell.ring()
            await asyncio.sleep(backoff.next_s())

    async def _follow(self, backoff: Backoff) -> None:
        first = datetime.datetime.now(datetime.UTC).date() - datetime.timedelta(days=DAYS)
        request = pb.WatchDailySalesRequest(first_date=wire.date(first))
        rows: Rows = {}  # anew: what was taken away meanwhile is not told
        async for reply in self._services.analytics.WatchDailySales(request):
            rows |= {(date_of(row.sales_date), row.branch_id): totals_of(row) for row in reply.daily_sales}
            marks = marks_of(reply)
            if marks.data_as_of is None and marks.complete_through is None:
                continue  # not all rows have come yet
            if rows is not self.rows:
                self.rows, self.first, self.problem = rows, first, None
                self.row_changes += 1
                WATCHING.set(1)
                backoff.reset()
            elif reply.daily_sales:
                self.row_changes += 1
            self.marks = marks
            self.bell.ring()

    def between(self, first: datetime.date, last: datetime.date, branch_id: int | None) -> Rows | None:
        """The rows of these days; None when they are not all here."""
        if self.rows is None or self.first is None or first < self.first or self.problem is not None:
            return None
        return {
            (day, branch): totals
            for (day, branch), totals in self.rows.items()
            if first <= day <= last and (branch_id is None or branch == branch_id) and any(totals)
        }
