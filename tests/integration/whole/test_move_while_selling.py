"""A branch moves while it sells, and the command that moves it is killed again and again.

MOVES=5 in the environment does it with so many seeds, from SEED on.
"""

import asyncio
import os
import random
import sys
import threading
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from itertools import count

import pytest

from analytics_svc.proof import rebuild
from analytics_svc.proof.audit import compare
from analytics_svc.proof.verdicts import WRONG, Verdict
from analytics_svc.upstream.chain import Chain
from pos.client import PosClient, Recorded, Sale
from pos.errors import OutcomeUnknown
from tests.conftest import ROOT, WAIT_S, eventually, pool, today
from tests.integration.consumers import COUNTED, consuming, counts
from tests.integration.purchase_events import query
from tests.integration.whole.test_two_cells import World, a_sale, agrees, through, world  # noqa: F401

MOVES, FIRST_SEED = int(os.environ.get("MOVES", "1")), int(os.environ.get("SEED", "1"))
MOVED, NEIGHBOURS = 7, (8, 150)  # branches: the one that moves, and one in each cell
KILLS = 4
PAUSE_S = 0.02  # between the sales of a till
MOVE_S = 4.0  # about what a move takes


class Shop:
    """Tills of one branch, which know of one cell. Now and then they send again what is acknowledged."""

    def __init__(self, branch: int, address: str, seed: int) -> None:
        self.branch, self.address = branch, address
        self.acknowledged: dict[str, Recorded] = {}
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self._chance, self._numbers, self._sales = random.Random(seed), count(1), list[Sale]()
        self._name = f"{branch}-{seed}"

    def run(self) -> None:
        try:
            with PosClient.at(self.address, total_timeout_s=2.0) as client:
                while not self.stop.wait(PAUSE_S):
                    self._some(client)
        except BaseException as error:
            self.errors.append(error)

    def _some(self, client: PosClient) -> None:
        if self._sales and self._chance.random() < 0.3:
            sale = self._chance.choice(self._sales)
            again = self._send(client, sale)
            known = self.acknowledged[sale.idempotency_key]
            assert again.purchase == known.purchase and again.replayed, (again, known)
            return
        new = [
            a_sale(self.branch, f"{self._name}-{next(self._numbers)}") for _ in range(self._chance.choice([1, 1, 5]))
        ]
        if len(new) == 1:
            self._keep(new[0], self._send(client, new[0]))
            return
        unclear = {sale.idempotency_key: sale for sale in new}
        while unclear:
            with suppress(OutcomeUnknown):
                for sale, outcome in client.upload_purchases(list(unclear.values())):
                    if isinstance(outcome, Recorded):
                        self._keep(unclear.pop(sale.idempotency_key), outcome)
                    else:
                        assert isinstance(outcome, OutcomeUnknown), outcome

    def _send(self, client: PosClient, sale: Sale) -> Recorded:
        while True:
            with suppress(OutcomeUnknown):
                if self._chance.random() < 0.5:
                    return client.create_purchase(sale)
                with client.open_stream() as stream:
                    return stream.record(sale)

    def _keep(self, sale: Sale, recorded: Recorded) -> None:
        self._sales.append(sale)
        self.acknowledged[sale.idempotency_key] = recorded


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + MOVES))
async def test_a_branch_moves_while_it_sells(
    world: World,  # noqa: F811
    analytics_db: str,
    amqp_url: str,
    one_day: None,
    seed: int,
) -> None:
    chance = random.Random(seed)
    async with AsyncExitStack() as stack:
        for name in ("north", "south"):
            await stack.enter_async_context(world.selling(name))
            await stack.enter_async_context(world.relaying(name, amqp_url))
        cells = await stack.enter_async_context(world.asking())
        await stack.enter_async_context(consuming(analytics_db, amqp_url, cells_file=str(world.file)))
        shops = [
            Shop(branch, world.purchases[name], seed * 10 + number)
            for number, (branch, name) in enumerate(
                [(MOVED, "north"), (MOVED, "south"), *((branch, "north") for branch in NEIGHBOURS)]
            )
        ]
        selling = [asyncio.create_task(asyncio.to_thread(shop.run)) for shop in shops]
        auditing = asyncio.create_task(_audit(analytics_db, cells))
        try:

            async def some_sold() -> bool:
                return all(len(shop.acknowledged) > 20 or shop.errors for shop in shops)

            await eventually(some_sold, "they sell")
            killed = await _move(world, "south", chance)
            query(world.databases["north"], "UPDATE branch_moves SET since = since - interval '2 hours'")
            await eventually(some_more(shops), "they go on")
            killed += await _move(world, "north", chance)
            await eventually(some_more(shops), "they go on")
        finally:
            for shop in shops:
                shop.stop.set()
            await asyncio.gather(*selling)
            auditing.cancel()
        assert not [shop.errors for shop in shops if shop.errors]
        with suppress(asyncio.CancelledError):
            await auditing  # it raises what it has found
        assert killed

        sold = {key: recorded.purchase.purchase_id for shop in shops for key, recorded in shop.acknowledged.items()}
        held: dict[str, set[str]] = {}
        for name in ("north", "south"):
            for key, purchase_id in query(
                world.databases[name], "SELECT idempotency_key::text, purchase_id::text FROM purchases"
            ):
                held.setdefault(key, set()).add(purchase_id)
        assert held == {key: {purchase_id} for key, purchase_id in sold.items()}
        ours = f"SELECT idempotency_key::text FROM purchases WHERE branch_id = {MOVED}"
        assert {key for shop in shops[:2] for key in shop.acknowledged} == {
            key for (key,) in query(world.databases["north"], ours)
        }
        await counts(analytics_db, COUNTED, len(sold))
        assert await agrees(analytics_db, cells) is Verdict.AGREED
        rebuilt = await rebuild.rebuild_all(analytics_db, cells, today())
        assert (rebuilt.purchases, rebuilt.added, rebuilt.foreign, rebuilt.right) == (len(sold), 0, [], True)
        assert not +rebuilt.repaired
        ended = datetime.now(UTC)

        async def complete() -> bool:
            moment = through(analytics_db)
            return moment is not None and moment > ended

        await eventually(complete, "the time goes on")


def some_more(shops: list[Shop]):  # type: ignore[no-untyped-def]
    before = [len(shop.acknowledged) for shop in shops]

    async def more() -> bool:
        return all(len(shop.acknowledged) > was + 5 or shop.errors for shop, was in zip(shops, before, strict=True))

    return more


async def _move(world: World, to: str, chance: random.Random) -> int:  # noqa: F811
    """Call the command until it is done; how often it was killed before."""
    source = "south" if to == "north" else "north"
    environ = {
        **os.environ,
        "CELLS_FILE": str(world.file),
        "PURCHASES_DATABASE_URL": world.databases[source],
        "PURCHASES_TARGET_DATABASE_URL": world.databases[to],
    }
    killed = 0
    while True:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "purchases_svc", "move", str(MOVED), "--to", to),
            env=environ,
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        ends = asyncio.create_task(process.communicate())
        if killed < KILLS:
            await asyncio.wait({ends}, timeout=chance.uniform(0.3, MOVE_S * 1.5))
            if not ends.done():
                process.kill()
                killed += 1
        said, _ = await asyncio.wait_for(ends, WAIT_S)
        if process.returncode == 0:
            assert f"Branch {MOVED} is in {to}" in said.decode()
            return killed
        assert process.returncode == -9, said.decode()


async def _audit(url: str, cells: Chain) -> None:
    """All the while: nothing is ever wrong, wherever the branch is."""
    async with pool(url, "analytics_consumer") as opened:
        while True:
            found = await compare(opened, cells, today(), today(), wait_s=0.5)
            assert found.verdict not in WRONG and not found.findings, found
