"""Three years of a chain: the page shows all of them, and how long it takes is printed (`-s`)."""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.bench.analytics.years import ROLL_UPS, SUMS
from tests.conftest import eventually
from tests.integration.pages.conftest import Site
from tests.integration.pages.test_owner import get

DAYS, BRANCHES, PRODUCTS, CUSTOMERS = 1_096, 20, 60, 20_000
TIMES = 30

HISTORY = f"""
INSERT INTO daily_sales_by_branch
SELECT day, branch_id, 1000 + branch_id, 120, 40, 20
FROM generate_series(current_date - {DAYS - 1}, current_date, interval '1 day') AS day,
    generate_series(1, {BRANCHES}) AS branch_id;

INSERT INTO product_sales_daily
SELECT day, branch_id, 1000 + product_id, 2, 10
FROM daily_sales_by_branch, generate_series(1, {PRODUCTS}) AS product_id;

INSERT INTO customer_loyalty
SELECT md5(number::text)::uuid, 1 + number % {BRANCHES}, 1 + number % 9, now()
FROM generate_series(1, {CUSTOMERS}) AS number;
"""


@pytest.fixture
def site(purchases_db: str, analytics_db: str, amqp_url: str, tmp_path: Path) -> Iterator[Site]:
    """Without a consumer, whose audit would find all that to be wrong."""
    with psycopg.connect(analytics_db) as connection:
        connection.execute(HISTORY + SUMS + ROLL_UPS)
    with psycopg.connect(analytics_db, autocommit=True) as connection:
        connection.execute("VACUUM (ANALYZE)")
    running = Site(purchases_db, analytics_db, amqp_url, tmp_path)
    try:
        for name in ("purchases", "analytics", "pages"):
            running.start(name)
        for name in ("purchases", "analytics", "pages"):
            running.wait_ready(name)
        yield running
    finally:
        running.end_all()


@pytest.mark.timeout(600)
async def test_three_years_are_shown_to_the_cent(site: Site, analytics_db: str) -> None:
    whole = f"{DAYS * sum(1_000 + branch for branch in range(1, BRANCHES + 1)):,}.00"
    with psycopg.connect(analytics_db) as connection:
        ((first, last),) = connection.execute("SELECT min(day), max(day) FROM daily_sales_by_branch").fetchall()
    everything = f"/?range=custom&first={first}&last={last}"

    async def shown() -> bool:
        return whole in get(site, everything)[1]

    await eventually(shown, "all of it is on the page")
    for path in ("/?range=28", "/?range=28&branch=3", everything):
        taken_ms = []
        for number in range(TIMES):
            begun = time.perf_counter()
            assert get(site, f"{path}&best={'units' if number % 2 else 'revenue'}")[0] == 200
            taken_ms.append(1_000 * (time.perf_counter() - begun))
        print(f"{path}: median {statistics.median(taken_ms):.0f} ms, worst {max(taken_ms):.0f} ms")
