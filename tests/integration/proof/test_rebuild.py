"""Rebuilds: the read models made equal to what was recorded, at rest and under load, whatever was wrong with them."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import date, timedelta
from typing import Any

import psycopg
import pytest

from analytics_svc.errors import HistoryDropped, PurchaseExists, RebuildRunning
from analytics_svc.ingest import event_log
from analytics_svc.proof import rebuild
from analytics_svc.proof.verdicts import Verdict
from analytics_svc.purchase import PurchaseCreated
from analytics_svc.upstream.source import Recorded, Source
from chassis import postgres
from tests.conftest import ROOT, eventually
from tests.integration.auditing import sweep
from tests.integration.chain import DAYS, FIRST, TABLES, Chain, enough, load
from tests.integration.purchase_events import query, read_models

ONE_DAY = timedelta(days=1)


async def test_rebuild_of_everything_after_a_loss(chain: Chain) -> None:
    """Read models that are gone come back as they were, with the log; again, nothing is wrong any more."""
    await chain.sell(120, seed=1)
    await chain.apply(await chain.recorded())
    before, log = read_models(chain.url), chain.ids()
    query(chain.url, f"TRUNCATE {TABLES}")
    rebuilt = await rebuild.rebuild_all(chain.url, chain.source, FIRST)
    assert (rebuilt.purchases, rebuilt.added) == (120, 120)
    assert (read_models(chain.url), chain.ids()) == (before, log)
    again = await rebuild.rebuild_all(chain.url, chain.source, FIRST)
    assert (again.added, again.repaired.total()) == (0, 0)
    assert again.foreign == []
    await chain.apply(await chain.recorded())  # delivered again
    assert read_models(chain.url) == before


@pytest.mark.parametrize("scope", ["everything", "day"])
async def test_rebuild_under_load_equals_a_rebuild_at_rest(chain: Chain, scope: str) -> None:
    """What is counted while a rebuild runs, is in its result: row by row as if everything had stood still."""
    await chain.sell(150, seed=5)
    await chain.apply((await chain.recorded())[::2])
    query(chain.url, "UPDATE product_sales_daily SET qty_sum = qty_sum + 1")
    query(chain.url, "UPDATE customer_loyalty SET purchases_count = purchases_count + 2 WHERE branch_id = 2")
    async with load(chain, seed=1_000) as sold:
        await eventually(lambda: enough(sold, 20), "sales go on")
        if scope == "everything":
            await rebuild.rebuild_all(chain.url, chain.source, FIRST)
        else:
            await sweep(chain)  # beyond the day, a rebuild of it repairs what the audit knows to be wrong
            for number in range(3):
                await rebuild.rebuild_day(chain.url, chain.source, FIRST + timedelta(days=number))
        while_running = sold[0]
    assert while_running > 20
    under_load, log = read_models(chain.url), chain.ids()
    query(chain.url, f"TRUNCATE {TABLES}")
    await rebuild.rebuild_all(chain.url, chain.source, FIRST)
    assert (read_models(chain.url), chain.ids()) == (under_load, log)


class Meanwhile:
    """A source beside which something happens: right after its n-th answer about the sums."""

    def __init__(self, source: Source, number: int, happen: Callable[[], Awaitable[None]]) -> None:
        self._source, self._left, self._happen = source, number, happen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    async def control_totals(self, first: date, last: date) -> Recorded:
        recorded = await self._source.control_totals(first, last)
        self._left -= 1
        if self._left == 0:
            await self._happen()
        return recorded


@pytest.mark.parametrize("scope", ["everything", "day"])
async def test_a_sale_on_a_new_day_while_a_rebuild_begins(chain: Chain, scope: str) -> None:
    """At midnight, or after the very first sale, a day begins that the rebuild did not know of when it asked."""
    await chain.sell(60, seed=21, days=2)
    await chain.apply(await chain.recorded())
    query(chain.url, "UPDATE customer_loyalty SET purchases_count = purchases_count + 2")

    async def new_day() -> None:
        await chain.sell(60, seed=22, days=4)
        await chain.apply(await chain.recorded())

    source: Any = Meanwhile(chain.source, 1, new_day)
    if scope == "everything":
        rebuilt = await rebuild.rebuild_all(chain.url, source, FIRST)
        assert rebuilt.foreign == []
    else:
        await sweep(chain)
        await rebuild.rebuild_day(chain.url, source, FIRST)
    result, log = read_models(chain.url), chain.ids()
    query(chain.url, f"TRUNCATE {TABLES}")
    await chain.apply(await chain.recorded())
    assert (read_models(chain.url), chain.ids()) == (result, log)


class Blind:
    """A source whose exports lack one purchase, as if a day began later there than here."""

    def __init__(self, source: Source, event_id: str) -> None:
        self._source, self._event_id = source, event_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    async def export(self, *days: Any) -> AsyncIterator[list[PurchaseCreated]]:
        async for chunk in self._source.export(*days):
            yield [event for event in chunk if event.event_id != self._event_id]


@pytest.mark.parametrize("scope", ["everything", "day"])
async def test_a_repair_takes_out_nothing_that_is_recorded(chain: Chain, scope: str) -> None:
    """What GetPurchase finds is not taken out, whatever the export says; a stranger's event that names it is."""
    await chain.sell(30, seed=25)
    recorded = await chain.recorded()
    await chain.apply(recorded)
    before, log = read_models(chain.url), chain.ids()
    first = next(event for event in recorded if event.day == FIRST and not event.customer_id)
    work: Any = rebuild.rebuild_all if scope == "everything" else rebuild.rebuild_day
    with pytest.raises(PurchaseExists, match=first.event_id):
        await work(chain.url, Blind(chain.source, first.event_id), FIRST)
    assert (read_models(chain.url), chain.ids()) == (before, log)
    strange = first._replace(event_id="019ca8d7-2d00-73e5-9c29-281a86949936")
    await chain.apply([strange])
    rebuilt = await work(chain.url, chain.source, FIRST)
    assert rebuilt.foreign == [strange.event_id]
    assert read_models(chain.url) == before


@pytest.mark.parametrize("scope", ["everything", "day"])
async def test_sales_that_count_on_the_day_before(chain: Chain, scope: str) -> None:
    """By the log of all days: each is put back on its own, and counts all the while."""
    await chain.sell(30, seed=26)
    await chain.apply(await chain.recorded())
    right, log = read_models(chain.url), chain.ids()
    query(chain.url, "UPDATE analytics_event_log SET day = day - 1")
    work: Any = rebuild.rebuild_all if scope == "everything" else rebuild.rebuild_day
    await work(chain.url, chain.source, FIRST)
    assert (read_models(chain.url), chain.ids()) == (right, log)


@pytest.mark.parametrize("scope", ["everything", "day"])
@pytest.mark.parametrize("rows", ["right", "swapped"])
async def test_days_whose_sales_are_swapped(chain: Chain, scope: str, rows: str) -> None:
    """Sales of each of three days count on the next, and those of the last on the first: each comes home."""
    await chain.sell(60, seed=27)
    recorded = await chain.recorded()
    moved = [event._replace(day=FIRST + (event.day - FIRST + ONE_DAY) % (DAYS * ONE_DAY)) for event in recorded[::2]]
    await chain.apply(recorded)
    right, log = read_models(chain.url), chain.ids()
    if rows == "swapped":
        query(chain.url, f"TRUNCATE {TABLES}")
        await chain.apply([*recorded[1::2], *moved])
    else:
        for event in moved:
            query(chain.url, f"UPDATE analytics_event_log SET day = '{event.day}' WHERE event_id = '{event.event_id}'")
    assert chain.ids() != log
    work: Any = rebuild.rebuild_all if scope == "everything" else rebuild.rebuild_day
    rebuilt = await work(chain.url, chain.source, FIRST)
    assert (rebuilt.added, len(rebuilt.foreign)) == (0, 0)
    assert (read_models(chain.url), chain.ids()) == (right, log)
    assert (await sweep(chain)).verdict is Verdict.AGREED


@pytest.mark.parametrize("scope", ["everything", "day"])
async def test_the_retention_drops_what_is_being_rebuilt(chain: Chain, purchases_db: str, scope: str) -> None:
    """An export that may have missed what was dropped under its hands is not made the truth."""
    await chain.sell(60, seed=23)
    await chain.apply(await chain.recorded())
    before = read_models(chain.url)

    async def drop() -> None:
        query(purchases_db, "UPDATE chain_settings SET dropped_before = '2026-03-02'")
        query(purchases_db, "DELETE FROM purchase_items WHERE purchase_time < '2026-03-02Z'")
        query(purchases_db, "DELETE FROM purchases WHERE purchase_time < '2026-03-02Z'")

    source: Any = Meanwhile(chain.source, 1, drop)
    work: Any = rebuild.rebuild_all if scope == "everything" else rebuild.rebuild_day
    with pytest.raises(HistoryDropped, match="2026-03-02"):
        await work(chain.url, source, FIRST)
    assert read_models(chain.url) == before


async def test_two_at_once_are_refused(chain: Chain) -> None:
    """While one repairs, another is refused and changes nothing; when it is gone, the next one works."""
    await chain.sell(20, seed=11)
    await chain.apply(await chain.recorded())
    query(chain.url, "UPDATE sales_totals SET items_sum = items_sum + 1")
    async with await psycopg.AsyncConnection.connect(chain.url) as other:
        await other.execute("SELECT pg_advisory_lock(%s)", [rebuild.ONE_REPAIR_LOCK])
        with pytest.raises(RebuildRunning):
            await rebuild.rebuild_all(chain.url, chain.source, FIRST)
        with pytest.raises(RebuildRunning):
            await rebuild.rebuild_day(chain.url, chain.source, FIRST)
    rebuilt = await rebuild.rebuild_day(chain.url, chain.source, FIRST)
    assert rebuilt.repaired["sales_totals"] == len(query(chain.url, "SELECT 1 FROM sales_totals"))


async def test_what_was_dropped_is_not_rebuilt(chain: Chain, purchases_db: str) -> None:
    """Days before the retention's horizon stay as they are; all else is repaired, customers' rows, too."""
    await chain.sell(90, seed=12)
    await chain.apply(await chain.recorded())
    before = read_models(chain.url)
    query(purchases_db, "UPDATE chain_settings SET dropped_before = '2026-03-02'")
    with pytest.raises(HistoryDropped, match="2026-03-01 cannot be rebuilt"):
        await rebuild.rebuild_day(chain.url, chain.source, FIRST)
    query(purchases_db, "DELETE FROM purchase_items WHERE purchase_time < '2026-03-02Z'")
    query(purchases_db, "DELETE FROM purchases WHERE purchase_time < '2026-03-02Z'")
    query(chain.url, "UPDATE product_sales_daily SET qty_sum = 1000 WHERE day > '2026-03-01'")
    query(chain.url, "UPDATE sales_totals SET items_sum = items_sum + 1")
    query(chain.url, "UPDATE customer_loyalty SET purchases_count = purchases_count + 1")
    query(chain.url, "DELETE FROM customer_loyalty_chain")
    rebuilt = await rebuild.rebuild_all(chain.url, chain.source, FIRST)
    assert rebuilt.complete_from == FIRST + timedelta(days=1)
    assert rebuilt.foreign == []  # the log has events of days that were dropped: they are not foreign
    assert read_models(chain.url) == before


def start_rebuild(
    chain: Chain, purchases_address: str, processes: list[subprocess.Popen[bytes]]
) -> subprocess.Popen[bytes]:
    """The command, in a process of its own."""
    environ = {**os.environ, "ANALYTICS_DATABASE_URL": chain.url, "PURCHASES_TARGET": purchases_address}
    command = [sys.executable, "-m", "analytics_svc", "rebuild"]
    processes.append(subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return processes[-1]


KILLS = 6


async def test_kill_9_in_the_middle_leaves_nothing_behind(
    chain: Chain, purchases_address: str, processes: list[subprocess.Popen[bytes]]
) -> None:
    """A rebuild that dies, whenever, has made nothing worse, holds up nobody and does not prevent the next one."""
    await chain.sell(400, seed=13)
    await chain.apply(await chain.recorded())
    right = read_models(chain.url)
    query(chain.url, "UPDATE daily_sales_of_chain SET items_sum = 7")
    wrong = read_models(chain.url)

    async def rebuilding() -> bool:
        if processes[-1].poll() is not None:
            pytest.fail(str(processes[-1].communicate()))
        return bool(query(chain.url, "SELECT 1 FROM pg_stat_activity WHERE application_name = 'analytics rebuild'"))

    chance = random.Random(14)
    for _ in range(KILLS):
        process = start_rebuild(chain, purchases_address, processes)
        await eventually(rebuilding, "a rebuild is under way")
        await asyncio.sleep(chance.uniform(0, 0.4))
        process.kill()
        process.wait()
        await chain.apply(await chain.recorded())  # not held up; and nothing of it counts twice
        for name, rows in read_models(chain.url).items():
            assert rows.keys() == right[name].keys()
            assert all(row in (wrong[name][key], right[name][key]) for key, row in rows.items())
    process = start_rebuild(chain, purchases_address, processes)
    output, errors = await asyncio.to_thread(process.communicate)
    assert process.returncode == 0, errors
    assert b"400 purchases were read" in output
    assert read_models(chain.url) == right


async def test_read_models_that_are_gone_while_the_log_is_not(chain: Chain) -> None:
    """All of them, or only what sums up others: nothing is counted twice, and everything is there again."""
    await chain.sell(90, seed=15)
    await chain.apply(await chain.recorded())
    right = read_models(chain.url)
    models = TABLES.replace(", analytics_event_log", "")
    for lost in (models, "daily_sales_by_branch, product_sales_daily", "sales_totals, product_sales_totals"):
        query(chain.url, f"TRUNCATE {lost}")
        rebuilt = await rebuild.rebuild_all(chain.url, chain.source, FIRST)
        assert rebuilt.added == 0
        assert read_models(chain.url) == right


async def test_a_repair_of_a_right_day_keeps_no_apply_waiting(chain: Chain) -> None:
    """It looks, with the production limits, and takes the lock that keeps applies away only for what is wrong."""
    await chain.sell(90, seed=16)
    await chain.apply(await chain.recorded())
    async with await psycopg.AsyncConnection.connect(chain.url) as applying:
        await event_log.enter(applying)  # and stays in there, so that nobody could be alone
        assert (await asyncio.wait_for(rebuild.rebuild_day(chain.url, chain.source, FIRST), 30)).right
        query(chain.url, "UPDATE sales_totals SET items_sum = items_sum + 1 WHERE branch_id = 0")
        repairing = asyncio.create_task(rebuild.rebuild_day(chain.url, chain.source, FIRST))
        waits = "SELECT 1 FROM pg_locks WHERE relation = 'apply_lock'::regclass AND NOT granted"

        async def waiting() -> bool:
            return bool(query(chain.url, waits))

        await eventually(waiting, "a repair waits for its turn")
        await applying.rollback()
        assert (await repairing).repaired == {"sales_totals": 1}


async def test_conflicts_without_end_end_a_rebuild(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting what is missing tries again for a while, with pauses; then it says why it cannot."""
    monkeypatch.setattr(rebuild, "CONFLICTS_PATIENCE_S", 0.3)
    await chain.sell(5, seed=12)
    missing = await chain.recorded()
    with psycopg.connect(chain.url) as connection:
        connection.execute("LOCK TABLE daily_sales_by_branch IN SHARE MODE")
        async with postgres.open_pool(
            chain.url,
            role="analytics_consumer",
            application_name="test",
            size=1,
            statement_timeout_s=30,
            settings={"lock_timeout": "10ms"},
        ) as impatient:
            with pytest.raises(psycopg.errors.LockNotAvailable):
                await asyncio.wait_for(rebuild._count_missing(impatient, missing), 10)
            connection.rollback()
            assert await rebuild._count_missing(impatient, missing) == 5


@pytest.mark.timeout(300)
@pytest.mark.parametrize("work", ["mending", "counting"])
async def test_a_frozen_rebuild_stops_counting_for_seconds(
    chain: Chain, purchases_address: str, processes: list[subprocess.Popen[bytes]], work: str
) -> None:
    """Stopped with the locks in hand: the server takes them from it, and what it had not done is done by the next."""
    await chain.sell(40, seed=17)
    recorded = await chain.recorded()
    await chain.apply(recorded if work == "mending" else recorded[:20])
    if work == "mending":
        query(chain.url, "UPDATE sales_totals SET items_sum = items_sum + 1")
    waits = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'analytics rebuild' AND wait_event_type = 'Lock'"

    async def waiting() -> bool:
        return bool(query(chain.url, waits))

    with psycopg.connect(chain.url) as holder:
        holder.execute("SELECT FROM sales_totals FOR UPDATE")
        frozen = start_rebuild(chain, purchases_address, processes)
        await eventually(waiting, "the rebuild waits, with the apply lock in hand")
        frozen.send_signal(signal.SIGSTOP)
    try:
        await chain.sell(10, seed=18)
        await chain.apply(await chain.recorded())
    finally:
        frozen.send_signal(signal.SIGCONT)
        frozen.kill()
    await rebuild.rebuild_all(chain.url, chain.source, FIRST)
    result, log = read_models(chain.url), chain.ids()
    query(chain.url, f"TRUNCATE {TABLES}")
    await chain.apply(await chain.recorded())
    assert (read_models(chain.url), chain.ids()) == (result, log)
