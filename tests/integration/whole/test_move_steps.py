"""A move of a branch ends at any of its steps, is taken back, or taken over: no sale is lost, and none comes twice."""

import asyncio
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any

import grpc
import psycopg
import pytest

from chassis import migrate
from pos.client import PosClient
from pos.errors import OutcomeUnknown
from purchases_svc import branches
from purchases_svc.moving import cells_file, copying, protocol
from purchases_svc.moving.copying import MoveError
from purchases_svc.moving.protocol import Move, Side
from retail.purchases.v1.purchases_service_pb2 import (
    CreatePurchaseRequest,
    ListPurchasesRequest,
    ReportTillRequest,
)
from tests.conftest import WAIT_S, eventually, today
from tests.integration.purchase_events import query
from tests.integration.sales import refusal, sale
from tests.integration.whole.test_two_cells import World, _stub, a_sale, world  # noqa: F401

STEPS = 7  # that a move tells of
CUSTOMER = "7b0d3a52-56c4-4d0f-9d0e-3f1a2b4c5d6e"
OF_BRANCH = "SELECT {} FROM purchases WHERE branch_id = {}"


class Died(Exception):
    pass


def dying_at(step: int) -> Callable[[str], None]:
    told = []

    def tell(said: str) -> None:
        told.append(said)
        if len(told) == step:
            raise Died(said)

    return tell


@contextmanager
def moving(world: World, branch: int, tell: Callable[[str], object] = str, back: bool = False) -> Iterator[Move]:  # noqa: F811
    """With connections of its own, which end as when a process dies."""
    with ExitStack() as stack:
        sides = [Side(name, stack.enter_context(migrate.connect(world.databases[name]))) for name in ("north", "south")]
        source, target = reversed(sides) if back else sides
        yield Move(branch, source, target, tell, known_after_s=0)


def move(world: World, branch: int, tell: Callable[[str], object] = str) -> None:  # noqa: F811
    with moving(world, branch, tell) as it:
        it.run()


def a_request(branch: int, place: tuple[str, int] | None = None, **changes: Any) -> CreatePurchaseRequest:
    request = sale(branch_id=branch, seconds=int(datetime.now(UTC).timestamp()), **changes)
    if place:
        request.journal_entry.epoch, request.journal_entry.sequence = place
    return request


def states(world: World, branch: int) -> list[str | None]:  # noqa: F811
    found = (
        query(world.databases[name], f"SELECT state FROM branch_moves WHERE branch_id = {branch}")
        for name in ("north", "south")
    )
    return [rows[0][0] if rows else None for rows in found]


def stored(world: World, name: str, branch: int) -> set[str]:  # noqa: F811
    return {row[0] for row in query(world.databases[name], OF_BRANCH.format("idempotency_key::text", branch))}


async def test_it_ends_anywhere_and_goes_on(world: World) -> None:  # noqa: F811
    """Whatever the step, the next call goes on; what was sold meanwhile comes along, and each key is answered once."""
    async with world.selling("north") as north_channel, world.selling("south") as south_channel:
        north, south = _stub(north_channel), _stub(south_channel)
        for step in range(1, STEPS + 2):
            branch, epoch = 10 + step, str(uuid.uuid4())
            requests = [a_request(branch, (epoch, n)) for n in (1, 2, 4)]
            requests.append(a_request(branch, customer_id=CUSTOMER, register_customer=True))
            answers = [await north.CreatePurchase(request, timeout=WAIT_S) for request in requests]
            report = ReportTillRequest(
                branch_id=branch, pos_id="POS-3", epoch=epoch, first_sequence=1, last_sequence=4, void_sequences=[3]
            )
            await north.ReportTill(report, timeout=WAIT_S)
            with suppress(Died):
                await asyncio.to_thread(move, world, branch, dying_at(step))
            # Its old cell takes sales until it says that it does not, and the new one as soon as it says so.
            late = a_request(branch, (epoch, 5))
            takes = south if states(world, branch)[0] in ("LEAVING", "LEFT") else north
            with suppress(grpc.aio.AioRpcError):
                answers.append(await takes.CreatePurchase(late, timeout=WAIT_S))
                requests.append(late)
            await asyncio.to_thread(move, world, branch)
            await asyncio.to_thread(move, world, branch)  # which changes nothing
            assert states(world, branch) == ["LEFT", "HERE"]
            assert stored(world, "south", branch) == {request.idempotency_key for request in requests}, step
            for request, answer in zip(requests, answers, strict=True):
                again = await _until_taken(south, request)
                assert again.replayed and again.purchase == answer.purchase
                assert again.consistency_token == answer.consistency_token
            refused = await _until_refused(north, requests[0])
            assert refused.info.metadata == {"cell": "south", "address": world.purchases["south"]}
            state = (await south.ReportTill(report, timeout=WAIT_S)).state
            assert state.complete_through == (5 if late in requests else 4) and not state.missing_count
            assert (await refusal(north.ReportTill(report, timeout=WAIT_S))).reason == "WRONG_CELL"
            await south.CreatePurchase(a_request(branch, customer_id=CUSTOMER), timeout=WAIT_S)


async def test_a_server_that_has_not_heard_of_it(
    world: World,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The statement itself refuses what is not of this cell any more, and takes what comes with it."""
    monkeypatch.setattr(branches, "LOOK_EVERY_S", WAIT_S * 10)
    async with world.selling("north") as north_channel, world.selling("south"):
        north = _stub(north_channel)
        known = a_request(11)
        await north.CreatePurchase(known, timeout=WAIT_S)
        await asyncio.to_thread(move, world, 11)
        assert (await north.CreatePurchase(known, timeout=WAIT_S)).replayed
        refused = await refusal(north.CreatePurchase(a_request(11), timeout=WAIT_S))
        assert (refused.reason, refused.info.metadata["cell"]) == ("WRONG_CELL", "south")
        report = ReportTillRequest(
            branch_id=11, pos_id="POS-3", epoch=str(uuid.uuid4()), first_sequence=1, last_sequence=0
        )
        assert (await refusal(north.ReportTill(report, timeout=WAIT_S))).reason == "WRONG_CELL"
        assert query(world.databases["north"], "SELECT count(*) FROM purchases, outbox_events, receipts") == [(1,)]

        def upload() -> dict[str, str]:
            sales = [a_sale(branch, f"u{branch}-{n}") for n in range(15) for branch in (11, 12)]
            # Each cell says that the other one has the branch: that is no refusal.
            impatient = PosClient.at(world.purchases["north"], attempt_timeout_s=5.0, total_timeout_s=5.0)
            with impatient as till, pytest.raises(OutcomeUnknown, match="each cell says"):
                till.create_purchase(a_sale(11, "c"))
            with PosClient.at(world.purchases["north"]) as till:
                return {each.sale.receipt_id: type(each.outcome).__name__ for each in till.upload_purchases(sales)}

        outcomes = await asyncio.to_thread(upload)
        assert outcomes == {
            f"u{branch}-{n}": name for branch, name in ((11, "OutcomeUnknown"), (12, "Recorded")) for n in range(15)
        }
        assert query(world.databases["north"], OF_BRANCH.format("count(*)", 12)) == [(15,)]


async def test_what_all_cells_tell_is_right_at_every_step(
    world: World,  # noqa: F811
    one_day: None,
) -> None:
    """Also to who has not read the new file, or reads one that is wrong: each sale is told once."""
    async with (
        world.selling("north") as north_channel,
        world.selling("south") as south_channel,
        world.asking() as cells,
    ):
        north, south = _stub(north_channel), _stub(south_channel)
        requests = [a_request(branch) for branch in (11, 11, 11, 12, 150)]
        for request in requests:
            await (south if request.purchase.branch_id == 150 else north).CreatePurchase(request, timeout=WAIT_S)
        loop, looks = asyncio.get_running_loop(), []

        async def told() -> tuple[dict[int, int], list[str]]:
            totals = (await cells.control_totals(today(), today())).totals
            events = [event async for chunk in cells.export(today(), today()) for event in chunk]
            assert len({event.event_id for event in events}) == len(events)
            return {branch: row.purchases for (_, branch), row in totals.items()}, [str(e.branch_id) for e in events]

        def look(_: str = "") -> None:
            looks.append(asyncio.run_coroutine_threadsafe(told(), loop).result(WAIT_S))

        await asyncio.to_thread(move, world, 11, look)
        assert len(looks) == STEPS
        for totals, branches_told in looks:
            assert totals == {11: 3, 12: 1, 150: 1}
            assert sorted(branches_told) == ["11", "11", "11", "12", "150"]
        await _until_taken(south, a_request(11))
        for south_has in ('"100-199"', '11, "100-199"', '"100-199"'):
            world.list_cells(south=south_has, north='"1-99"' if "11" not in south_has else '"1-10", "12-99"')
            await asyncio.to_thread(look)
            assert looks[-1][0] == {11: 4, 12: 1, 150: 1}
            assert sorted(looks[-1][1]) == ["11", "11", "11", "11", "12", "150"]
        query(world.databases["north"], "UPDATE branch_moves SET since = since - interval '61 minutes'")
        assert (await told())[0] == {11: 4, 12: 1, 150: 1}
        mine = await north.ListPurchases(ListPurchasesRequest(), timeout=WAIT_S)
        assert [each.branch_id for each in mine.purchases] == [12]


async def test_it_is_taken_back(world: World) -> None:  # noqa: F811
    """At any step before the new cell takes the sales; and moved once more afterwards."""
    async with world.selling("north") as north_channel, world.selling("south") as south_channel:
        north, south = _stub(north_channel), _stub(south_channel)
        for step in range(2, STEPS):
            branch = 10 + step
            first = await north.CreatePurchase(a_request(branch), timeout=WAIT_S)
            with pytest.raises(Died):
                await asyncio.to_thread(move, world, branch, dying_at(step))
            with moving(world, branch) as it:
                await asyncio.to_thread(it.cancel)
            with moving(world, branch) as it, pytest.raises(MoveError, match="not on its way"):
                await asyncio.to_thread(it.cancel)
            second = await _until_taken(north, a_request(branch))
            await asyncio.to_thread(move, world, branch)
            both = await south.ListPurchases(ListPurchasesRequest(branch_id=branch), timeout=WAIT_S)
            assert {each.purchase_id for each in both.purchases} == {
                answer.purchase.purchase_id for answer in (first, second)
            }
            with moving(world, branch) as it, pytest.raises(MoveError, match="already"):
                await asyncio.to_thread(it.cancel)


@pytest.mark.parametrize("step", range(2, STEPS))
async def test_who_is_taken_over_does_nothing_more(world: World, step: int) -> None:  # noqa: F811
    """A command that stood still wakes up after another one has moved the branch, or has taken the move back."""
    for branch, cancelled in ((11, False), (12, True)):
        _plant(world.databases["north"], branch)
        stands, wakes, told = Event(), Event(), list[str]()

        def stand(said: str, stands: Event = stands, wakes: Event = wakes, told: list[str] = told) -> None:
            told.append(said)
            if len(told) == step:
                stands.set()
                wakes.wait(WAIT_S)

        frozen = asyncio.create_task(asyncio.to_thread(move, world, branch, stand))
        await asyncio.to_thread(stands.wait, WAIT_S)
        with moving(world, branch) as it:
            await asyncio.to_thread(it.cancel if cancelled else it.run)
        after = states(world, branch)
        wakes.set()
        with pytest.raises(MoveError, match="another `move`"):
            await frozen
        assert states(world, branch) == after == (["HERE", "LEFT"] if cancelled else ["LEFT", "HERE"])


async def test_nobody_writes_behind_its_back(
    world: World,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The old cell closes only when no sale is under way; and it gives way to who holds the table for long."""
    monkeypatch.setattr(protocol, "LOCK_PAUSE_S", 0.01)  # it is seen to wait
    _plant(world.databases["north"], 11)
    with psycopg.connect(world.databases["north"]) as selling:
        selling.execute("SELECT FROM closed_branches WHERE branch_id = 11")  # as the statement that records a sale
        under_way = asyncio.create_task(asyncio.to_thread(move, world, 11))

        async def waits() -> bool:
            return states(world, 11) == ["HERE", "ARRIVING"] and bool(
                query(
                    world.databases["north"],
                    "SELECT pid FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND NOT granted",
                )
            )

        await eventually(waits, "the move waits for the sale")
        selling.execute("SELECT pg_current_xact_id()")
        _plant(selling, 11, number=2)
        selling.commit()
    await under_way
    assert query(world.databases["south"], OF_BRANCH.format("count(*)", 11)) == [(2,)]


async def test_what_the_other_cell_sold_itself_stops_it(world: World) -> None:  # noqa: F811
    """Of two sales with one receipt number somebody has to say which is right; until then the old cell goes on."""
    for name in ("north", "south"):
        _plant(world.databases[name], 11)
    with pytest.raises(MoveError, match="keys or receipt numbers"):
        await asyncio.to_thread(move, world, 11)
    assert states(world, 11) == ["HERE", "ARRIVING"]


async def test_back_again(world: World) -> None:  # noqa: F811
    """After an hour, in which both cells tell of it; what it sold in between comes along."""
    _plant(world.databases["north"], 11)
    await asyncio.to_thread(move, world, 11)
    _plant(world.databases["south"], 11, number=2)
    with moving(world, 11, back=True) as it, pytest.raises(MoveError, match="a moment ago"):
        await asyncio.to_thread(it.run)
    listed = "SELECT count(*) FROM unlisted_branches"
    assert query(world.databases["north"], listed) == [(0,)]
    query(world.databases["north"], "UPDATE branch_moves SET since = since - interval '61 minutes'")
    assert query(world.databases["north"], listed) == [(1,)]
    with moving(world, 11, back=True) as it:
        await asyncio.to_thread(it.run)
    assert states(world, 11) == ["HERE", "LEFT"]
    assert query(world.databases["north"], OF_BRANCH.format("count(*)", 11)) == [(2,)]
    assert query(world.databases["north"], "SELECT count(*) FROM purchase_items") == [(2,)]


def test_everything_that_hangs_on_a_branch_is_moved(purchases_db: str) -> None:
    """Whoever adds a table that knows branches, purchases or customers says whether it moves."""
    found = query(
        purchases_db,
        """
        SELECT DISTINCT relname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
        WHERE c.relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
            AND attname IN ('branch_id', 'purchase_id', 'aggregate_id', 'customer_id', 'idempotency_key', 'pos_id')
        """,
    )
    assert {name for (name,) in found} == {*copying.MOVED, *copying.STAYS}


def test_the_file_of_cells(tmp_path: Path) -> None:
    """It keeps its comments; where it is written in another form, it is written anew."""
    said = (
        '# our cells\n[north] # up\nbranches = [7, "100-102"] # old\npurchases = "n:1"\nrelay = "n:2"\n\n'
        '[south]\nbranches = [ ]\npurchases = "s:1"\nrelay = "s:2"\n'
    )
    file = tmp_path / "cells.toml"
    file.write_text(said)
    assert cells_file.replace(file, 101, "south") and not cells_file.replace(file, 101, "south")
    assert file.read_text() == said.replace('"100-102"', "100, 102").replace("[ ]", "[101]")
    assert cells_file.replace(file, 101, "north")
    assert file.read_text() == said.replace("[ ]", "[]").replace('[7, "100-102"]', '[7, "100-102"]')
    file.write_text('north = {branches = [7], purchases = "n:1", relay = "n:2"}\n' + said[said.index("[south]") :])
    assert cells_file.replace(file, 7, "south")
    assert file.read_text() == (
        '[north]\nbranches = []\npurchases = "n:1"\nrelay = "n:2"\n\n'
        '[south]\nbranches = [7]\npurchases = "s:1"\nrelay = "s:2"\n'
    )
    assert [path.name for path in tmp_path.iterdir()] == ["cells.toml"]


def _plant(database: str | psycopg.Connection, branch: int, number: int = 1) -> None:
    """A purchase, as it is recorded."""
    if isinstance(database, str):
        with psycopg.connect(database) as connection:
            return _plant(connection, branch, number)
    database.execute("SELECT ensure_purchases_month(date_trunc('month', now())::date)")
    database.execute(
        """
        WITH new AS (
            INSERT INTO purchases (purchase_id, receipt_id, idempotency_key, branch_id, cashier_id, pos_id,
                                   purchase_time, business_day, total_amount, item_count, event_id)
            VALUES (gen_random_uuid(), %(n)s, gen_random_uuid(), %(branch)s, 1, 'POS-3', now(), now()::date, 1, 1,
                    gen_random_uuid())
            RETURNING *
        ), new_receipt AS (
            INSERT INTO receipts SELECT branch_id, pos_id, business_day, receipt_id, purchase_id, purchase_time FROM new
        ), new_key AS (
            INSERT INTO idempotency_keys SELECT idempotency_key, purchase_id, purchase_time, event_id FROM new
        )
        INSERT INTO purchase_items (purchase_id, purchase_time, product_id, qty, unit_price, line_total)
        SELECT purchase_id, purchase_time, 1001, 1, 1, 1 FROM new
        """,
        {"n": str(number), "branch": branch},
    )
    return None


async def _until_taken(stub: Any, request: CreatePurchaseRequest) -> Any:
    """Its servers look what has moved each second."""
    answers: list[Any] = []

    async def taken() -> bool:
        with suppress(grpc.aio.AioRpcError):
            answers.append(await stub.CreatePurchase(request, timeout=WAIT_S))
        return bool(answers)

    await eventually(taken, "the sale is taken")
    return answers[0]


async def _until_refused(stub: Any, request: CreatePurchaseRequest) -> Any:
    refusals: list[Any] = []

    async def refused() -> bool:
        try:
            await stub.CreatePurchase(request, timeout=WAIT_S)
        except grpc.aio.AioRpcError:
            refusals.append(await refusal(stub.CreatePurchase(request, timeout=WAIT_S)))
        return bool(refusals)

    await eventually(refused, "the sale is refused")
    return refusals[0]
