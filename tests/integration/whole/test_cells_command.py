"""`retail-purchases cells`, as an operator runs it."""

import asyncio
import json
from contextlib import AsyncExitStack
from datetime import UTC, datetime

import pytest

import purchases_svc.__main__ as purchases
from tests.conftest import WAIT_S
from tests.integration.sales import sale
from tests.integration.whole.test_two_cells import NORTH, World, _stub, world  # noqa: F401


async def cells_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    code = await asyncio.to_thread(purchases.commands.carry_out, ["cells", *arguments])
    return code, capsys.readouterr().out


async def test_cells(
    world: World,  # noqa: F811
    amqp_url: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CELLS_FILE", str(world.file))
    async with AsyncExitStack() as stack:
        north = await stack.enter_async_context(world.selling("north"))
        await stack.enter_async_context(world.selling("south"))
        for name in ("north", "south"):
            await stack.enter_async_context(world.relaying(name, amqp_url))
        await _stub(north).CreatePurchase(
            sale(branch_id=NORTH, seconds=int(datetime.now(UTC).timestamp())), timeout=WAIT_S
        )
        code, said = await cells_command(capsys, "--json")
        told = {each["cell"]: each for each in json.loads(said)}
        assert code == 0, said
        assert [told[name]["branches"] for name in ("north", "south")] == ["1-99", "100-199"]
        assert told["north"]["sales_per_second"] == pytest.approx(1 / 60)
        assert (told["south"]["sales_per_second"], told["south"]["waiting_count"]) == (0, 0)
        assert all(each["byte_count"] > 1_000_000 and not each["problems"] for each in told.values())
        code, said = await cells_command(capsys)
        assert code == 0 and "north" in said and "well" in said

        # Who has changed the addresses by mistake is told.
        world.purchases = {"north": world.purchases["south"], "south": world.purchases["south"]}
        world.list_cells()
        code, said = await cells_command(capsys, "--json")
        north_told, south_told = json.loads(said)
        assert code == 1
        assert north_told["problems"] == [f"purchases at {world.purchases['south']} is of cell south"]
        assert south_told["problems"] == ["has the database of cell north"]

    code, said = await cells_command(capsys)
    assert code == 1 and "UNAVAILABLE" in said and "well" not in said
