"""WatchDailySales: every row that matches, then each that changes."""

import asyncio
from collections.abc import AsyncIterator
from datetime import date, timedelta
from typing import Any

import grpc
import psycopg
import pytest

from analytics_svc.commands.serve import serve
from analytics_svc.ingest.announce import EVERYTHING, announce
from analytics_svc.serve import server, watch
from analytics_svc.serve.queries import Days
from analytics_svc.settings import ServeSettings
from chassis import lifecycle, postgres
from chassis.errors import DatabaseUnavailable
from chassis.wire import EPOCH
from retail.analytics.v1 import analytics_service_pb2 as pb
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub
from tests.conftest import WAIT_S, pool
from tests.integration.conftest import free_address, running
from tests.integration.purchase_events import NOON, query, sold
from tests.integration.sales import refusal
from tests.integration.serve.test_analytics_queries import day_of, pb_date, record
from tests.integration.serve.test_consistency_tokens import END_LISTENER

FIRST = NOON.date()


@pytest.fixture
async def reports(analytics_db: str) -> AsyncIterator[Any]:
    """A client of a running server on an empty database."""
    config = ServeSettings(analytics_db, listen=free_address(), metrics_listen="127.0.0.1:0")
    async with running(lambda stop: serve(config, stop), config.listen) as channel:
        yield AnalyticsServiceStub(channel)


class Viewer:
    """What a client of the stream knows."""

    def __init__(self, reports: Any, **filters: Any) -> None:
        self.call = reports.WatchDailySales(pb.WatchDailySalesRequest(**filters))
        self.counts: dict[tuple[date, int], int] = {}
        self.updates: list[Any] = []

    async def read(self) -> Any:
        update = await asyncio.wait_for(self.call.read(), WAIT_S)
        self.updates.append(update)
        for row in update.daily_sales:
            assert row.revenue.value == f"{row.purchase_count}.00"  # every sale here is one of 1.00
            self.counts[day_of(row), row.branch_id] = row.purchase_count
        return update

    async def until(self, counts: dict[tuple[date, int], int]) -> None:
        while self.counts != counts:
            before = dict(self.counts)
            await self.read()
            assert all(self.counts[key] >= count for key, count in before.items())  # no row goes back


def sales(branch_id: int, count: int = 1, days: int = 0) -> list[Any]:
    return [sold("1.00", branch_id=branch_id, purchase_time=NOON + timedelta(days=days)) for _ in range(count)]


async def test_rows_and_their_changes(reports: Any, analytics_db: str) -> None:
    """All that match first; then changed ones only, those that match the filter only."""
    await record(analytics_db, [*sales(1), *sales(2, 2), *sales(2, 1, days=1)])
    everything = Viewer(reports)
    some = Viewer(reports, branch_ids=[2], last_date=pb_date(FIRST))
    second, third = FIRST + timedelta(days=1), FIRST + timedelta(days=2)
    await everything.until({(FIRST, 1): 1, (FIRST, 2): 2, (second, 2): 1})
    await some.until({(FIRST, 2): 2})
    await record(analytics_db, sales(2, 1, days=1))  # once this is heard, the announcement of the first ones was, too
    await everything.until({(FIRST, 1): 1, (FIRST, 2): 2, (second, 2): 2})
    await record(analytics_db, [*sales(1), *sales(1, 3, days=2)])
    await everything.until({(FIRST, 1): 2, (FIRST, 2): 2, (second, 2): 2, (third, 1): 3})
    assert len(everything.updates[-1].daily_sales) == 2
    await record(analytics_db, sales(2))
    await some.until({(FIRST, 2): 3})
    assert {len(update.daily_sales) for update in some.updates} <= {0, 1}  # 0: only the marks have changed


async def test_pages_of_rows_and_changes_beside_them(
    reports: Any, analytics_db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than one read takes, while they change: the viewer ends up with all of them as they are."""
    monkeypatch.setattr(watch, "PAGE_ROWS", 7)
    monkeypatch.setattr(watch, "PENDING_ROWS_MAX", 20)
    monkeypatch.setattr(watch, "PASS_EVERY_S", 0.1)
    keys = [(branch_id, days) for branch_id in range(1, 11) for days in range(10)]
    await record(analytics_db, [sale for branch_id, days in keys for sale in sales(branch_id, 1, days)])
    viewer = Viewer(reports)
    await viewer.read()
    assert len(viewer.counts) == 7
    assert not viewer.updates[0].HasField("data_as_of_time")  # not before all rows are sent
    for _ in range(5):
        await record(analytics_db, [sale for branch_id, days in keys for sale in sales(branch_id, 1, days)])
    await viewer.until({(FIRST + timedelta(days=days), branch_id): 6 for branch_id, days in keys})
    while not viewer.updates[-1].HasField("data_as_of_time"):
        await viewer.read()


async def test_a_database_that_is_away_is_told_to_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watchers read one after the other, but none waits for the patience of those before it."""
    monkeypatch.setattr(watch, "PATIENCE_S", 0.5)
    nowhere = "postgresql://nobody@127.0.0.1:9/none"
    async with postgres.open_pool(
        nowhere, role="analytics_server", application_name="test", size=1, statement_timeout_s=1
    ) as opened:
        watchers = watch.Watchers(opened)
        began = asyncio.get_running_loop().time()
        async with lifecycle.beside(watchers.run()):
            ends = await asyncio.gather(
                *(anext(watchers.watch(Days(FIRST, FIRST), [n])) for n in range(1, 81)), return_exceptions=True
            )
        assert asyncio.get_running_loop().time() - began < 20  # one after the other, forty
    assert all(isinstance(end, (*postgres.UNAVAILABLE, DatabaseUnavailable)) for end in ends)


async def test_waiting_for_others_is_not_the_databases_silence(
    reports: Any, analytics_db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred with filters of their own: the line is longer than the patience, and everybody gets their rows."""
    monkeypatch.setattr(watch, "PATIENCE_S", 2.0)
    read_page = watch.read_page

    async def slowly(*arguments: Any) -> Any:
        await asyncio.sleep(0.05)
        return await read_page(*arguments)

    monkeypatch.setattr(watch, "read_page", slowly)
    await record(analytics_db, [sale for branch_id in range(1, 101) for sale in sales(branch_id)])
    viewers = [Viewer(reports, branch_ids=[branch_id]) for branch_id in range(1, 101)]
    await asyncio.gather(*(viewer.read() for viewer in viewers))
    assert [viewer.counts for viewer in viewers] == [{(FIRST, branch_id): 1} for branch_id in range(1, 101)]


async def test_a_crowd_that_joins_at_once_gets_all_rows(reports: Any, analytics_db: str) -> None:
    """And then what changes."""
    await record(analytics_db, [sale for branch_id in range(1, 1_201) for sale in sales(branch_id)])
    whole = {(FIRST, branch_id): 1 for branch_id in range(1, 1_201)}
    viewers = [Viewer(reports) for _ in range(500)]
    await asyncio.gather(*(viewer.until(whole) for viewer in viewers))
    await record(analytics_db, sales(7))
    await asyncio.gather(*(viewer.until({**whole, (FIRST, 7): 2}) for viewer in viewers))


async def test_a_crowd_with_one_filter_shares_its_reads(analytics_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for the same page: two pages are read for five hundred watchers, of all or of some branches."""
    reads: list[watch.PageKey] = []
    read_page = watch.read_page

    async def counted(connection: Any, key: watch.PageKey) -> Any:
        reads.append(key)
        return await read_page(connection, key)

    monkeypatch.setattr(watch, "read_page", counted)
    await record(analytics_db, [sale for branch_id in range(1, 1_201) for sale in sales(branch_id)])
    async with pool(analytics_db, "analytics_server") as opened:
        watchers = watch.Watchers(opened)
        async with lifecycle.beside(watchers.run()):
            for branch_ids, pages in (((), 2), ((5, 6), 1), ((6, 5), 1)):
                reads.clear()
                crowd = [watchers.watch(Days(FIRST, FIRST), branch_ids) for _ in range(500)]
                rows = [await asyncio.gather(*map(anext, crowd)) for _ in range(pages)]
                assert {sum(len(update.rows) for update in each) for each in zip(*rows, strict=True)} == {
                    len(branch_ids) or 1_200
                }
                assert len(reads) <= 2 * pages
                await asyncio.gather(*(each.aclose() for each in crowd))


async def test_what_changes_often_is_sent_in_its_latest_state(
    reports: Any, analytics_db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred changes of a row are a few updates; so is a hundred changes of others none."""
    monkeypatch.setattr(watch, "PAUSE_S", 1.0)
    viewer, other = Viewer(reports, branch_ids=[1]), Viewer(reports, branch_ids=[2])
    await viewer.read()
    async with pool(analytics_db, "analytics_consumer"):
        for _ in range(20):
            await record(analytics_db, sales(1, 5))
    await viewer.until({(FIRST, 1): 100})
    assert len(viewer.updates) < 20
    await record(analytics_db, sales(2))
    await other.until({(FIRST, 2): 1})


async def test_marks_cover_what_was_sent(reports: Any, analytics_db: str) -> None:
    """A change of the marks alone is sent, too; a removed row is sent as zeros; a quarantined event is counted."""
    await record(analytics_db, sales(1))
    viewer = Viewer(reports)
    first = await viewer.read()
    assert first.HasField("data_as_of_time") and not first.HasField("complete_through_time")
    async with await psycopg.AsyncConnection.connect(analytics_db) as connection:
        await connection.execute("DELETE FROM daily_sales_by_branch")
        await connection.execute("UPDATE freshness SET complete_through_at = '1970-01-02Z', quarantined_count = 3")
        await announce(connection, {(FIRST, 1)}, counted=False)
    update = await viewer.read()
    while not update.HasField("complete_through_time"):
        update = await viewer.read()
    assert (update.complete_through_time.ToDatetime(EPOCH.tzinfo) - EPOCH, update.quarantined_count) == (
        timedelta(days=1),
        3,
    )
    assert viewer.counts == {(FIRST, 1): 0}


async def test_everything_is_sent_again_after_a_loss(
    reports: Any, analytics_db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the listener's connection was lost, or an announcement could not name its rows."""
    monkeypatch.setattr(watch, "PASS_EVERY_S", 0.1)
    await record(analytics_db, sales(1))
    viewer = Viewer(reports)
    await viewer.until({(FIRST, 1): 1})
    query(analytics_db, "UPDATE daily_sales_by_branch SET revenue_sum = 2, purchases_count = 2")  # nobody hears of it
    query(analytics_db, END_LISTENER)
    await viewer.until({(FIRST, 1): 2})
    query(analytics_db, "UPDATE daily_sales_by_branch SET revenue_sum = 3, purchases_count = 3")
    async with await psycopg.AsyncConnection.connect(analytics_db) as connection:
        await announce(connection, EVERYTHING, counted=False)
    await viewer.until({(FIRST, 1): 3})


async def test_too_many_watchers_are_refused(reports: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "WATCHERS_MAX", 2)
    viewers = [Viewer(reports) for _ in range(2)]
    for viewer in viewers:
        await viewer.read()
    found = await refusal(Viewer(reports).read())
    assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    viewers[0].call.cancel()
    third = Viewer(reports)
    while True:  # the server notices a moment later
        try:
            await third.read()
            break
        except grpc.aio.AioRpcError:
            third = Viewer(reports)


async def test_a_watcher_that_does_not_read_is_cut_off(analytics_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a status that says why; others are served all the while."""
    monkeypatch.setattr(server, "SLOW_WATCHER_S", 0.5)
    rows = [(branch_id, days) for branch_id in range(1, 2_001) for days in range(4)]
    await record(analytics_db, [sale for branch_id, days in rows for sale in sales(branch_id, 1, days)])
    small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
    config = ServeSettings(analytics_db, listen=free_address(), metrics_listen="127.0.0.1:0")
    async with (
        running(lambda stop: serve(config, stop), config.listen) as channel,
        grpc.aio.insecure_channel(config.listen, options=small_window) as slow_channel,
    ):
        slow: Any = AnalyticsServiceStub(slow_channel).WatchDailySales(pb.WatchDailySalesRequest())
        await slow.read()
        other = Viewer(AnalyticsServiceStub(channel), branch_ids=[5])
        await other.read()
        for count in (2, 3, 4):
            await record(analytics_db, sales(5))
            await other.until({(FIRST, 5): count, **{(FIRST + timedelta(days=n), 5): 1 for n in (1, 2, 3)}})
            await asyncio.sleep(0.3)  # the slow one's time, not ours

        async def read_to_the_end() -> None:
            while await slow.read() is not grpc.aio.EOF:
                pass

        found = await refusal(read_to_the_end())
    assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "WATCHER_TOO_SLOW")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.WatchDailySalesRequest(branch_ids=[0]), "branch_ids[0]"),
        (pb.WatchDailySalesRequest(first_date=pb_date(FIRST), last_date=pb_date(date(2026, 1, 1))), "last_date"),
    ],
)
async def test_wrong_filters(reports: Any, request_: Any, field: str) -> None:
    found = await refusal(reports.WatchDailySales(request_).read())
    assert (found.reason, found.fields) == ("INVALID_REQUEST", [field])
