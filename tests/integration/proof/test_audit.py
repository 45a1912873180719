"""The audit: what is right is proven, what is wrong, missing or foreign is found and named."""

import uuid
from datetime import UTC, date, datetime

from analytics_svc.proof import audit, audit_status, rebuild
from analytics_svc.proof.day import FOREIGN_IDS_MAX, prove_day
from analytics_svc.proof.verdicts import Verdict
from tests.conftest import pool
from tests.integration.auditing import FOUR_CELLS, LAST, Kept, auditor, compare, counted_anew, status, sweep
from tests.integration.chain import FIRST, Chain
from tests.integration.ingest.test_apply import decoded
from tests.integration.purchase_events import query, read_models, sold


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
