"""Audit and repair with the production limits, where each of them bites. What needs no sale is made by SQL."""

import itertools
import uuid
from datetime import date

from analytics_svc.proof import parts, rebuild
from analytics_svc.proof.day import FOREIGN_IDS_MAX, MISTOLD_MAX, prove_day
from analytics_svc.proof.parts import RANGE_KEYS, Part
from analytics_svc.proof.read_models import BRANCHES, CUSTOMERS, NAMED_MAX, PRODUCTS
from analytics_svc.proof.repair import IDS_AT_ONCE, ROWS_AT_ONCE
from analytics_svc.proof.verdicts import Verdict
from tests.integration.auditing import status, sweep
from tests.integration.chain import FIRST, Chain
from tests.integration.purchase_events import query
from tests.integration.purchase_events import read_models as all_rows

KEYS = {kind: 2 * keys + 1 for kind, keys in RANGE_KEYS.items()}  # just more than one range may have
MISSING = 30  # customers' rows that a repair has to make
FOREIGN = IDS_AT_ONCE + 10
PRODUCTS_OF_EACH, BRANCHES_OF_EACH = 80, 2 * ROWS_AT_ONCE // 80  # that make rows which nobody sold
DAY = "'2026-03-01'"
# Branches, products and customers from `first` to `last`, who sold, were sold and came on a day that is past retention.
GROW = """
    INSERT INTO product_sales_daily (day, branch_id, product_id, qty_sum, revenue_sum)
    SELECT {day}, branch, 1 + branch % {products}, 1, branch FROM generate_series({branch}, {last_branch}) AS branch;
    INSERT INTO product_sales_daily (day, branch_id, product_id, qty_sum, revenue_sum)
    SELECT {day}, {branch}, product, 1, product FROM generate_series({product}, {last_product}) AS product
    ON CONFLICT DO NOTHING;
    DELETE FROM daily_sales_by_branch;
    INSERT INTO daily_sales_by_branch (day, branch_id, revenue_sum, items_sum, purchases_count,
        purchases_with_customer_count)
    SELECT day, branch_id, sum(revenue_sum), sum(qty_sum), 1, 1 FROM product_sales_daily GROUP BY day, branch_id;
    DELETE FROM daily_sales_of_chain;
    INSERT INTO daily_sales_of_chain (day, revenue_sum, items_sum, purchases_count, purchases_with_customer_count)
    SELECT day, sum(revenue_sum), sum(items_sum), sum(purchases_count), sum(purchases_with_customer_count)
    FROM daily_sales_by_branch GROUP BY day;
    INSERT INTO forgotten_visits (customer_id, branch_id, day, purchases_count, last_purchase_at)
    SELECT md5(n::text)::uuid, 1, {day}, 1, '2026-03-01 12:00Z' FROM generate_series({customer}, {last_customer}) AS n;
    INSERT INTO customer_loyalty (customer_id, branch_id, purchases_count, last_purchase_at)
    SELECT md5(n::text)::uuid, 1, 1, '2026-03-01 12:00Z'
    FROM generate_series({customer} + {missing}, {last_customer}) AS n;
    INSERT INTO customer_loyalty_chain (customer_id, purchases_count, last_purchase_at)
    SELECT customer_id, 1, last_purchase_at FROM customer_loyalty ON CONFLICT DO NOTHING;
"""
KINDS = {"branch": BRANCHES, "product": PRODUCTS, "customer": CUSTOMERS}
WRONG = {
    BRANCHES: "UPDATE monthly_sales_by_branch SET items_sum = items_sum + 1"
    " WHERE branch_id = (SELECT max(branch_id) FROM monthly_sales_by_branch)",
    PRODUCTS: "DELETE FROM product_sales_of_chain_sums WHERE period = 'all'"
    " AND product_id = (SELECT max(product_id) FROM product_sales_of_chain_sums)",
    CUSTOMERS: "UPDATE customer_loyalty_chain SET purchases_count = 9"
    " WHERE customer_id = (SELECT max(customer_id::text)::uuid FROM customer_loyalty_chain)",
}


def grow(chain: Chain, times: int) -> None:
    """To as many branches, products and customers as make each range too large."""
    begins = {one: (times - 1) ** 2 * KEYS[kind] + 1 for one, kind in KINDS.items()}
    ends = {f"last_{one}": times**2 * KEYS[kind] for one, kind in KINDS.items()}
    query(chain.url, GROW.format(day=DAY, products=KEYS[PRODUCTS], missing=MISSING, **begins, **ends))


def ranges(chain: Chain, kind: str) -> list[Part]:
    rows = query(chain.url, f"SELECT kind, first, last FROM audit_parts WHERE kind = '{kind}'")
    return sorted((Part(*row) for row in rows), key=lambda part: number(kind, part.first))


def number(kind: str, key: str) -> int:
    return uuid.UUID(key).int if kind == CUSTOMERS else int(key)


async def test_ranges(chain: Chain, purchases_db: str) -> None:
    """They are cut as they grow: none has more keys than it may, together they have everything; one wrong row in each
    kind is found where it is, and a repair of any day mends it, and no more."""
    query(purchases_db, "UPDATE chain_settings SET dropped_before = '2026-04-01'")  # nobody asks who sold all that
    before = dict.fromkeys(KEYS, 1)
    for times in (1, 2):
        grow(chain, times)
        assert (await sweep(chain)).verdict is Verdict.DIFFERENT  # what sums it up is not there yet
        rebuilt = await rebuild.rebuild_all(chain.url, chain.source, FIRST)
        assert rebuilt.repaired["customer_loyalty"] == MISSING
        assert (await sweep(chain)).verdict is Verdict.AGREED
        for kind in KEYS:
            cut = ranges(chain, kind)
            assert len(cut) > before[kind]
            before[kind] = len(cut)
            ends = [(number(kind, part.first), number(kind, part.last)) for part in cut]
            assert (ends[0][0], ends[-1][1]) == (0, 2**128 - 1 if kind == CUSTOMERS else 2**63 - 1)
            assert all(end + 1 == start for (_, end), (start, _) in itertools.pairwise(ends))
            for part in cut:
                keys = (
                    parts._KEYS_OF[kind].replace("%(first)s", f"'{part.first}'").replace("%(last)s", f"'{part.last}'")
                )
                assert query(chain.url, f"SELECT count(*) <= {2 * RANGE_KEYS[kind]} FROM ({keys}) AS keys") == [(True,)]
    for statement in WRONG.values():
        query(chain.url, statement)
    found = await sweep(chain)
    assert (found.verdict, found.wrong) == (Verdict.DIFFERENT, len(WRONG))
    for kind in KEYS:
        wrong = query(chain.url, f"SELECT kind, first, last FROM audit_parts WHERE kind = '{kind}' AND verdict <> 1")
        assert [Part(*row) for row in wrong] == ranges(chain, kind)[-1:]
    mended = await rebuild.rebuild_day(chain.url, chain.source, date(2026, 4, 1))
    assert mended.repaired.total() == len(WRONG)
    assert (await status(chain)).verdict is Verdict.AGREED


async def test_two_days_with_each_others_sales(chain: Chain) -> None:
    """More of them than one round corrects: a repair of either day brings all home."""
    await chain.sell(2 * MISTOLD_MAX + 100, seed=2, days=2)
    await chain.apply(await chain.recorded())
    right, log = all_rows(chain.url), chain.ids()
    enough = query(chain.url, f"SELECT count(*) > {MISTOLD_MAX} FROM analytics_event_log GROUP BY day")
    assert enough == [(True,), (True,)]
    query(chain.url, f"UPDATE analytics_event_log SET day = '{FIRST}'::date + 1 - (day - '{FIRST}')")
    assert chain.ids() != log
    rebuilt = await rebuild.rebuild_day(chain.url, chain.source, FIRST)
    assert (rebuilt.right, len(rebuilt.foreign), rebuilt.added) == (True, 0, 0)
    assert (all_rows(chain.url), chain.ids()) == (right, log)
    assert (await sweep(chain)).verdict is Verdict.AGREED


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
    assert (rebuilt.right, len(rebuilt.foreign), rebuilt.added) == (True, FOREIGN, 0)
    assert rebuilt.repaired["product_sales_daily"] == PRODUCTS_OF_EACH * BRANCHES_OF_EACH
    assert all_rows(chain.url) == right
    assert [row for row in chain.ids() if row[1]] == log
    assert query(chain.url, "SELECT count(*) FROM analytics_event_log WHERE day IS NULL") == [(FOREIGN,)]
