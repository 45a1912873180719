"""`retail-purchases cells`, as an operator runs it."""

import asyncio
import json
import os
import sys
from contextlib import AsyncExitStack
from datetime import UTC, datetime

import pytest

from tests.conftest import ROOT, WAIT_S, eventually
from tests.integration.sales import sale
from tests.integration.whole.test_two_cells import NORTH, World, _stub, world  # noqa: F401


async def cells_command(world: World, *arguments: str) -> tuple[int | None, str]:  # noqa: F811
    """In a process of its own: the services of this one log to the same output."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "purchases_svc", "cells", *arguments),
        env={**os.environ, "CELLS_FILE": str(world.file)},
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await asyncio.wait_for(process.communicate(), WAIT_S)
    return process.returncode, said.decode()


async def test_cells(world: World, amqp_url: str) -> None:  # noqa: F811
    async with AsyncExitStack() as stack:
        north = await stack.enter_async_context(world.selling("north"))
        await stack.enter_async_context(world.selling("south"))
        for name in ("north", "south"):
            await stack.enter_async_context(world.relaying(name, amqp_url))
        await _stub(north).CreatePurchase(
            sale(branch_id=NORTH, seconds=int(datetime.now(UTC).timestamp())), timeout=WAIT_S
        )

        async def all_well() -> str:
            code, said = await cells_command(world, "--json")
            return "" if code else said

        told = {each["cell"]: each for each in json.loads(await eventually(all_well, "the relays have their broker"))}
        assert [told[name]["branches"] for name in ("north", "south")] == ["1-99", "100-199"]
        assert told["north"]["sales_per_second"] in (pytest.approx(1 / 60), 0)  # 0: that was a minute ago
        assert (told["south"]["sales_per_second"], told["south"]["waiting_count"]) == (0, 0)
        assert all(each["byte_count"] > 1_000_000 and not each["problems"] for each in told.values())
        code, said = await cells_command(world)
        assert code == 0 and "north" in said and "well" in said

        # Who has changed the addresses by mistake is told.
        world.purchases = {"north": world.purchases["south"], "south": world.purchases["south"]}
        world.list_cells()
        code, said = await cells_command(world, "--json")
        north_told, south_told = json.loads(said)
        assert code == 1
        assert north_told["problems"] == [f"purchases at {world.purchases['south']} is of cell south"]
        assert south_told["problems"] == ["has the database of cell north"]

    code, said = await cells_command(world)
    assert code == 1 and "UNAVAILABLE" in said and "well" not in said
