"""The audit never says AGREED while a recorded sale is not counted, or anything else is wrong: in random histories,
with sales of all zones that there are.

Sales are recorded, delivered, lost, quarantined, forged, counted twice and invented; cells are changed by hand, days
are repaired; and after each of that, what the audit says is held against what is so.
"""

import os
import random
import uuid
from collections.abc import Awaitable, Callable
from datetime import date

import pytest

from analytics_svc.ingest.events import decode
from analytics_svc.proof import parts, rebuild
from analytics_svc.proof.verdicts import Verdict
from analytics_svc.purchase import PurchaseCreated
from chassis import zones
from tests.conftest import pool
from tests.integration.chain import Chain
from tests.integration.proof.test_audit import anew, auditor, sweep
from tests.integration.proof.test_business_days import recent_moments, record
from tests.integration.purchase_events import query, read_models

HISTORIES = int(os.environ.get("HISTORIES", "2"))
FIRST_SEED = int(os.environ.get("SEED", "1"))
STEPS = 8
WINDOWS = 16  # months that the recorded days lie in, at most
CELLS = [
    "UPDATE daily_sales_by_branch SET revenue_sum = revenue_sum + 1 WHERE (day, branch_id) = {}",
    "DELETE FROM daily_sales_by_branch WHERE (day, branch_id) = {}",
    "UPDATE product_sales_daily SET qty_sum = qty_sum + 1 WHERE (day, branch_id) = {}",
    "UPDATE product_sales_daily SET product_id = product_id + 7000 WHERE (day, branch_id) = {}",
    "UPDATE product_sales_totals SET qty_sum = qty_sum + 1 WHERE branch_id = 0 AND {} IS NOT NULL",
    "UPDATE daily_sales_of_chain SET items_sum = items_sum + 1 WHERE (day, 1) <> {}",
    "UPDATE analytics_event_log SET day = day - 1 WHERE (day, branch_id) = {}",
]


class History:
    def __init__(self, chain: Chain, purchases_url: str, chance: random.Random) -> None:
        self._chain, self._purchases_url, self._chance = chain, purchases_url, chance
        self._under_way: list[PurchaseCreated] = []
        self._known: set[str] = set(self._recorded())  # of the histories before

    def _recorded(self) -> dict[str, PurchaseCreated]:
        bodies = query(self._purchases_url, "SELECT payload_json::text FROM outbox_events")
        events = [decode(body.encode(), zones.load("UTC")) for (body,) in bodies]
        return {event.event_id: event for event in events}

    async def live(self) -> None:
        actions: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self._sell, 4), (self._deliver, 5), (self._lose, 1), (self._quarantine, 1), (self._forge, 1),
            (self._invent, 1), (self._change, 2), (self._repair, 2),
        ]  # fmt: skip
        await self._sell()
        for _ in range(STEPS):
            (action,) = self._chance.choices([a for a, _ in actions], [weight for _, weight in actions])
            await action()
            await self._check()
        query(self._chain.url, "DELETE FROM quarantined_events")
        await rebuild.rebuild_all(self._chain.url, self._chain.source, self._chain.source.today())
        assert await self._says() is Verdict.AGREED
        await self._check()

    async def _sell(self) -> None:
        name = self._chance.choice(sorted(zones.names()))
        moments = recent_moments(zones.load(name))
        async with pool(self._purchases_url, "purchases_service", size=3) as opened:
            await record(opened, name, self._chance.sample(moments, min(3, len(moments))))
        new = {event_id: event for event_id, event in self._recorded().items() if event_id not in self._known}
        self._known |= new.keys()
        self._under_way += new.values()

    def _take(self) -> list[PurchaseCreated]:
        taken = self._chance.sample(self._under_way, min(len(self._under_way), self._chance.randint(1, 4)))
        self._under_way = [event for event in self._under_way if event not in taken]
        return taken

    async def _deliver(self) -> None:
        if taken := self._take():
            await self._chain.apply([*taken, *self._chance.sample(taken, 1)])

    async def _lose(self) -> None:
        self._take()

    async def _quarantine(self) -> None:
        for event in self._take()[:1]:
            query(
                self._chain.url,
                "INSERT INTO quarantined_events (event_id, reason, detail, body, properties)"
                f" VALUES ('{event.event_id}', 'X', '', '{event.event_id}', '{{}}') ON CONFLICT DO NOTHING",
            )

    async def _forge(self) -> None:
        if taken := self._take():
            items = [item._replace(product_id=item.product_id + 500) for item in taken[0].items]
            await self._chain.apply([taken[0]._replace(items=items), *taken])

    async def _invent(self) -> None:
        if known := sorted(self._recorded().values()):
            await self._chain.apply([self._chance.choice(known)._replace(event_id=str(uuid.uuid4()))])

    async def _change(self) -> None:
        rows = query(self._chain.url, "SELECT day, branch_id FROM daily_sales_by_branch ORDER BY 1, 2")
        if rows:
            day, branch = self._chance.choice(rows)
            query(self._chain.url, self._chance.choice(CELLS).format(f"('{day}'::date, {branch})"))

    async def _repair(self) -> None:
        days: list[date] = sorted({event.day for event in self._recorded().values()})
        if days:
            await rebuild.rebuild_day(self._chain.url, self._chain.source, self._chance.choice(days))

    async def _says(self) -> Verdict | None:
        worker = auditor(self._chain)
        for _ in range(WINDOWS):
            await worker._look_through_a_month()
        await sweep(self._chain, worker)
        async with pool(self._chain.url, "analytics_consumer", size=1) as opened, opened.connection() as connection:
            await worker.compare(connection)  # which does not look as closely, and must not forget what was found
            return (await parts.read_status(connection)).verdict

    async def _check(self) -> None:
        said, recorded = await self._says(), self._recorded()
        if said is not Verdict.AGREED:
            return
        counted = {event_id for event_id, day in self._chain.ids() if day}
        kept = {event_id for (event_id,) in query(self._chain.url, "SELECT event_id::text FROM quarantined_events")}
        assert recorded.keys() - kept <= counted
        assert counted <= recorded.keys()
        should = [event for event_id, event in recorded.items() if event_id in counted]
        assert read_models(self._chain.url) == await anew(self._chain, should)


@pytest.mark.timeout(36_000)
async def test_never_agreed_while_anything_is_wrong(chain: Chain, purchases_db: str) -> None:
    for seed in range(FIRST_SEED, FIRST_SEED + HISTORIES):
        try:
            await History(chain, purchases_db, random.Random(seed)).live()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
