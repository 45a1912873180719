"""Old months cost nobody anything who asks for what is new: counted in tables and indexes that PostgreSQL opens."""

import datetime
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest

from chassis.postgres import Connection, Pool
from purchases_svc import control_totals, pages, stored, windows
from purchases_svc.backlog import Backlog
from purchases_svc.commands import partitions as partitions_command
from purchases_svc.errors import MonthNotOpen
from purchases_svc.partitions import Partitions
from purchases_svc.sale import EARLIEST
from purchases_svc.settings import ServeSettings
from tests.conftest import pool, today
from tests.integration.purchases.test_create_purchase import make_recorder, stored_sale

SALES = 20
FEW, MANY = 14, 120  # months


def _make_months(url: str, first: int, last: int) -> None:
    month = today().replace(day=1)
    with psycopg.connect(url, autocommit=True) as connection:
        for number in range(last):
            if number >= first:
                connection.execute("SELECT ensure_purchases_month(%s)", [month])
            month = (month - datetime.timedelta(days=1)).replace(day=1)


async def _opened(connection: Connection, ask: Callable[[], Awaitable[Any]]) -> int:
    """How many tables and indexes a question opens."""
    async with connection.transaction():
        await ask()
        locks = "SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'relation'"
        ((count,),) = await (await connection.execute(locks)).fetchall()
    return int(count)


async def test_questions_about_now_do_not_open_old_months(purchases_db: str) -> None:
    day = today()

    async def opened() -> dict[str, int]:
        async with pool(purchases_db, "purchases_service", size=1) as reading, reading.connection() as connection:

            def page(**asked: Any) -> Awaitable[Any]:
                nothing = dict.fromkeys(("before", "branch_id", "customer_id", "start", "end"))
                return pages.page(connection, limit=SALES - 1, **{**nothing, **asked})

            def totals() -> Awaitable[Any]:
                return control_totals.control_totals(
                    connection, first=day, last=day, branch_ids=[], after=None, limit=10
                )

            return {
                "newest": await _opened(connection, page),
                "of a branch": await _opened(connection, lambda: page(branch_id=1)),
                "control totals": await _opened(connection, totals),
                "next day": await _opened(connection, lambda: control_totals.next_day(connection, day, day)),
            }

    async with pool(purchases_db, "purchases_service") as writing:
        recorder = make_recorder(writing, Partitions(writing), backlog=Backlog(writing, 0))
        now = datetime.datetime.now(datetime.UTC)
        for _ in range(SALES):
            await recorder.record(stored_sale(purchase_time=now))
        await recorder.close()
    _make_months(purchases_db, 1, FEW)
    few = await opened()
    _make_months(purchases_db, FEW, MANY)
    assert await opened() == few


async def test_month_long_ago_is_opened_by_an_operator(purchases_db: str) -> None:
    """A flat battery says 2000-01-01: the till is told so, and no month is made."""
    old = stored_sale(purchase_time=EARLIEST + datetime.timedelta(days=40))
    battery = stored_sale(purchase_time=EARLIEST)
    async with pool(purchases_db, "purchases_service") as opened:
        recorder = make_recorder(opened, Partitions(opened), backlog_months=15)
        refused = await recorder.record_all(
            [battery, old, stored_sale(purchase_time=datetime.datetime.now(datetime.UTC))]
        )
        assert [type(outcome).__name__ for outcome in refused] == ["MonthNotOpen", "MonthNotOpen", "Recorded"]
        assert isinstance(refused[1], MonthNotOpen) and "partitions --open 2000-02" in refused[1].message
        assert EARLIEST.date().replace(month=2) not in await _months(opened)
    config = ServeSettings(purchases_db)
    await partitions_command.run(config, drop=False, opened=[EARLIEST.date().replace(month=2)])
    async with pool(purchases_db, "purchases_service") as opened:
        recorder = make_recorder(opened, Partitions(opened), backlog_months=15)
        assert not (await recorder.record(old)).replayed
        assert (await recorder.record(old)).replayed
        with pytest.raises(MonthNotOpen):
            await recorder.record(battery)
        await recorder.close()


async def _months(opened: Pool) -> set[datetime.date]:
    async with opened.connection() as connection:
        return await stored.months(connection)


def test_windows_cover_every_moment_once() -> None:
    first, end = (
        datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC),
        datetime.datetime(2026, 5, 4, 3, tzinfo=datetime.UTC),
    )
    parts = list(windows.back(first, end))
    assert parts[0][1] == end and parts[-1][0] == first
    assert all(later[0] == earlier[1] for later, earlier in itertools.pairwise(parts))
    assert len(parts) <= 6
    assert not list(windows.back(end, first))

    days = list(windows.ahead(first.date(), end.date()))
    assert days[0][0] == first.date() and days[-1][1] == end.date()
    assert all(before[1] == after[0] for before, after in itertools.pairwise(days))


async def test_page_goes_through_all_months(purchases_db: str) -> None:
    """What lies years back is found all the same, in order and once."""
    times = [datetime.datetime(year, 6, 1, 12, tzinfo=datetime.UTC) for year in (2003, 2011, 2019, 2024, 2026)]
    async with pool(purchases_db, "purchases_service") as opened:
        recorder = make_recorder(opened, Partitions(opened))
        for time in times:
            await recorder.record(stored_sale(purchase_time=time))
        await recorder.close()
        async with opened.connection() as connection:
            found: list[datetime.datetime] = []
            before, more = None, True
            while more:
                page, more = await pages.page(
                    connection, limit=2, before=before, branch_id=None, customer_id=None, start=None, end=None
                )
                found += [purchase.sale.purchase_time for purchase in page]
                before = (page[-1].sale.purchase_time, page[-1].purchase_id)
            assert found == times[::-1]
            assert await control_totals.stored_range(connection) == (times[0].date(), times[-1].date())
            assert (
                await control_totals.next_day(connection, times[0].date() + windows.DAY, times[-1].date())
                == times[1].date()
            )
