"""Two cells, each with a purchases database, a purchases service and a relay of its own, and one analytics for both."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from pika.adapters.blocking_connection import BlockingChannel

import purchases_svc.__main__ as purchases
import relay_svc.__main__ as relay
from analytics_svc.errors import PurchasesUnavailable
from analytics_svc.proof import rebuild
from analytics_svc.proof.audit import compare
from analytics_svc.proof.verdicts import Verdict
from analytics_svc.upstream import chain
from analytics_svc.upstream.chain import Chain
from chassis import lifecycle, zones
from chassis.cells import CellsSettings
from chassis.settings import SettingsError
from pages_svc.settings import ServeSettings
from pages_svc.upstream.sales import Calendar, Sales
from pages_svc.upstream.services import Services
from pos.client import Item, PosClient, Recorded, Sale
from pos.errors import WrongCell
from purchases_svc.settings import ServeSettings as PurchasesSettings
from relay_svc.settings import ServeSettings as RelaySettings
from retail.analytics.v1 import quarantine_service_pb2 as quarantine_pb
from retail.analytics.v1.quarantine_service_pb2_grpc import QuarantineServiceStub
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.conftest import WAIT_S, _clone, eventually, pool, today
from tests.integration.conftest import free_address, running
from tests.integration.consumers import COUNTED, QUARANTINED, consuming, counts, publish
from tests.integration.purchase_events import query, sold
from tests.integration.sales import refusal, sale

NORTH, SOUTH, UNLISTED = 7, 150, 900  # branches


@dataclass
class World:
    """What runs, and what of it is to be stopped before the end."""

    file: Path
    databases: dict[str, str]
    purchases: dict[str, str] = field(default_factory=lambda: {name: free_address() for name in ("north", "south")})
    relays: dict[str, str] = field(default_factory=lambda: {name: free_address() for name in ("north", "south")})

    def list_cells(self, south: str = '"100-199"', north: str = '"1-99"') -> None:
        branches = {"north": north, "south": south}
        said = "".join(
            f'[{name}]\nbranches = [{listed}]\npurchases = "{self.purchases[name]}"\nrelay = "{self.relays[name]}"\n'
            for name, listed in branches.items()
        )
        new = self.file.with_suffix(".new")
        new.write_text(said)
        new.rename(self.file)

    @asynccontextmanager
    async def selling(self, name: str) -> AsyncIterator[grpc.aio.Channel]:
        config = PurchasesSettings(
            self.databases[name],
            listen=self.purchases[name],
            metrics_listen="127.0.0.1:0",
            cells_file=str(self.file),
            cell=name,
        )
        async with running(lambda stop: purchases.serve(config, stop), config.listen) as channel:
            yield channel

    @asynccontextmanager
    async def relaying(self, name: str, amqp_url: str) -> AsyncIterator[grpc.aio.Channel]:
        config = RelaySettings(
            self.databases[name],
            amqp_url=amqp_url,
            listen=self.relays[name],
            metrics_listen="127.0.0.1:0",
            cell=name,
        )
        async with running(lambda stop: relay.serve(config, stop), config.listen) as channel:
            yield channel

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[Chain]:
        config = CellsSettings(cells_file=str(self.file))
        async with (
            chain.connect(config, zones.load("UTC"), None, purchases="", relay="") as cells,
            lifecycle.beside(cells.follow()),
        ):
            yield cells


@pytest.fixture
def world(postgres_url: str, _purchases_template: str, tmp_path: Path) -> Iterator[World]:
    north, south = (_clone(postgres_url, _purchases_template) for _ in range(2))
    made = World(tmp_path / "cells.toml", {"north": next(north), "south": next(south)})
    made.list_cells()
    yield made
    for database in (north, south):
        next(database, None)


def a_sale(branch_id: int, receipt: str) -> Sale:
    return Sale(receipt_id=receipt, branch_id=branch_id, cashier_id=1, pos_id="POS-1", items=[Item(1001, 250)])


def sell_everywhere(address: str, prefix: str) -> list[Recorded]:
    """By a call, an open stream and an upload each, in both cells, from a till that knows of one."""
    with PosClient.at(address) as till:
        recorded = [till.create_purchase(a_sale(branch, f"{prefix}-c")) for branch in (NORTH, SOUTH)]
        with till.open_stream() as stream:
            recorded += [stream.record(a_sale(branch, f"{prefix}-s")) for branch in (NORTH, SOUTH)]
        backlog = [a_sale(branch, f"{prefix}-u{n}") for n in range(3) for branch in (NORTH, SOUTH)]
        for uploaded in till.upload_purchases(backlog):
            assert isinstance(uploaded.outcome, Recorded), uploaded
            recorded.append(uploaded.outcome)
    return recorded


async def agrees(url: str, cells: Chain) -> Verdict:
    async with pool(url, "analytics_consumer") as opened:
        return (await compare(opened, cells, today(), today(), wait_s=WAIT_S)).verdict


def through(url: str) -> datetime | None:
    moment: datetime | None = query(url, "SELECT complete_through_at FROM freshness")[0][0]
    return moment


async def test_two_cells(
    world: World, analytics_db: str, amqp_url: str, channel: BlockingChannel, one_day: None
) -> None:
    async with AsyncExitStack() as stack:
        north = await stack.enter_async_context(world.selling("north"))
        south = await stack.enter_async_context(world.selling("south"))
        await stack.enter_async_context(world.relaying("north", amqp_url))
        relaying_south = AsyncExitStack()
        await relaying_south.enter_async_context(world.relaying("south", amqp_url))
        stack.push_async_callback(relaying_south.aclose)
        cells = await stack.enter_async_context(world.asking())
        consumer = await stack.enter_async_context(
            consuming(analytics_db, amqp_url, cells_file=str(world.file), log_level="INFO")
        )

        # A till that knows one of them sells in both; the sales are where their branches are.
        recorded = await asyncio.to_thread(sell_everywhere, world.purchases["north"], "a")
        assert len(recorded) == 10 and not any(each.replayed for each in recorded)
        again = await asyncio.to_thread(sell_everywhere, world.purchases["south"], "b")
        assert len(again) == 10
        for name, branch in (("north", NORTH), ("south", SOUTH)):
            stored = query(world.databases[name], "SELECT branch_id, count(*) FROM purchases GROUP BY 1")
            assert stored == [(branch, 10)]
        await counts(analytics_db, COUNTED, 20)
        assert await agrees(analytics_db, cells) is Verdict.AGREED

        # A cell without its relay: the other's sales are counted, and nothing is promised over what is not.
        await relaying_south.aclose()
        late: Any = await asyncio.to_thread(lambda: sell_one(world.purchases["south"], SOUTH, "late"))
        await asyncio.to_thread(lambda: sell_one(world.purchases["north"], NORTH, "later"))
        await counts(analytics_db, COUNTED, 21)
        before = through(analytics_db)
        marks = "SELECT cell, complete_through_at > '{}' FROM cell_marks ORDER BY cell"

        async def north_goes_on() -> bool:
            return query(analytics_db, marks.format(late.purchase.create_time)) == [("north", True), ("south", False)]

        await eventually(north_goes_on, "the north's mark goes on")
        assert before is not None and (through(analytics_db) or before) < late.purchase.create_time
        await relaying_south.enter_async_context(world.relaying("south", amqp_url))
        await counts(analytics_db, COUNTED, 22)

        async def all_told() -> bool:
            return bool((through(analytics_db) or before) > late.purchase.create_time)

        await eventually(all_told, "the time goes on")

        # What is of no cell that is listed is kept apart, until it is.
        publish(channel, sold("1.00", branch_id=UNLISTED).body())
        publish(channel, sold("1.00", branch_id=NORTH).body(), headers={"cell": "west"})
        await counts(analytics_db, QUARANTINED, 2)
        kept = query(analytics_db, "SELECT quarantine_id::text, reason, detail FROM quarantined_events ORDER BY detail")
        assert [(reason, detail) for _, reason, detail in kept] == [
            ("UNKNOWN_CELL", f"branch {UNLISTED} is in no cell"),
            ("UNKNOWN_CELL", "it comes from 'west', which is not listed"),
        ]
        refused = await refusal(_stub(south).CreatePurchase(sale(branch_id=UNLISTED), timeout=WAIT_S))
        assert (refused.reason, refused.info.metadata.get("address")) == ("WRONG_CELL", None)
        refused = await refusal(_stub(north).CreatePurchase(sale(branch_id=SOUTH), timeout=WAIT_S))
        assert refused.info.metadata == {"cell": "south", "address": world.purchases["south"]}
        world.list_cells(south=f'"100-199", {UNLISTED}')

        async def taken() -> bool:
            with_it = PosClient.at(world.purchases["south"])
            return await asyncio.to_thread(lambda: _sells(with_it, UNLISTED))

        await eventually(taken, "the south records the new branch")
        await counts(analytics_db, COUNTED, 23)
        quarantine: Any = QuarantineServiceStub(consumer)  # type: ignore[arg-type, unused-ignore]
        redrive = quarantine_pb.RedriveEventsRequest(quarantine_ids=[kept[0][0]])

        async def redriven() -> bool:
            return bool((await quarantine.RedriveEvents(redrive, timeout=WAIT_S)).redriven_count)

        await eventually(redriven, "the consumer knows of the new branch")

        async def known() -> bool:
            return cells.cells.of_branch(UNLISTED) is not None

        await eventually(known, "and so does whoever asks here")

        # That event was never recorded by any cell: it is foreign. A rebuild asks all cells, and makes it right.
        assert await agrees(analytics_db, cells) is Verdict.AGREED  # of today
        rebuilt = await rebuild.rebuild_all(analytics_db, cells, today())
        assert (rebuilt.purchases, len(rebuilt.foreign)) == (23, 1)
        query(analytics_db, "DELETE FROM daily_sales_by_branch WHERE branch_id >= 100")
        assert await agrees(analytics_db, cells) is Verdict.DIFFERENT
        assert (await rebuild.rebuild_day(analytics_db, cells, today())).right
        assert await agrees(analytics_db, cells) is Verdict.AGREED


async def test_a_cell_that_is_away(world: World, analytics_db: str) -> None:
    """Nothing is said of the others' days without it: what it has recorded is not called foreign, and not taken out."""
    async with world.selling("north"), world.asking() as cells:
        with pytest.raises(PurchasesUnavailable):
            await agrees(analytics_db, cells)
        with pytest.raises(PurchasesUnavailable):
            await rebuild.rebuild_day(analytics_db, cells, date(2026, 3, 1))


async def test_a_file_that_makes_no_sense(world: World, analytics_db: str) -> None:
    """It keeps a process from starting; one that runs goes on with what it said before."""
    async with world.selling("north") as north:
        world.list_cells(south='"1-199"')  # branches of both
        async with pool(analytics_db, "analytics_consumer"):
            with pytest.raises(SettingsError, match="branch 1 is in north and in south"):
                async with world.asking():
                    pass
        refused = await refusal(_stub(north).CreatePurchase(sale(branch_id=SOUTH), timeout=WAIT_S))
        assert refused.reason == "WRONG_CELL"
        await _stub(north).CreatePurchase(sale(branch_id=NORTH, seconds=_now()), timeout=WAIT_S)


async def test_the_pages_ask_all_cells(world: World, one_day: None) -> None:
    """What was recorded today is what both have recorded; of one branch, what its cell has."""
    services = Services(ServeSettings(cells_file=str(world.file)), None)
    sales = Sales(services)
    async with world.selling("north") as north, world.selling("south") as south:
        for channel, branch, count in ((north, NORTH, 2), (south, SOUTH, 3)):
            for _ in range(count):
                await _stub(channel).CreatePurchase(sale(branch_id=branch, seconds=_now()), timeout=WAIT_S)
        end = datetime.now(UTC) + timedelta(days=1)
        for branch_id, recorded in ((None, 5), (NORTH, 2), (SOUTH, 3), (UNLISTED, 0)):
            assert (await sales.recorded_until(end, today(), branch_id)).purchase_count == recorded
        assert await sales.calendar(None) == Calendar(zones.load("UTC"), today(), today())
        assert (await sales.calendar(SOUTH)).first == today()
    await services.close()


async def test_positions_of_cells(world: World) -> None:
    """Of a cell that is new, all days are listed; of the others, those since the last answer."""
    async with world.selling("north") as north, world.selling("south") as south, world.asking() as cells:
        await _stub(north).CreatePurchase(sale(branch_id=NORTH, seconds=_now()), timeout=WAIT_S)
        first = await cells.recorded_days("1:2:3 of a release without cells")
        assert (first.days, set(json.loads(first.position))) == ([today()], {"north", "south"})
        await _stub(south).CreatePurchase(sale(branch_id=SOUTH, seconds=_now()), timeout=WAIT_S)
        only_north = json.dumps({"north": json.loads(first.position)["north"]})
        assert (await cells.recorded_days(only_north)).days == [today()]


def sell_one(address: str, branch: int, receipt: str) -> Recorded:
    with PosClient.at(address) as till:
        return till.create_purchase(a_sale(branch, receipt))


def _sells(opening: Any, branch: int) -> bool:
    with opening as till:
        try:
            till.create_purchase(a_sale(branch, "new"))
        except WrongCell:
            return False
        return True


def _stub(channel: grpc.aio.Channel) -> Any:
    return PurchasesServiceStub(channel)  # type: ignore[arg-type, unused-ignore]


def _now() -> int:
    return int(datetime.now(UTC).timestamp())
