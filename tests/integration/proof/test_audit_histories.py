"""The audit never says AGREED while a recorded sale is not counted, or anything else is wrong: in random histories,
with sales of all zones that there are.

Sales are recorded, delivered, lost, quarantined, forged, counted twice and invented; cells are changed by hand, days
are repaired, time passes; the audit gets on by a few steps, or by none; and after each of that, what it says is held
against what is so: by the age that it gives itself, and now and then after it has looked at everything.
"""

import os
import random
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from analytics_svc.ingest.events import decode
from analytics_svc.proof import audit_status, rebuild
from analytics_svc.proof.auditor import Auditor
from analytics_svc.proof.verdicts import Verdict
from analytics_svc.purchase import PurchaseCreated
from chassis import zones
from chassis.postgres import Connection, Pool
from tests.conftest import pool
from tests.integration.auditing import anew, sweep
from tests.integration.chain import TABLES, Chain
from tests.integration.proof.test_business_days import recent_moments, record
from tests.integration.purchase_events import query, read_models
from tests.sizes import how_many

HISTORIES = how_many("AUDITED_HISTORIES")
FIRST_SEED = int(os.environ.get("SEED", "1"))
STEPS = 12
SWEEPS = 0.5  # of everything, in each history: they cost more than all the rest
REPAIRED = 0.3  # histories that end in a rebuild of everything
PLACES = 2  # in each history
AROUND = 4  # moments
PURCHASES_TABLES = ("outbox_events", "receipts", "idempotency_keys", "purchase_items", "purchases")
CELLS = [
    "UPDATE daily_sales_by_branch SET revenue_sum = revenue_sum + 1 WHERE (day, branch_id) = {}",
    "DELETE FROM daily_sales_by_branch WHERE (day, branch_id) = {}",
    "UPDATE product_sales_daily SET qty_sum = qty_sum + 1 WHERE (day, branch_id) = {}",
    "UPDATE product_sales_daily SET product_id = product_id + 7000 WHERE (day, branch_id) = {}",
    "UPDATE product_sales_of_chain_sums SET qty_sum = qty_sum + 1 WHERE period = 'all' AND {} IS NOT NULL",
    "UPDATE daily_sales_of_chain SET items_sum = items_sum + 1 WHERE (day, 1) <> {}",
    "UPDATE analytics_event_log SET day = day - 1 WHERE (day, branch_id) = {}",
]


class History:
    def __init__(
        self, chain: Chain, purchases_url: str, services: Pool, lock: Connection, chance: random.Random
    ) -> None:
        """`services` is the purchases service's pool; `lock` is what the auditor would hold its lock with."""
        self._chain, self._purchases_url, self._services, self._chance = chain, purchases_url, services, chance
        self._lock, self._auditor = lock, Auditor(chain.pool, chain.source, complete_wait_s=0)
        self._places = [self._place() for _ in range(PLACES)]
        self._recorded: dict[str, PurchaseCreated] = {}
        self._recorded_by: dict[str, datetime] = {}  # by the database's clock, after the commit
        self._under_way: list[PurchaseCreated] = []
        self._meddles = chance.random() < 0.5  # then an event that nobody recorded may stand in for a lost one
        self.agreed = self.lost = 0  # of how many sales that was said, and how many were lost

    async def live(self) -> None:
        actions: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self._sell, 5), (self._deliver, 4), (self._lose, 2), (self._quarantine, 1), (self._repair, 2),
            (self._let_time_pass, 3),
        ]  # fmt: skip
        if self._meddles:
            actions += [(self._forge, 1), (self._invent, 1), (self._change, 2)]
        self._begin()
        await self._sell()
        await self._deliver_all()
        for _ in range(STEPS):
            (action,) = self._chance.choices([a for a, _ in actions], [weight for _, weight in actions])
            await action()
            await self._audit_a_little()
            await self._check_age()
            if self._chance.random() < SWEEPS / STEPS:
                await self._check_everything()
        if self._chance.random() < REPAIRED:
            await self._repair_everything()

    async def _repair_everything(self) -> None:
        query(self._chain.url, "DELETE FROM quarantined_events")
        await rebuild.rebuild_all(self._chain.url, self._chain.source, self._chain.source.today())
        assert await self._says() is Verdict.AGREED
        await self._check_everything()

    def _begin(self) -> None:
        for url, tables in (
            (self._purchases_url, PURCHASES_TABLES),
            (self._chain.url, (*TABLES.split(", "), "quarantined_events", "audit_status")),
        ):
            query(url, "; ".join(f"DELETE FROM {table}" for table in tables))
        query(
            self._chain.url,
            "INSERT INTO audit_status DEFAULT VALUES; DELETE FROM audit_parts WHERE kind = 'day'; UPDATE audit_parts"
            " SET verdict = NULL, seen_at = NULL, tried_at = NULL, proven_at = NULL",
        )

    def _place(self) -> tuple[str, list[datetime]]:
        """A zone, and moments around one of its transitions: on one business day, or on two."""
        name = self._chance.choice(sorted(zones.names()))
        moments = recent_moments(zones.load(name))
        start = self._chance.randrange(0, len(moments), AROUND)
        return name, moments[start : start + AROUND]

    async def _sell(self) -> None:
        name, moments = self._chance.choice(self._places)
        await record(self._services, name, self._chance.sample(moments, self._chance.randint(1, len(moments))))
        ((by,),) = query(self._purchases_url, "SELECT clock_timestamp()")
        for event_id, body in query(
            self._purchases_url, "SELECT event_id::text, payload_json::text FROM outbox_events"
        ):
            if event_id not in self._recorded:
                self._recorded[event_id] = event = decode(body.encode(), zones.load("UTC"))
                self._recorded_by[event_id] = by
                self._under_way.append(event)

    def _take(self) -> list[PurchaseCreated]:
        taken = self._chance.sample(self._under_way, min(len(self._under_way), self._chance.randint(1, 4)))
        self._under_way = [event for event in self._under_way if event not in taken]
        return taken

    async def _deliver(self) -> None:
        if taken := self._take():
            await self._chain.apply([*taken, *self._chance.sample(taken, 1)])

    async def _deliver_all(self) -> None:
        while self._under_way:
            await self._deliver()

    async def _lose(self) -> None:
        """On its way, or before the relay has seen it."""
        for event in self._take():
            self.lost += 1
            if self._chance.random() < 0.5:
                query(self._purchases_url, f"DELETE FROM outbox_events WHERE event_id = '{event.event_id}'")

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
        known = self._recorded[self._chance.choice(sorted(self._recorded))]
        await self._chain.apply([known._replace(event_id=str(uuid.uuid4()))])

    async def _change(self) -> None:
        rows = query(self._chain.url, "SELECT day, branch_id FROM daily_sales_by_branch ORDER BY 1, 2")
        if rows:
            day, branch = self._chance.choice(rows)
            query(self._chain.url, self._chance.choice(CELLS).format(f"('{day}'::date, {branch})"))

    async def _repair(self) -> None:
        days = sorted({event.day for event in self._recorded.values()})
        await rebuild.rebuild_day(self._chain.url, self._chain.source, self._chance.choice(days))

    async def _let_time_pass(self) -> None:
        """What is old is not looked at because it is new."""
        query(self._chain.url, "UPDATE analytics_event_log SET processed_at = processed_at - interval '1 hour'")
        old = ", ".join(f"{column} = {column} - interval '1 hour'" for column in ("touched_at", "seen_at", "proven_at"))
        query(self._chain.url, f"UPDATE audit_parts SET {old}")
        query(self._chain.url, "UPDATE audit_status SET counted_from = counted_from - interval '1 hour'")

    async def _audit_a_little(self) -> None:
        for _ in range(self._chance.choice([0, 1, 1, 4])):
            if self._chance.random() < 0.5:
                await self._auditor.compare(self._lock)
            else:
                await self._auditor.prove(self._lock)

    async def _status(self) -> audit_status.Status:
        async with self._chain.pool.connection() as connection:
            return await audit_status.read(connection)

    async def _check_age(self) -> None:
        """Whatever was recorded before the time that AGREED gives itself is counted."""
        said = await self._status()
        if said.verdict is not Verdict.AGREED or self._meddles or said.compared_through is None:
            return
        before = {event_id for event_id, by in self._recorded_by.items() if by < said.compared_through}
        self.agreed += len(before)
        assert before <= self._counted() | self._quarantined(), "AGREED, and a recorded sale is not counted"

    def _counted(self) -> set[str]:
        return {event_id for event_id, day in self._chain.ids() if day}

    def _quarantined(self) -> set[str]:
        return {event_id for (event_id,) in query(self._chain.url, "SELECT event_id::text FROM quarantined_events")}

    async def _says(self) -> Verdict | None:
        await sweep(self._chain, self._auditor)
        await self._auditor.compare(self._lock)  # which does not look as closely, and must not forget what was found
        return (await self._status()).verdict

    async def _check_everything(self) -> None:
        if await self._says() is not Verdict.AGREED:
            return
        counted = self._counted()
        assert self._recorded.keys() - self._quarantined() <= counted
        assert counted <= self._recorded.keys()
        should = [event for event_id, event in self._recorded.items() if event_id in counted]
        assert read_models(self._chain.url) == await anew(self._chain, should)


@pytest.mark.timeout(36_000)
async def test_never_agreed_while_anything_is_wrong(chain: Chain, purchases_db: str) -> None:
    agreed = lost = 0
    began = datetime.now(UTC)
    async with (
        pool(purchases_db, "purchases_service", size=3) as services,
        pool(chain.url, "analytics_consumer", size=1) as opened,
        opened.connection() as lock,
    ):
        for seed in range(FIRST_SEED, FIRST_SEED + HISTORIES):
            history: Any = History(chain, purchases_db, services, lock, random.Random(seed))
            try:
                await history.live()
            except AssertionError as error:
                raise AssertionError(f"seed {seed}: {error}") from error
            agreed, lost = agreed + history.agreed, lost + history.lost
            print(f"history {seed}: {history.lost} sales lost, AGREED of {history.agreed}", flush=True)
    took = datetime.now(UTC) - began
    print(f"{HISTORIES} histories, {lost} sales lost, AGREED of {agreed} sales before its time; {took}")
