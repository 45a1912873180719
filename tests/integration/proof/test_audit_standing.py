"""What the audit knows: it stays until it is proven otherwise, whoever looks, and tells how old it is."""

import asyncio
from datetime import UTC, datetime

import pytest

from analytics_svc.proof import audit_status, gauges, parts, rebuild
from analytics_svc.proof import auditor as auditor_module
from analytics_svc.proof.auditor import Auditor
from analytics_svc.proof.verdicts import Comparison, Row, Verdict
from analytics_svc.upstream.source import Totals
from chassis import lifecycle
from tests.conftest import eventually, pool
from tests.integration.auditing import FOUR_CELLS, auditor, status, sweep
from tests.integration.chain import FIRST, Chain
from tests.integration.purchase_events import query


async def test_what_was_found_stays_found(chain: Chain) -> None:
    """However often the audit looks elsewhere, in whatever process; until it is proven right."""
    await chain.sell(60, seed=7)
    await chain.apply(await chain.recorded())
    assert (await sweep(chain)).verdict is Verdict.AGREED
    query(chain.url, FOUR_CELLS.format("+", FIRST))
    found = await sweep(chain)
    assert {finding.key for finding in found.findings} >= {f"day {FIRST}, branch_id 1, product_id 1001"}
    worker = auditor(chain)
    async with pool(chain.url, "analytics_consumer", size=1) as opened, opened.connection() as connection:
        for number in range(12):
            if number % 4 == 0:
                worker = auditor(chain)
                await worker.compare(connection)
            await worker.prove(connection)
            assert (await status(chain)).verdict is Verdict.DIFFERENT
            assert "product_sales_daily" in {finding.table for finding in (await status(chain)).findings}
    query(chain.url, FOUR_CELLS.format("-", FIRST))
    assert (await sweep(chain)).verdict is Verdict.AGREED


async def test_no_alarm_is_left_behind(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process shows what is known by now, whoever has found it, and whoever has mended it."""
    monkeypatch.setattr(gauges, "EVERY_S", 0.1)
    await chain.sell(20, seed=22)
    await chain.apply(await chain.recorded())

    async def shows(wrong: int) -> bool:
        return gauges.WRONG_ROWS._value.get() == wrong and not gauges.STALE._value.get()

    async with lifecycle.beside(gauges.show(chain.pool)):
        for _ in range(2):
            query(chain.url, "UPDATE sales_totals SET items_sum = items_sum + 1 WHERE branch_id = 0")
            await sweep(chain)
            await eventually(lambda: shows(1), "the alarm is raised")
            await rebuild.rebuild_day(chain.url, chain.source, FIRST)
            await eventually(lambda: shows(0), "the alarm is over")


async def test_what_is_old_says_so(chain: Chain) -> None:
    """Nobody has looked, or not for long: that is told with whatever was found."""
    assert (await status(chain)).stale
    found = await sweep(chain)
    assert not found.stale
    assert found.oldest_at and found.compared_at
    query(chain.url, "UPDATE audit_status SET compared_at = compared_at - interval '16 minutes'")
    assert (await status(chain)).stale


async def test_pending_tells_since_when(chain: Chain) -> None:
    """What is on its way for longer and longer keeps the time at which that began."""
    await chain.sell(10, seed=16)
    recorded = await chain.recorded()
    await chain.apply(recorded[:-2])
    since = (await sweep(chain)).pending_since
    found = await sweep(chain)
    assert (found.verdict, found.pending, found.pending_since) == (Verdict.PENDING, 2, since)
    await chain.apply(recorded)
    assert (await sweep(chain)).pending_since is None


async def test_an_older_look_makes_nothing_good(chain: Chain) -> None:
    """What it did not see may have been found meanwhile; and a proof knows better than any look that began before."""
    day, totals = parts.of_day(FIRST), Totals(1, 0, 1, 100)
    waits = [Row(FIRST, 1, totals, Totals(), Verdict.PENDING)]
    wrong = Comparison([Row(FIRST, 1, totals, Totals(), Verdict.DIFFERENT)], [], [])
    right = Comparison([], [], [])
    async with chain.pool.connection() as connection:

        async def says() -> Verdict | None:
            return (await audit_status.read(connection)).verdict

        moments = [await parts.begin(connection) for _ in range(6)]
        await parts.store_sums(connection, FIRST, moments[1], waits)
        await parts.store(connection, day, moments[0], right)
        assert await says() is Verdict.PENDING
        await parts.store_sums(connection, FIRST, moments[0], [])
        assert await says() is Verdict.PENDING
        await parts.store(connection, day, moments[0], wrong)  # of what is worse, nothing is lost
        assert await says() is Verdict.DIFFERENT
        await parts.store(connection, day, moments[3], right)
        assert await says() is Verdict.AGREED
        for late in (
            parts.store_sums(connection, FIRST, moments[2], waits),
            parts.store(connection, day, moments[2], wrong),
        ):
            await late
            assert await says() is Verdict.AGREED
        await parts.store_sums(connection, FIRST, moments[4], waits)
        assert await says() is Verdict.PENDING
        await parts.store_sums(connection, FIRST, moments[5], [])
        assert await says() is Verdict.AGREED


async def test_that_nobody_audits_is_told_soon(chain: Chain) -> None:
    """While no process has the audit's lock for a minute, however long a look takes."""
    await sweep(chain)
    assert not (await status(chain)).stale
    query(chain.url, "UPDATE audit_status SET compared_at = now() - interval '2 minutes', compare_duration = '1 day'")
    assert (await status(chain)).stale
    async with pool(chain.url, "analytics_consumer", size=1) as opened, opened.connection() as connection:
        await connection.execute("SELECT pg_advisory_lock(%s)", [audit_status.AUDIT_LOCK])
        assert not (await status(chain)).stale
        await connection.close()
    assert (await status(chain)).stale


async def test_a_frozen_auditor_loses_its_turn(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing any more, and keeps its connection: another one takes over."""
    monkeypatch.setattr(auditor_module, "SILENCE_S", 1.0)
    monkeypatch.setattr(auditor_module, "STAY_EVERY_S", 3_600.0)
    async with pool(chain.url, "analytics_consumer", size=6) as opened:
        tasks = []
        try:
            for _ in range(2):
                tasks.append(asyncio.create_task(Auditor(opened, chain.source, pause_s=3_600).run()))
                query(chain.url, "UPDATE audit_status SET compared_at = NULL")
                await eventually(lambda: compared(chain), "one of them compares")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def compared(chain: Chain) -> bool:
    return (await status(chain)).compared_at is not None


async def test_one_process_audits(chain: Chain) -> None:
    """Of two that run, one works; when it ends, the other takes over, and knows what the first one found."""
    await chain.sell(10, seed=10)
    await chain.apply(await chain.recorded())
    query(chain.url, "UPDATE sales_totals SET items_sum = items_sum + 1")

    async def looked(since: datetime) -> bool:
        proven = f"SELECT max(tried_at) > '{since}' AND max(verdict) = 3 FROM audit_parts"
        compared = f"SELECT compared_at > '{since}' FROM audit_status"
        return query(chain.url, proven) == [(True,)] == query(chain.url, compared)

    async def holders() -> int:
        ((count,),) = query(
            chain.url,
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
            f" AND objid = {audit_status.AUDIT_LOCK & 0xFFFFFFFF}",
        )
        return int(count)

    async with pool(chain.url, "analytics_consumer", size=6) as opened:
        both = [Auditor(opened, chain.source, cpu_share=1, pause_s=0.1, complete_wait_s=0) for _ in range(2)]
        first, second = (asyncio.create_task(one.run()) for one in both)
        try:
            for task in (first, second):
                since = datetime.now(UTC)
                await eventually(lambda since=since: looked(since), "both works go on")  # type: ignore[misc]
                assert await holders() == 1
                task.cancel()
                await asyncio.wait({task})
        finally:
            second.cancel()
            await asyncio.wait({second})
