"""Audit and repair with the production limits, where each of them bites. What needs no sale is made by SQL."""

from analytics_svc.proof import parts, rebuild
from analytics_svc.proof.day import FOREIGN_IDS_MAX, MISTOLD_MAX, prove_day
from analytics_svc.proof.parts import RANGE_KEYS, Part
from analytics_svc.proof.read_models import BRANCHES, CUSTOMERS, NAMED_MAX, PRODUCTS
from analytics_svc.proof.repair import IDS_AT_ONCE, ROWS_AT_ONCE, mend_range, prove_range
from analytics_svc.proof.verdicts import Verdict
from tests.integration.chain import FIRST, Chain
from tests.integration.proof.test_audit import status
from tests.integration.purchase_events import query
from tests.integration.purchase_events import read_models as all_rows

KEYS = {kind: 2 * keys + 1 for kind, keys in RANGE_KEYS.items()}  # just more than one range may have
MISSING = 30  # customers' rows that a repair has to make
FOREIGN = IDS_AT_ONCE + 10
PRODUCTS_OF_EACH, BRANCHES_OF_EACH = 80, 2 * ROWS_AT_ONCE // 80  # that make rows which nobody sold
DAY = "'2026-03-01'"
BASE = [
    f"INSERT INTO daily_sales_by_branch (day, branch_id, revenue_sum, items_sum, purchases_count,"
    f" purchases_with_customer_count) SELECT {DAY}, n, n, 2, 1, 1 FROM generate_series(1, {KEYS[BRANCHES]}) AS n",
    "INSERT INTO daily_sales_of_chain (day, revenue_sum, items_sum, purchases_count, purchases_with_customer_count)"
    " SELECT day, sum(revenue_sum), sum(items_sum), sum(purchases_count), sum(purchases_with_customer_count)"
    " FROM daily_sales_by_branch GROUP BY day",
    f"INSERT INTO product_sales_daily (day, branch_id, product_id, qty_sum, revenue_sum)"
    f" SELECT {DAY}, 1, n, 1, n FROM generate_series(1, {KEYS[PRODUCTS]}) AS n",
    f"INSERT INTO forgotten_visits (customer_id, branch_id, day, purchases_count, last_purchase_at)"
    f" SELECT md5(n::text)::uuid, 1, {DAY}, 1, '2026-03-01 12:00Z' FROM generate_series(1, {KEYS[CUSTOMERS]}) AS n",
    f"INSERT INTO customer_loyalty (customer_id, branch_id, purchases_count, last_purchase_at)"
    f" SELECT customer_id, branch_id, 1, last_purchase_at FROM forgotten_visits LIMIT {KEYS[CUSTOMERS] - MISSING}",
    "INSERT INTO customer_loyalty_chain (customer_id, purchases_count, last_purchase_at)"
    " SELECT customer_id, 1, last_purchase_at FROM customer_loyalty",
]
WRONG = {
    BRANCHES: f"UPDATE monthly_sales_by_branch SET items_sum = items_sum + 1 WHERE branch_id = {KEYS[BRANCHES]}",
    PRODUCTS: f"DELETE FROM product_sales_of_chain_sums WHERE period = 'all' AND product_id = {KEYS[PRODUCTS]}",
    CUSTOMERS: "UPDATE customer_loyalty_chain SET purchases_count = 9"
    " WHERE customer_id = (SELECT max(customer_id::text)::uuid FROM customer_loyalty_chain)",
}


async def every_range(chain: Chain, kind: str) -> list[Part]:
    async with chain.pool.connection() as connection:
        return await parts.ranges(connection, kind)


async def test_ranges(chain: Chain) -> None:
    """No range has more keys than it may; together they have everything, and one wrong row is found and mended."""
    for statement in BASE:
        query(chain.url, statement)
    for kind in (CUSTOMERS, PRODUCTS, BRANCHES):
        for part in await every_range(chain, kind):
            await mend_range(chain.pool, part)
        ranges = await every_range(chain, kind)
        assert len(ranges) >= 2
        for part in ranges:
            assert (await prove_range(chain.pool, part)).verdict is Verdict.AGREED
            keys = parts._KEYS_OF[kind].replace("%(first)s", f"'{part.first}'").replace("%(last)s", f"'{part.last}'")
            assert query(chain.url, f"SELECT count(*) <= {2 * RANGE_KEYS[kind]} FROM ({keys}) AS keys") == [(True,)]
        query(chain.url, WRONG[kind])
        found = [part for part in ranges if (await prove_range(chain.pool, part)).wrong]
        assert found == ranges[-1:]
        assert (await mend_range(chain.pool, found[0])).total() == 1


async def test_a_day(chain: Chain) -> None:
    """More entries that tell something else, foreign ids and wrong rows than one round, or one transaction, mends."""
    await chain.sell(MISTOLD_MAX + 10, seed=1, days=1)
    await chain.apply(await chain.recorded())
    right, log = all_rows(chain.url), chain.ids()
    query(chain.url, "UPDATE analytics_event_log SET checksum = checksum + 1")
    query(
        chain.url,
        "INSERT INTO analytics_event_log (event_id, event_type, day, branch_id, purchase_time)"
        f" SELECT gen_random_uuid(), 'PurchaseCreated', '{FIRST}', 1, now() FROM generate_series(1, {FOREIGN})",
    )
    query(
        chain.url,
        "INSERT INTO product_sales_daily (day, branch_id, product_id, qty_sum, revenue_sum)"
        f" SELECT '{FIRST}', branch, 1_000_000 + product, 1, 1 FROM generate_series(1, {BRANCHES_OF_EACH}) AS branch,"
        f" generate_series(1, {PRODUCTS_OF_EACH}) AS product",
    )
    async with chain.pool.connection() as connection:
        began_at = await parts.begin(connection)
        proof = await prove_day(chain.pool, chain.source, FIRST)
        await parts.store(connection, parts.of_day(FIRST), began_at, proof.comparison)
    known = await status(chain)
    assert (known.foreign, len(known.foreign_ids)) == (FOREIGN, FOREIGN_IDS_MAX)
    assert known.wrong >= MISTOLD_MAX + 10 > len(known.findings) >= NAMED_MAX
    rebuilt = await rebuild.rebuild_day(chain.url, chain.source, FIRST)
    assert (rebuilt.right, rebuilt.foreign.total, rebuilt.added) == (True, FOREIGN, 0)
    assert rebuilt.repaired["product_sales_daily"] == PRODUCTS_OF_EACH * BRANCHES_OF_EACH
    assert all_rows(chain.url) == right
    assert [row for row in chain.ids() if row[1]] == log
    assert query(chain.url, "SELECT count(*) FROM analytics_event_log WHERE day IS NULL") == [(FOREIGN,)]
