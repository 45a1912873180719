"""Three years of a chain: the page shows all of them to the cent, and how long it takes is printed.

    make test LONG=1 ARGS='tests/integration/pages/test_years.py -s'

sells all of it through the whole system first, which takes some minutes; without, it is four months.
"""

import asyncio
import datetime
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import pytest

from pages_svc.settings import ServeSettings
from pages_svc.upstream.sales import Sales
from pages_svc.upstream.services import Services
from pos.client import Item, PosClient, Sale
from tests.conftest import eventually
from tests.integration.pages.conftest import Site
from tests.integration.pages.test_owner import get
from tests.sizes import how_many

DAYS, BRANCHES, PRODUCTS, CUSTOMERS = how_many("YEARS_DAYS"), 20, 400, 20_000
BASKET, TIMES = 20, 30
WITHIN_S = 60.0 + DAYS
DAY = datetime.timedelta(days=1)


def history(now: datetime.datetime) -> Iterator[Sale]:
    """Each branch sells a full basket a day, of products next to each other; the days end at this moment."""
    for day in range(DAYS):
        for branch in range(1, BRANCHES + 1):
            number = day * BRANCHES + branch
            first = number * 7 % PRODUCTS
            yield Sale(
                receipt_id=str(day),
                branch_id=branch,
                cashier_id=17,
                pos_id="POS-1",
                items=[Item(1001 + (first + n) % PRODUCTS, 100 + branch) for n in range(BASKET)],
                customer_id=f"00000000-0000-4000-8000-{number % CUSTOMERS:012d}",
                purchase_time=now - (DAYS - 1 - day) * DAY,
            )


@pytest.fixture
async def sales(site: Site) -> AsyncIterator[Sales]:
    """The questions that the pages ask, one by one."""
    targets: dict[str, Any] = {f"{name}_target": address for name, address in site.address.items() if name != "pages"}
    services = Services(ServeSettings(**targets), None)
    yield Sales(services)
    await services.close()


@pytest.mark.timeout(300 + 4 * DAYS)
async def test_years_are_shown_to_the_cent(site: Site, till: PosClient, sales: Sales, one_day: None) -> None:
    now = datetime.datetime.now(datetime.UTC)
    first, today = (now - (DAYS - 1) * DAY).date(), now.date()
    sold = list(history(now))
    for _, outcome in await asyncio.to_thread(lambda: list(till.upload_purchases(sold, register_customers=True))):
        assert not isinstance(outcome, Exception), outcome
    whole = f"{DAYS * BASKET * sum(100 + branch for branch in range(1, BRANCHES + 1)) / 100:,.2f}"
    everything = f"/?range=custom&first={first}&last={today}"

    async def shown() -> bool:
        text = (await asyncio.to_thread(get, site, everything))[1]
        return whole in text and "Audited, all agree" in text

    await eventually(shown, "all of it is on the page, and proven", WITHIN_S)
    asked: dict[str, Callable[[], Awaitable[object]]] = {
        "days from the first": lambda: sales.daily(first, today, None),
        "best products of 28 days": lambda: sales.products(today - 27 * DAY, today, None, limit=10, by_units=False),
        "best products from the first day": lambda: sales.products(first, today, None, limit=10, by_units=False),
        "customers": lambda: sales.customers(None, limit=10),
        "recorded by now": lambda: sales.recorded_until(now, today, None),
        "recorded by now, a week ago": lambda: sales.recorded_until(now - 7 * DAY, today - 7 * DAY, None),
        "calendar": lambda: sales.calendar(None),
        "audit": sales.audit,
    }
    for name, ask in asked.items():
        print(f"{name}: {_said([await _took_ms(ask) for _ in range(TIMES)])}")
    for consumer in ("", ", without a consumer"):
        if consumer:
            site.kill("consumer")
        for path in ("/?range=28", "/?range=28&branch=3", everything):
            looks = [partial(_look, site, f"{path}&best={'units' if n % 2 else 'revenue'}") for n in range(TIMES)]
            print(f"{path}{consumer}: {_said([await _took_ms(look) for look in looks])}")


async def _look(site: Site, path: str) -> None:
    assert (await asyncio.to_thread(get, site, path))[0] == 200


async def _took_ms(ask: Callable[[], Awaitable[object]]) -> float:
    begun = time.perf_counter()
    await ask()
    return 1_000 * (time.perf_counter() - begun)


def _said(took_ms: list[float]) -> str:
    return f"median {statistics.median(took_ms):.0f} ms, worst {max(took_ms):.0f} ms"
