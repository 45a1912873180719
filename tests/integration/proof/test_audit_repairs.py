"""What the audit finds in any table is repaired by RebuildDay, and right again."""

import asyncio
import uuid
from datetime import date
from typing import Any

import psycopg
import pytest

from analytics_svc.proof import rebuild
from analytics_svc.proof.verdicts import Verdict
from tests.conftest import eventually
from tests.integration.auditing import LAST, compare, counted_anew, status, sweep
from tests.integration.chain import FIRST, Chain, enough, load
from tests.integration.purchase_events import query, read_models

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
