"""The audit: what is right is proven, what is wrong is found, named and repaired, in every table and under load."""

import asyncio
import os
import sys
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import grpc
import psycopg
import pytest

from analytics_svc.commands import audit as audit_command
from analytics_svc.ingest.apply import fold
from analytics_svc.proof import audit, audit_status, gauges, parts, rebuild
from analytics_svc.proof import auditor as auditor_module
from analytics_svc.proof.audit_server import AuditServicer
from analytics_svc.proof.auditor import Auditor
from analytics_svc.proof.day import FOREIGN_IDS_MAX, prove_day
from analytics_svc.proof.verdicts import Comparison, Row, Verdict
from analytics_svc.purchase import PurchaseCreated
from analytics_svc.upstream.source import CellSource, Source, Totals
from chassis import grpc_server, lifecycle, wire
from retail.analytics.v1 import audit_service_pb2 as pb
from retail.analytics.v1.audit_service_pb2_grpc import AuditServiceStub, add_AuditServiceServicer_to_server
from tests.conftest import eventually, pool
from tests.integration.chain import DAYS, FIRST, TABLES, UTC_ZONE, Chain, enough, load
from tests.integration.conftest import free_address
from tests.integration.ingest.test_apply import decoded
from tests.integration.purchase_events import query, read_models, sold
from tests.integration.sales import refusal

LAST = FIRST + timedelta(days=DAYS - 1)


async def compare(chain: Chain) -> Comparison:
    return await audit.compare(chain.pool, chain.source, FIRST, LAST, wait_s=0)


def complete(chain: Chain, at: str = "clock_timestamp()") -> None:
    """As the keeper does it: whatever was recorded before is counted or quarantined."""
    query(chain.url, f"UPDATE freshness SET complete_through_at = {at}")


class Kept:
    """A source as it is asked while the keeper keeps up."""

    def __init__(self, chain: Chain) -> None:
        self._chain, self.export = chain, chain.source.export
        self.recorded_day, self.recorded_days = chain.source.recorded_day, chain.source.recorded_days

    async def control_totals(self, first: date, last: date) -> Any:
        recorded = await self._chain.source.control_totals(first, last)
        complete(self._chain)
        return recorded


async def test_what_is_counted_agrees(chain: Chain) -> None:
    """All rows agree, by sums and by rows, and no read model contradicts another."""
    await chain.sell(80, seed=1)
    await chain.apply(await chain.recorded())
    compared = await compare(chain)
    assert compared.verdict is Verdict.AGREED
    assert sum(row.counted.purchases for row in compared.rows) == 80
    for day in (FIRST, LAST):
        proven = await prove_day(chain.pool, chain.source, day)
        assert (proven.comparison.verdict, proven.comparison.findings) == (Verdict.AGREED, [])
    assert (await sweep(chain)).verdict is Verdict.AGREED


async def test_purchases_on_their_way_are_pending(chain: Chain) -> None:
    """What is not counted yet is pending with its number, until it must have been; then it is lost and named."""
    await chain.sell(30, seed=2)
    recorded = await chain.recorded()
    await chain.apply(recorded[:-4])
    compared = await compare(chain)
    assert (compared.verdict, compared.pending) == (Verdict.PENDING, 4)
    compared = await audit.compare(chain.pool, Kept(chain), FIRST, LAST, wait_s=5)  # type: ignore[arg-type]
    assert compared.verdict is Verdict.DIFFERENT
    assert all("neither counted nor quarantined" in row.detail for row in compared.rows if row.detail)
    await chain.apply(recorded)
    assert (await compare(chain)).verdict is Verdict.AGREED


async def test_quarantined_purchases_are_accounted_for(chain: Chain) -> None:
    """A purchase in quarantine is neither lost nor counted; what is there besides changes nothing."""
    await chain.sell(20, seed=3)
    recorded = await chain.recorded()
    await chain.apply(recorded[:-1])
    insert = (
        "INSERT INTO quarantined_events (event_id, reason, detail, body, properties) VALUES ({}, 'X', '', '{}', '{{}}')"
    )
    for event_id, body in ((recorded[-1].event_id, "a"), (recorded[0].event_id, "b")):
        query(chain.url, insert.format(f"'{event_id}'", body))
    query(chain.url, insert.format("NULL", "c"))
    compared = await audit.compare(chain.pool, Kept(chain), FIRST, LAST, wait_s=5)  # type: ignore[arg-type]
    assert compared.verdict is Verdict.AGREED
    assert sum(row.counted.purchases for row in compared.rows) == 20


async def test_foreign_events_are_named(chain: Chain) -> None:
    """What others published is told apart from errors, by id; a rebuild takes it out, and it does not come back."""
    await chain.sell(20, seed=4)
    await chain.apply(await chain.recorded())
    foreign = [sold("1.00", branch_id=2), sold("5.00", branch_id=9, purchase_time=datetime(2026, 3, 2, 9, tzinfo=UTC))]
    await chain.apply(decoded(foreign))
    compared = await compare(chain)
    assert compared.verdict is Verdict.FOREIGN
    assert sorted(compared.foreign_ids) == sorted(sale.event_id for sale in foreign)
    assert {(row.day, row.branch_id) for row in compared.rows if row.verdict is Verdict.FOREIGN} == {
        (FIRST, 2),
        (date(2026, 3, 2), 9),
    }
    rebuilt = await rebuild.rebuild_day(chain.url, chain.source, FIRST)
    assert rebuilt.foreign == [foreign[0].event_id]
    assert (await compare(chain)).foreign_ids == [foreign[1].event_id]
    everything = await rebuild.rebuild_all(chain.url, chain.source, FIRST)
    assert everything.foreign == [foreign[1].event_id]
    await chain.apply(decoded(foreign))
    assert (await compare(chain)).verdict is Verdict.AGREED
    assert (await sweep(chain)).verdict is Verdict.AGREED


# Every column of every read model, and rows that are gone or should not be there.
CORRUPTIONS = {
    "daily_sales_by_branch": [
        "UPDATE {} SET revenue_sum = revenue_sum + 0.01 WHERE (day, branch_id) = ('2026-03-02', 2)",
        "UPDATE {} SET items_sum = items_sum - 1 WHERE (day, branch_id) = ('2026-03-02', 2)",
        "UPDATE {} SET purchases_count = purchases_count + 1 WHERE (day, branch_id) = ('2026-03-02', 2)",
        "UPDATE {} SET purchases_with_customer_count = 0 WHERE (day, branch_id) = ('2026-03-02', 2)",
        "DELETE FROM {} WHERE (day, branch_id) = ('2026-03-02', 2)",
        "UPDATE {} SET branch_id = 7 WHERE (day, branch_id) = ('2026-03-02', 2)",
    ],
    "daily_sales_of_chain": [
        "UPDATE {} SET revenue_sum = revenue_sum + 0.01 WHERE day = '2026-03-02'",
        "DELETE FROM {} WHERE day = '2026-03-02'",
    ],
    "monthly_sales_by_branch": [
        "UPDATE {} SET items_sum = items_sum + 1 WHERE branch_id = 0",
        "UPDATE {} SET purchases_with_customer_count = 1 WHERE branch_id = 3",
        "INSERT INTO {} VALUES (5, '2026-03-01', 1, 1, 1, 0)",
    ],
    "product_sales_daily": [
        "UPDATE {} SET qty_sum = qty_sum + 1 WHERE (day, branch_id, product_id) = ('2026-03-02', 2, 1001)",
        "UPDATE {} SET revenue_sum = 0 WHERE (day, branch_id, product_id) = ('2026-03-02', 2, 1001)",
        "UPDATE {} SET product_id = 77 WHERE (day, branch_id, product_id) = ('2026-03-02', 2, 1001)",
        "DELETE FROM {} WHERE (day, branch_id, product_id) = ('2026-03-02', 2, 1001)",
        # Two that make up for each other.
        "UPDATE {} SET qty_sum = qty_sum + CASE product_id WHEN 1001 THEN 1 ELSE -1 END"
        " WHERE (day, branch_id) = ('2026-03-02', 2) AND product_id IN (1001, 1002)",
    ],
    "product_sales_of_chain": [
        "DELETE FROM {}_notes",  # before a repair sums them up
        "UPDATE {}_sums SET qty_sum = qty_sum + 1 WHERE (period, product_id) = ('day', 1002)",
        "UPDATE {}_sums SET revenue_sum = 0 WHERE (period, product_id) = ('month', 1001)",
        "UPDATE {}_sums SET product_id = 77 WHERE (period, product_id) = ('all', 1003)",
        "DELETE FROM {}_sums WHERE product_id = 1003",
        "INSERT INTO {}_notes VALUES ('{{2026-03-02}}', '{{1002}}', '{{1}}', '{{100}}')",
    ],
    "product_sales_totals": [
        "UPDATE {} SET qty_sum = qty_sum + 1 WHERE (branch_id, product_id) = (2, 1001)",
        "UPDATE {} SET revenue_sum = revenue_sum + 1 WHERE (branch_id, product_id) = (1, 1002)",
        "DELETE FROM {} WHERE (branch_id, product_id) = (3, 1003)",
    ],
    "sales_totals": [
        "UPDATE {} SET revenue_sum = revenue_sum - 0.01 WHERE branch_id = 0",
        "UPDATE {} SET unique_customers_count = unique_customers_count - 1 WHERE branch_id = 1",
        "DELETE FROM {} WHERE branch_id = 2",
    ],
    "customer_loyalty": [
        "UPDATE {} SET purchases_count = 99 WHERE customer_id = %(customer)s AND branch_id = %(branch)s",
        "UPDATE {} SET last_purchase_at = '2026-02-01Z' WHERE customer_id = %(customer)s AND branch_id = %(branch)s",
        "UPDATE {} SET branch_id = 8 WHERE customer_id = %(customer)s AND branch_id = %(branch)s",
        "DELETE FROM {} WHERE customer_id = %(customer)s AND branch_id = %(branch)s",
    ],
    "customer_loyalty_chain": [
        "UPDATE {} SET purchases_count = purchases_count + 1 WHERE customer_id = %(customer)s",
        "UPDATE {} SET last_purchase_at = '2026-04-01Z' WHERE customer_id = %(customer)s",
        "DELETE FROM {} WHERE customer_id = %(customer)s",
    ],
}
NAMED_BY = {"daily_sales_by_branch": "daily_sales_of_chain"}


def auditor(chain: Chain, source: Any = None) -> Auditor:
    """With the production limits; the tests do not rest between its works."""
    return Auditor(chain.pool, source or chain.source, complete_wait_s=0.1)


async def sweep(chain: Chain, worker: Auditor | None = None) -> audit_status.Status:
    """Compare, then prove every part once at least; returns what the audit says."""
    worker = worker or auditor(chain)
    async with pool(chain.url, "analytics_consumer", size=1) as opened, opened.connection() as connection:
        await worker.compare(connection)
        began = await parts.begin(connection)
        while query(chain.url, f"SELECT 1 FROM audit_parts WHERE tried_at IS NULL OR tried_at < '{began}'"):
            await worker.prove(connection)
        return await audit_status.read(connection)


REPAIRS_MAX = 3


def change(url: str, statement: str, values: dict[str, Any]) -> int:
    with psycopg.connect(url) as connection:
        return connection.execute(statement.encode(), values).rowcount


@pytest.mark.parametrize("table", CORRUPTIONS)
async def test_any_cell_changed_by_hand_is_found_and_repaired_under_load(chain: Chain, table: str) -> None:
    """In each table, while sales go on: found within one sweep, named, repaired by RebuildDay, and green again."""
    await chain.sell(150, seed=6)
    await chain.apply(await chain.recorded())
    await sweep(chain)
    values = {"customer": chain.customers[0], "branch": 1}
    async with load(chain, seed=2_000) as so_far:
        await eventually(lambda: enough(so_far, 10), "sales go on")
        for corruption in CORRUPTIONS[table]:
            # In a thread: it may have to wait for a row that a sale has locked, and the sales are in our loop.
            assert await asyncio.to_thread(change, chain.url, corruption.format(table), values), corruption
            found = await sweep(chain)
            assert found.verdict is Verdict.DIFFERENT, corruption
            named = {finding.table for finding in found.findings}
            assert NAMED_BY.get(table, table) in named or found.rows, corruption
            rebuilt = await rebuild.rebuild_day(chain.url, chain.source, date(2026, 3, 2))
            assert rebuilt.repaired[table], corruption
            assert (await status(chain)).verdict in (Verdict.AGREED, Verdict.PENDING), corruption
    assert (await compare(chain)).verdict is Verdict.AGREED
    assert (await sweep(chain)).verdict is Verdict.AGREED
    # Without the load, not a row differs from a rebuild of everything.
    assert not (await rebuild.rebuild_all(chain.url, chain.source, FIRST)).repaired.total()


async def status(chain: Chain) -> audit_status.Status:
    async with chain.pool.connection() as connection:
        return await audit_status.read(connection)


# Four cells that make up for each other in every sum that there is.
FOUR_CELLS = """
    UPDATE product_sales_daily
    SET qty_sum = qty_sum {} CASE WHEN (branch_id = 1) = (product_id = 1001) THEN 1 ELSE -1 END
    WHERE day = '{}' AND branch_id IN (1, 2) AND product_id IN (1001, 1002)
"""


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


async def test_customers_wrong_in_both_tables_alike(chain: Chain) -> None:
    """The log knows how often a customer came, and when last: found within one sweep, by name, and repaired."""
    await chain.sell(60, seed=8)
    await chain.apply(await chain.recorded())
    right = read_models(chain.url)
    who = chain.customers[0]
    for corruption in (
        "purchases_count = purchases_count + 5",
        "last_purchase_at = last_purchase_at - interval '9 days'",
    ):
        for table in ("customer_loyalty", "customer_loyalty_chain"):
            query(chain.url, f"UPDATE {table} SET {corruption} WHERE customer_id = '{who}'")
        found = await sweep(chain)
        assert {f.table for f in found.findings} == {"customer_loyalty", "customer_loyalty_chain"}
        assert all(who in finding.key for finding in found.findings)
        await rebuild.rebuild_day(chain.url, chain.source, LAST)
        assert (await status(chain)).verdict is Verdict.AGREED
        assert read_models(chain.url) == right


async def test_a_wrong_body_that_came_first(chain: Chain) -> None:
    """An event with a sale's id and other products at the same price: the audit names it, RebuildDay puts it right."""
    await chain.sell(20, seed=9)
    recorded = await chain.recorded()
    forged = recorded[0]._replace(items=[item._replace(product_id=item.product_id + 500) for item in recorded[0].items])
    await chain.apply([forged, *recorded])
    found = await sweep(chain)
    assert found.verdict is Verdict.DIFFERENT
    assert f"event_id {forged.event_id}" in {finding.key for finding in found.findings}
    rebuilt = await rebuild.rebuild_day(chain.url, chain.source, forged.day)
    assert (rebuilt.right, (await status(chain)).verdict) == (True, Verdict.AGREED)
    assert read_models(chain.url) == await counted_anew(chain)


async def test_a_purchase_counted_twice_leaves_the_customers_rows_too(chain: Chain) -> None:
    """Under a second event id, of a customer who came again later: taking it out is a subtraction, in every table."""
    await chain.sell(40, seed=10)
    recorded = await chain.recorded()
    await chain.apply(recorded)
    right = read_models(chain.url)
    twice = next(event for event in recorded if event.customer_id and event.day == FIRST)
    await chain.apply([twice._replace(event_id=str(uuid.uuid4()))])
    assert (await sweep(chain)).verdict is Verdict.FOREIGN
    rebuilt = await rebuild.rebuild_day(chain.url, chain.source, FIRST)
    assert (rebuilt.right, len(rebuilt.foreign)) == (True, 1)
    assert read_models(chain.url) == right
    assert (await sweep(chain)).verdict is Verdict.AGREED


@pytest.mark.parametrize("far", [date.min, date.max])
async def test_a_day_at_the_end_of_the_calendar(chain: Chain, far: date) -> None:
    """However it got there, it is foreign, named and taken out; everything else is audited, by hand, too."""
    await chain.sell(20, seed=12)
    recorded = await chain.recorded()
    await chain.apply([*recorded, recorded[0]._replace(event_id=str(uuid.uuid4()), day=far)])
    found = await sweep(chain)
    assert found.verdict is Verdict.FOREIGN
    assert {row.day for row in found.rows} == {far}
    async with serving(chain, chain.source) as stub:
        asked = []
        real = stub.CompareControlTotals

        class Counting:
            GetAuditStatus = stub.GetAuditStatus

            @staticmethod
            def CompareControlTotals(request: Any, timeout: float) -> Any:  # noqa: N802
                asked.append(request)
                return asyncio.run_coroutine_threadsafe(call(request), loop).result(timeout)

        async def call(request: Any) -> Any:
            return await real(request)

        loop = asyncio.get_running_loop()
        replies = await asyncio.to_thread(audit_command._ask, Counting, None, None)
        assert len(asked) <= 4
        assert {row.verdict for reply in replies for row in reply.rows} == {1, 4}
        rebuilt = await stub.RebuildDay(pb.RebuildDayRequest(sales_date=wire.date(far)))
        assert (rebuilt.foreign_event_count, rebuilt.agreed) == (1, True)
    assert (await sweep(chain)).verdict is Verdict.AGREED
    assert read_models(chain.url) == await counted_anew(chain)


async def test_a_check_that_fails_is_a_finding(chain: Chain) -> None:
    """It is named with the reason, and everything else is proven; what was wrong stays wrong meanwhile."""
    await chain.sell(20, seed=13)
    await chain.apply(await chain.recorded())
    query(chain.url, "ALTER TABLE product_sales_totals RENAME qty_sum TO gone")
    found = await sweep(chain)
    assert found.verdict is Verdict.UNPROVEN
    assert [finding.table for finding in found.findings] == ["products"]
    assert "qty_sum" in found.findings[0].detail
    query(chain.url, "UPDATE sales_totals SET items_sum = items_sum + 1 WHERE branch_id = 0")
    found = await sweep(chain)
    assert found.verdict is Verdict.DIFFERENT
    assert {finding.table for finding in found.findings} == {"products", "sales_totals"}
    query(chain.url, "ALTER TABLE sales_totals RENAME items_sum TO gone")
    assert (await sweep(chain)).verdict is Verdict.DIFFERENT
    query(chain.url, "ALTER TABLE sales_totals RENAME gone TO items_sum")
    query(chain.url, "ALTER TABLE product_sales_totals RENAME gone TO qty_sum")
    query(chain.url, "UPDATE sales_totals SET items_sum = items_sum - 1 WHERE branch_id = 0")
    assert (await sweep(chain)).verdict is Verdict.AGREED


async def test_days_that_the_retention_has_dropped(chain: Chain, purchases_db: str) -> None:
    """Nobody knows what was recorded then: they are never foreign, wrong before or touched since or not."""
    await chain.sell(60, seed=14)
    await chain.apply(await chain.recorded())
    query(chain.url, FOUR_CELLS.format("+", FIRST))
    assert (await sweep(chain)).verdict is Verdict.DIFFERENT
    query(purchases_db, "UPDATE chain_settings SET dropped_before = '2026-03-02'")
    query(purchases_db, "DELETE FROM purchase_items WHERE purchase_time < '2026-03-02Z'")
    query(purchases_db, "DELETE FROM purchases WHERE purchase_time < '2026-03-02Z'")
    found = await sweep(chain)
    assert (found.rows, found.foreign_ids) == ([], [])
    assert {finding.table for finding in found.findings} == {"product_sales_totals"}  # this the tables know themselves
    query(chain.url, FOUR_CELLS.format("-", FIRST))
    assert (await sweep(chain)).verdict is Verdict.AGREED
    query(chain.url, f"UPDATE daily_sales_by_branch SET items_sum = items_sum + 1 WHERE day = '{FIRST}'")
    assert (await sweep(chain)).verdict is Verdict.DIFFERENT


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


async def test_a_recorded_day_that_was_never_counted(chain: Chain) -> None:
    """No event tells of it: the purchases service does."""
    await chain.sell(10, seed=17, days=1)
    found = await sweep(chain, auditor(chain, Kept(chain)))
    assert found.verdict is Verdict.DIFFERENT
    assert all("neither counted nor quarantined" in row.detail for row in found.rows)


async def test_a_late_sale_on_a_proven_day_whose_event_is_lost(chain: Chain, purchases_db: str) -> None:
    """Neither queue nor outbox tells of it, and nothing was counted on that day for long: the next look sees it."""
    await chain.sell(20, seed=19)
    await chain.apply(await chain.recorded())
    assert (await sweep(chain)).verdict is Verdict.AGREED
    query(chain.url, "UPDATE analytics_event_log SET processed_at = processed_at - interval '1 hour'")
    async with pool(chain.url, "analytics_consumer", size=1) as opened, opened.connection() as connection:
        await auditor(chain).compare(connection)
        await chain.sell(1, seed=20, days=1)
        query(purchases_db, "DELETE FROM outbox_events")
        ((recorded_by,),) = query(purchases_db, "SELECT clock_timestamp()")
        known = await status(chain)
        assert known.verdict is Verdict.AGREED
        assert known.compared_through and known.compared_through < recorded_by
        await auditor(chain).compare(connection)
    known = await status(chain)
    assert known.verdict is Verdict.PENDING
    assert known.compared_through and known.compared_through > recorded_by
    await chain.apply(await chain.recorded())
    assert (await sweep(chain)).verdict is Verdict.AGREED


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


async def test_what_is_not_named_is_counted(chain: Chain) -> None:
    """Of many wrong days, rows and events some are named; how many there are is told of all."""
    await chain.sell(150, seed=21, days=70)
    async with pool(chain.url, "analytics_consumer", size=1) as opened, opened.connection() as connection:
        await auditor(chain).compare(connection)
    known = await status(chain)
    days = len({row.day for row in known.rows})
    assert (known.verdict, known.pending, days) == (Verdict.PENDING, 150, audit_status.PARTS_NAMED_MAX)
    recorded = await chain.recorded()
    foreign = [recorded[0]._replace(event_id=str(uuid.UUID(int=n))) for n in range(1, FOREIGN_IDS_MAX + 101)]
    for start in range(0, len(foreign), 500):
        await chain.apply(foreign[start : start + 500])
    await chain.apply(recorded)
    query(chain.url, "INSERT INTO product_sales_totals SELECT 1, 9_000 + n, 1, 1 FROM generate_series(1, 100) AS n")
    known = await sweep(chain)
    assert (known.foreign, len(known.foreign_ids)) == (len(foreign), FOREIGN_IDS_MAX)
    assert known.wrong >= 100 > len(known.findings)
    assert known.pending == 0


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


async def counted_anew(chain: Chain) -> dict[str, Any]:
    """The read models of the recorded purchases, counted into another schema."""
    return await anew(chain, await chain.recorded())


async def anew(chain: Chain, events: Sequence[PurchaseCreated]) -> dict[str, Any]:
    query(chain.url, "DROP SCHEMA IF EXISTS anew CASCADE")
    query(chain.url, "CREATE SCHEMA anew")
    for table in TABLES.split(", "):
        query(chain.url, f"CREATE TABLE anew.{table} (LIKE public.{table} INCLUDING ALL)")
    if events:
        async with await psycopg.AsyncConnection.connect(chain.url, options="-c search_path=anew") as connection:
            await fold(connection, events)
    return read_models(chain.url, "anew")


async def test_below_the_floor_what_is_recorded_must_be_counted(chain: Chain) -> None:
    """No id tells there whether an event is counted: quarantine excuses nothing, a rebuild repairs, all agree then."""
    await chain.sell(20, seed=11)
    recorded = await chain.recorded()
    late, duplicate = [event for event in recorded if event.day == FIRST][:2]
    await chain.apply([event for event in recorded if event is not late])
    query(chain.url, "UPDATE freshness SET log_floor = '7fffffff-0000-0000-0000-000000000000'")
    query(chain.url, f"SELECT forget_events('{uuid.UUID(int=0)}', 1000)")
    await chain.apply([late, duplicate])  # are not counted, and end in quarantine
    for event in (late, duplicate):
        query(
            chain.url,
            "INSERT INTO quarantined_events (event_id, reason, detail, body, properties)"
            f" VALUES ('{event.event_id}', 'OLDER_THAN_FLOOR', '', '', '{{}}')",
        )
    lost = await audit.compare(chain.pool, Kept(chain), FIRST, LAST, wait_s=5)  # type: ignore[arg-type]
    assert lost.verdict is Verdict.DIFFERENT
    assert [row.day for row in lost.rows if row.verdict is Verdict.DIFFERENT] == [FIRST]
    await rebuild.rebuild_day(chain.url, chain.source, FIRST)
    assert (await sweep(chain)).verdict is Verdict.AGREED
    assert read_models(chain.url) == await counted_anew(chain)
    before = query(chain.url, "SELECT * FROM daily_sales_by_branch ORDER BY 1, 2")
    await chain.apply(recorded)  # comes once more
    assert query(chain.url, "SELECT * FROM daily_sales_by_branch ORDER BY 1, 2") == before


async def test_customers_of_whom_the_log_has_forgotten_something(chain: Chain) -> None:
    """Their rows follow from what is kept of the forgotten, and from the log; wrong ones are found and repaired."""
    await chain.sell(60, seed=8)
    await chain.apply(await chain.recorded())
    middle = sorted(event_id for event_id, _ in chain.ids())[30]
    query(chain.url, f"UPDATE freshness SET log_floor = '{middle}'")
    query(chain.url, f"SELECT forget_events('{uuid.UUID(int=0)}', 1000)")
    assert (await sweep(chain)).verdict is Verdict.AGREED
    right = read_models(chain.url)
    query(chain.url, f"UPDATE customer_loyalty SET purchases_count = 77 WHERE customer_id = '{chain.customers[0]}'")
    query(chain.url, "DELETE FROM forgotten_visits WHERE day = '2026-03-02'")
    assert {finding.table for finding in (await sweep(chain)).findings} >= {"customer_loyalty", "forgotten_visits"}
    await rebuild.rebuild_day(chain.url, chain.source, date(2026, 3, 2))
    assert (await status(chain)).verdict is Verdict.AGREED
    assert read_models(chain.url) == right


@asynccontextmanager
async def serving(chain: Chain, source: Source) -> AsyncIterator[Any]:
    """AuditService over gRPC."""
    host = grpc_server.Server("analytics.retail.example")
    servicer = AuditServicer(chain.pool, chain.url, source)
    address = free_address()
    service = grpc_server.Service(add_AuditServiceServicer_to_server, servicer, "retail.analytics.v1.AuditService")
    async with host.listening(address, [service]), grpc.aio.insecure_channel(address) as channel:
        stub: Any = AuditServiceStub(channel)
        stub.address = address
        yield stub


@pytest.fixture
async def desk(chain: Chain) -> AsyncIterator[Any]:
    async with serving(chain, chain.source) as stub:
        yield stub


async def test_the_service_compares_repairs_and_tells(chain: Chain, desk: Any) -> None:
    """Over gRPC: the comparison's rows, a repair and what it did, and what the audit knows."""
    await chain.sell(40, seed=9)
    recorded = await chain.recorded()
    await chain.apply(recorded[:-3])
    query(chain.url, "UPDATE sales_totals SET items_sum = items_sum + 1 WHERE branch_id = 0")
    request = pb.CompareControlTotalsRequest(first_date=wire.date(FIRST), last_date=wire.date(LAST))
    compared = await desk.CompareControlTotals(request, timeout=1)
    assert (compared.verdict, compared.pending_count) == (pb.AUDIT_VERDICT_PENDING, 3)
    await sweep(chain)
    known = await desk.GetAuditStatus(pb.GetAuditStatusRequest())
    assert known.verdict == pb.AUDIT_VERDICT_DIFFERENT
    assert [(finding.table, finding.key) for finding in known.findings] == [("sales_totals", "branch_id 0")]
    added = 0
    for number in range(DAYS):
        day = wire.date(FIRST + timedelta(days=number))
        rebuilt = await desk.RebuildDay(pb.RebuildDayRequest(sales_date=day))
        added += rebuilt.added_purchase_count
        assert rebuilt.repaired_row_count == (1 if number == 0 else 0)
    assert added == 3
    compared = await desk.CompareControlTotals(request)
    assert (compared.verdict, compared.pending_count, list(compared.findings)) == (pb.AUDIT_VERDICT_AGREED, 0, [])
    assert sum(row.recorded.purchase_count for row in compared.rows) == 40
    await sweep(chain)
    known = await desk.GetAuditStatus(pb.GetAuditStatusRequest())
    assert (known.verdict, known.proven_day_count, known.stale) == (pb.AUDIT_VERDICT_AGREED, DAYS, False)
    assert known.last_cycle_time.seconds > 1_700_000_000
    assert known.last_sweep_time.seconds > 1_700_000_000


async def test_the_command_says_what_the_audit_knows(chain: Chain) -> None:
    """Sums may agree while rows are wrong: the exit code is that of the worse, and old news is none."""
    await chain.sell(20, seed=18)
    await chain.apply(await chain.recorded())

    async def said() -> tuple[int, str]:
        command = [sys.executable, "-m", "analytics_svc", "audit"]
        process = await asyncio.create_subprocess_exec(*command, env=os.environ | env, stdout=asyncio.subprocess.PIPE)
        output, _ = await process.communicate()
        return process.returncode or 0, output.decode()

    async with serving(chain, chain.source) as stub:
        env = {"CONSUMER_TARGET": stub.address}
        assert (await said())[0] == 3  # nobody has looked yet
        await sweep(chain)
        assert (await said())[0] == 0
        query(chain.url, FOUR_CELLS.format("+", FIRST))
        await sweep(chain)
        code, text = await said()
        assert code == 1
        assert f"product_sales_daily, day {FIRST}" in " ".join(text.split())
        query(chain.url, FOUR_CELLS.format("-", FIRST))
        await sweep(chain)
        query(chain.url, "UPDATE audit_status SET compared_at = compared_at - interval '1 day'")
        code, text = await said()
        assert (code, "TOO OLD" in text) == (3, True)


async def test_bad_requests_name_every_field(desk: Any) -> None:
    """Dates are required, in order, and 31 days at most."""
    refused = await refusal(desk.CompareControlTotals(pb.CompareControlTotalsRequest()))
    assert refused.fields == ["first_date", "last_date"]
    request = pb.CompareControlTotalsRequest(first_date=wire.date(FIRST), last_date=wire.date(date(2026, 4, 1)))
    assert (await refusal(desk.CompareControlTotals(request))).fields == ["last_date"]
    assert (await refusal(desk.RebuildDay(pb.RebuildDayRequest()))).fields == ["sales_date"]


async def test_another_zone_and_a_missing_service_are_refused(
    chain: Chain, purchases_channel: grpc.aio.Channel
) -> None:
    """Days of two zones are not compared, nor rebuilt; a purchases service that is away is named."""
    compare = pb.CompareControlTotalsRequest(first_date=wire.date(FIRST), last_date=wire.date(LAST))
    refusals = []
    async with grpc.aio.insecure_channel(free_address()) as nowhere:
        for source in (CellSource(purchases_channel, ZoneInfo("Asia/Tokyo")), CellSource(nowhere, UTC_ZONE)):
            async with serving(chain, source) as stub:
                for call in (
                    stub.CompareControlTotals(compare),
                    stub.RebuildDay(pb.RebuildDayRequest(sales_date=compare.first_date)),
                ):
                    refused = await refusal(call)
                    refusals.append((refused.code, refused.reason))
    zone = (grpc.StatusCode.FAILED_PRECONDITION, "TIME_ZONES_DIFFER")
    away = (grpc.StatusCode.UNAVAILABLE, "PURCHASES_UNAVAILABLE")
    assert refusals == [zone, zone, away, away]


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
