"""The audit: what is right is proven, what is wrong is found, named and repaired, in every table and under load."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import grpc
import psycopg
import pytest

from analytics_svc.proof import audit, auditor, rebuild
from analytics_svc.proof.audit_server import AuditServicer
from analytics_svc.proof.auditor import AUDIT_LOCK, Auditor
from analytics_svc.proof.day import prove_day
from analytics_svc.proof.verdicts import Comparison, Verdict
from analytics_svc.upstream.source import Source
from chassis import grpc_server, wire
from retail.analytics.v1 import audit_service_pb2 as pb
from retail.analytics.v1.audit_service_pb2_grpc import AuditServiceStub, add_AuditServiceServicer_to_server
from tests.conftest import eventually
from tests.integration.chain import DAYS, FIRST, UTC_ZONE, Chain, enough, load
from tests.integration.conftest import free_address
from tests.integration.purchase_events import query, sold
from tests.integration.sales import refusal
from tests.integration.test_apply import decoded

LAST = FIRST + timedelta(days=DAYS - 1)


async def compare(chain: Chain) -> Comparison:
    return await audit.compare(chain.pool, chain.source, FIRST, LAST, wait_s=0)


def complete(chain: Chain, at: str = "now() + interval '1 day'") -> None:
    """As the keeper does it: whatever was recorded before is counted or quarantined."""
    query(chain.url, f"UPDATE freshness SET complete_through_at = {at}")


async def test_what_is_counted_agrees(chain: Chain) -> None:
    """All rows agree, by sums and by rows, and no read model contradicts another."""
    await chain.sell(80, seed=1)
    await chain.apply(await chain.recorded())
    compared = await compare(chain)
    assert compared.verdict is Verdict.AGREED
    assert sum(row.counted.purchases for row in compared.rows) == 80
    for day in (FIRST, LAST):
        proven = await prove_day(chain.pool, chain.source, day)
        assert proven
        assert (proven.verdict, proven.findings) == (Verdict.AGREED, [])
    assert await audit.find_contradictions(chain.pool, [FIRST, LAST]) == []


async def test_purchases_on_their_way_are_pending(chain: Chain) -> None:
    """What is not counted yet is pending with its number, until it must have been; then it is lost and named."""
    await chain.sell(30, seed=2)
    recorded = await chain.recorded()
    await chain.apply(recorded[:-4])
    compared = await compare(chain)
    assert (compared.verdict, compared.pending) == (Verdict.PENDING, 4)
    complete(chain)
    compared = await compare(chain)
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
    complete(chain)
    compared = await compare(chain)
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
    assert rebuilt.foreign == (1, [foreign[0].event_id])
    assert (await compare(chain)).foreign_ids == [foreign[1].event_id]
    everything = await rebuild.rebuild_all(chain.url, chain.source, FIRST)
    assert everything.foreign == (1, [foreign[1].event_id])
    await chain.apply(decoded(foreign))
    assert (await compare(chain)).verdict is Verdict.AGREED
    assert await audit.find_contradictions(chain.pool, [FIRST, LAST]) == []


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
    "product_sales_monthly": [
        "UPDATE {} SET qty_sum = qty_sum + 1 WHERE product_id = 1002",
        "DELETE FROM {} WHERE product_id = 1003",
    ],
    "product_sales_totals": [
        "UPDATE {} SET qty_sum = qty_sum + 1 WHERE (branch_id, product_id) = (0, 1001)",
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
QUICK: dict[str, Any] = {"cpu_share": 1_000.0, "cycle_pause_s": 0, "complete_wait_s": 0}  # spares nothing
NAMED_BY = {"customer_loyalty_chain": "customer_loyalty", "daily_sales_by_branch": "daily_sales_of_chain"}


@pytest.fixture
def quick(chain: Chain) -> Auditor:
    """An auditor that need not spare anything."""
    return Auditor(chain.pool, chain.source, **QUICK)


async def cycle(chain: Chain, quick: Auditor) -> auditor.Report:
    async with chain.pool.connection() as connection:
        return await quick.run_once(connection)


REPAIRS_MAX = 3


def change(url: str, statement: str, values: dict[str, Any]) -> int:
    with psycopg.connect(url) as connection:
        return connection.execute(statement.encode(), values).rowcount


@pytest.mark.parametrize("table", CORRUPTIONS)
async def test_any_cell_changed_by_hand_is_found_and_repaired_under_load(
    chain: Chain, quick: Auditor, table: str
) -> None:
    """In each table, while sales go on: found within one cycle, named, repaired by RebuildDay, and green again."""
    await chain.sell(150, seed=6)
    await chain.apply(await chain.recorded())
    await cycle(chain, quick)
    values = {"customer": chain.customers[0], "branch": 1}
    async with load(chain, seed=2_000) as so_far:
        await eventually(lambda: enough(so_far, 10), "sales go on")
        for corruption in CORRUPTIONS[table]:
            # In a thread: it may have to wait for a row that a sale has locked, and the sales are in our loop.
            assert await asyncio.to_thread(change, chain.url, corruption.format(table), values), corruption
            found = await cycle(chain, quick)
            assert found.verdict is Verdict.DIFFERENT, corruption
            named = {finding.table for finding in found.findings}
            assert NAMED_BY.get(table, table) in named or found.wrong_rows, corruption
            # A sale in between may hide which customer's row it is; the next cycle, after that day's repair, tells.
            for _ in range(REPAIRS_MAX):
                for day in found.doubtful_days or {LAST}:
                    await rebuild.rebuild_day(chain.url, chain.source, min(max(day, FIRST), LAST))
                after = found = await cycle(chain, quick)
                if after.verdict in (Verdict.AGREED, Verdict.PENDING):
                    break
            assert after.verdict in (Verdict.AGREED, Verdict.PENDING), (corruption, after)
    assert (await compare(chain)).verdict is Verdict.AGREED
    # Without the load, not a row differs from a rebuild of everything.
    assert not any((await rebuild.rebuild_all(chain.url, chain.source, FIRST)).repaired.values())


async def test_the_sweep_comes_round(chain: Chain, quick: Auditor) -> None:
    """Every day is proven row by row in turn; days that nobody has touched, too."""
    await chain.sell(60, seed=7)
    await chain.apply(await chain.recorded())
    await cycle(chain, quick)
    query(chain.url, "UPDATE audit_status SET started_at = now() + interval '1 hour', sweep_day = NULL")
    # Four cells that make up for each other in every sum that there is.
    change = "qty_sum = qty_sum + CASE WHEN (branch_id = 1) = (product_id = 1001) THEN 1 ELSE -1 END"
    cells = "day = '2026-03-03' AND branch_id IN (1, 2) AND product_id IN (1001, 1002)"
    query(chain.url, f"UPDATE product_sales_daily SET {change} WHERE {cells}")
    verdicts = []
    for _ in range(DAYS + 1):
        report = await cycle(chain, quick)
        verdicts.append(report.verdict)
        query(chain.url, "UPDATE audit_status SET started_at = now() + interval '1 hour'")
    assert verdicts == [Verdict.AGREED, Verdict.AGREED, Verdict.DIFFERENT, Verdict.DIFFERENT]
    assert {finding.key for finding in report.findings} >= {"day 2026-03-03, branch_id 1, product_id 1001"}
    assert query(chain.url, "SELECT sweep_day, sweep_ended_at IS NULL FROM audit_status") == [(None, False)]


async def test_the_sweep_saves_for_one_day_only(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """After weeks with nothing to do, days are proven one at a time, each when there was time for it."""
    await chain.sell(60, seed=7)
    await chain.apply(await chain.recorded())
    monkeypatch.setattr(auditor, "SECONDS_PER_PURCHASE", 10.0)  # minutes for each of the days
    rested = Auditor(chain.pool, chain.source, **(QUICK | {"cpu_share": 2.0}))
    rested._credited_at -= timedelta(weeks=4).total_seconds()
    for _ in range(3):
        await cycle(chain, rested)
        assert query(chain.url, "SELECT sweep_day FROM audit_status") == [(FIRST,)]


async def test_the_sweep_saves_for_what_a_day_has_become(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day that had just begun when its purchases were counted has many more when there was time for those few."""
    await chain.sell(10, seed=7, days=1)
    await chain.apply(await chain.recorded())
    monkeypatch.setattr(auditor, "SECONDS_PER_PURCHASE", 10.0)
    saving = Auditor(chain.pool, chain.source, **(QUICK | {"cpu_share": 2.0}))  # a second of work for each that passes

    async def proven(after_s: float) -> bool:
        saving._credited_at -= after_s
        await cycle(chain, saving)
        return query(chain.url, "SELECT sweep_day FROM audit_status") == [(FIRST,)]

    assert not await proven(after_s=0)
    await chain.sell(90, seed=8, days=1)
    await chain.apply(await chain.recorded())
    assert not await proven(after_s=100)
    assert await proven(after_s=900)


async def test_today_is_the_chains(chain: Chain, purchases_channel: grpc.aio.Channel) -> None:
    """Around the world, it is two days or three at any time; the audit looks at the chain's."""
    for zone in (ZoneInfo("Etc/GMT-14"), ZoneInfo("Etc/GMT+12")):
        abroad = Auditor(chain.pool, Source(purchases_channel, zone))
        async with chain.pool.connection() as connection:
            assert await abroad._touched_days(connection, None) == {datetime.now(zone).date()}


async def test_below_the_floor_what_is_recorded_must_be_counted(chain: Chain) -> None:
    """No id tells there whether an event is counted: quarantine excuses nothing, a rebuild repairs, all agree then."""
    await chain.sell(20, seed=11)
    recorded = await chain.recorded()
    late, duplicate = [event for event in recorded if event.day == FIRST][:2]
    await chain.apply([event for event in recorded if event is not late])
    query(chain.url, "UPDATE freshness SET log_floor = '7fffffff-0000-0000-0000-000000000000'")
    query(chain.url, "DELETE FROM analytics_event_log")
    await chain.apply([late, duplicate])  # are not counted, and end in quarantine
    for event in (late, duplicate):
        query(
            chain.url,
            "INSERT INTO quarantined_events (event_id, reason, detail, body, properties)"
            f" VALUES ('{event.event_id}', 'OLDER_THAN_FLOOR', '', '', '{{}}')",
        )
    complete(chain)
    lost = await compare(chain)
    assert lost.verdict is Verdict.DIFFERENT
    assert [row.day for row in lost.rows if row.verdict is Verdict.DIFFERENT] == [FIRST]
    await rebuild.rebuild_day(chain.url, chain.source, FIRST)
    proven = await prove_day(chain.pool, chain.source, FIRST)
    assert proven
    assert (proven.verdict, proven.findings) == (Verdict.AGREED, [])
    assert (await compare(chain)).verdict is Verdict.AGREED
    before = query(chain.url, "SELECT * FROM daily_sales_by_branch ORDER BY 1, 2")
    await chain.apply(recorded)  # comes once more
    assert query(chain.url, "SELECT * FROM daily_sales_by_branch ORDER BY 1, 2") == before


async def test_a_log_with_gaps_is_no_error(chain: Chain, quick: Auditor) -> None:
    """Where the log was forgotten, or is from before it had days, sums and rows are proven all the same."""
    await chain.sell(40, seed=8)
    await chain.apply(await chain.recorded())
    complete(chain)
    query(chain.url, "UPDATE audit_status SET log_has_days_from = '2026-03-03'")
    query(chain.url, "UPDATE analytics_event_log SET day = NULL WHERE day < '2026-03-03'")
    assert (await cycle(chain, quick)).verdict is Verdict.AGREED
    query(chain.url, "UPDATE product_sales_daily SET product_id = 77 WHERE day = '2026-03-01' AND product_id = 1001")
    proven = await prove_day(chain.pool, chain.source, FIRST)
    assert proven
    assert {finding.table for finding in proven.findings} == {"product_sales_daily"}


@asynccontextmanager
async def serving(chain: Chain, source: Source) -> AsyncIterator[Any]:
    """AuditService over gRPC."""
    host = grpc_server.Server("analytics.retail.example")
    servicer = AuditServicer(chain.pool, chain.url, source)
    address = free_address()
    service = grpc_server.Service(add_AuditServiceServicer_to_server, servicer, "retail.analytics.v1.AuditService")
    async with host.listening(address, [service]), grpc.aio.insecure_channel(address) as channel:
        yield AuditServiceStub(channel)


@pytest.fixture
async def desk(chain: Chain) -> AsyncIterator[Any]:
    async with serving(chain, chain.source) as stub:
        yield stub


async def test_the_service_compares_repairs_and_tells(chain: Chain, desk: Any, quick: Auditor) -> None:
    """Over gRPC: the comparison's rows and findings, a repair and what it did, and the last cycle."""
    await chain.sell(40, seed=9)
    recorded = await chain.recorded()
    await chain.apply(recorded[:-3])
    query(chain.url, "UPDATE sales_totals SET items_sum = items_sum + 1 WHERE branch_id = 0")
    request = pb.CompareControlTotalsRequest(first_date=wire.date(FIRST), last_date=wire.date(LAST))
    compared = await desk.CompareControlTotals(request, timeout=1)
    assert compared.verdict == pb.AUDIT_VERDICT_DIFFERENT
    assert compared.pending_count == 3
    assert [(finding.table, finding.key) for finding in compared.findings] == [("sales_totals", "branch_id 0")]
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
    assert not (await desk.GetAuditStatus(pb.GetAuditStatusRequest())).HasField("last_cycle_time")
    await cycle(chain, quick)
    status = await desk.GetAuditStatus(pb.GetAuditStatusRequest())
    assert (status.verdict, status.proven_day_count) == (pb.AUDIT_VERDICT_AGREED, DAYS)
    assert status.last_cycle_time.seconds > 1_700_000_000


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
        for source in (Source(purchases_channel, ZoneInfo("Asia/Tokyo")), Source(nowhere, UTC_ZONE)):
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


async def test_one_process_audits(chain: Chain, quick: Auditor) -> None:
    """Of two that run, one works; when it ends, the other takes over."""
    await chain.sell(10, seed=10)
    await chain.apply(await chain.recorded())

    async def audited(since: datetime) -> bool:
        return query(chain.url, f"SELECT ended_at > '{since.isoformat()}' FROM audit_status") == [(True,)]

    async def holders() -> int:
        ((count,),) = query(
            chain.url,
            f"SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = {AUDIT_LOCK & 0xFFFFFFFF}",
        )
        return int(count)

    first, second = (asyncio.create_task(one.run()) for one in (quick, Auditor(chain.pool, chain.source, **QUICK)))
    try:
        for task in (first, second):
            since = datetime.now(UTC)
            await eventually(lambda since=since: audited(since), "a cycle")  # type: ignore[misc]
            assert await holders() == 1
            task.cancel()
            await asyncio.wait({task})
    finally:
        second.cancel()
        await asyncio.wait({second})
