"""complete_through_time never lies, goes back only when a clock did, and arrives: in random histories, and told from
planted lies."""

import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import datetime
from typing import Any

import pytest

from analytics_svc.proof import keeper
from analytics_svc.upstream.outbox import Listed
from relay_svc import committed
from tests.integration.completeness import Lied, World, connect, margin
from tests.integration.outbox_events import make_days
from tests.sizes import how_many

HISTORIES = how_many("HISTORIES")
FIRST_SEED = int(os.environ.get("SEED", "1"))
STEPS = 100
CAUGHT_WITHIN = 400  # histories; most lies come out in the first


@pytest.fixture
async def world(purchases_db: str, analytics_db: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(keeper, "CHECK_FIRST_S", 0.0)
    monkeypatch.setattr(keeper, "CHECK_MOST_S", 0.0)
    monkeypatch.setattr(keeper, "SHOW_AFTER_S", 0.0)
    monkeypatch.setattr(committed, "CHUNK", 4)
    make_days(purchases_db)
    async with World(purchases_db, analytics_db).open() as opened:
        yield opened


@pytest.mark.timeout(3_600)
async def test_histories(world: World) -> None:
    begin = time.monotonic()
    for seed in range(FIRST_SEED, FIRST_SEED + HISTORIES):
        try:
            await world.history(seed, STEPS)
        except Lied as lie:
            raise AssertionError(f"seed {seed}: {lie}") from lie
    print(f"{HISTORIES} histories, {world.moves} moves, {world.claims} claims in {time.monotonic() - begin:.0f} s")
    assert world.moves > HISTORIES and world.claims > 10 * HISTORIES


async def is_caught(world: World) -> bool:
    for seed in range(1, CAUGHT_WITHIN + 1):
        try:
            await world.history(seed, STEPS)
        except Lied:
            return True
    return False


async def test_time_read_after_the_listing_is_caught(world: World, purchases_db: str) -> None:
    """Sales that commit between the listing and the look at the clock are promised, and were not listed."""
    real = world.list_committed

    async def listing(after: str) -> AsyncGenerator[Listed, None]:
        async for part in real(after):
            yield part._replace(as_of=await world._purchases_clock()) if part.snapshot else part

    world.list_committed = listing
    assert await is_caught(world)


async def test_a_floor_on_occurred_at_is_caught(world: World, purchases_db: str) -> None:
    """Instead of snapshots: everything since the last time. A sale that commits late is older than that."""

    async def listing(after: str) -> AsyncGenerator[Listed, None]:
        async with await connect(purchases_db) as connection:
            await world._gate.park()
            as_of = await world._purchases_clock()
            since = margin(datetime.fromisoformat(after), 0.01) if after else None
            cursor: Any = await connection.execute(
                "SELECT event_id::text FROM outbox_events WHERE occurred_at >= coalesce(%s, '-infinity'::timestamptz)",
                [since],
            )
            yield Listed([event_id for (event_id,) in await cursor.fetchall()], as_of.isoformat(), as_of)

    world.list_committed = listing
    assert await is_caught(world)


async def test_forgetting_what_was_in_progress_is_caught(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing by the snapshot's upper end only: a sale that was in progress then is never listed."""
    real = world.list_committed

    async def listing(after: str) -> AsyncGenerator[Listed, None]:
        realm, _, numbers = after.partition(":")
        _, high, _ = numbers.split(":") if numbers else ("", "", "")
        async for part in real(f"{realm}:{high}:{high}:" if after else ""):
            yield part

    world.list_committed = listing
    assert await is_caught(world)


async def test_a_snapshot_of_another_server_taken_for_ones_own_is_caught(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restore, a listing since a snapshot that is not of this server's history lacks what it must have."""
    real = world.list_committed

    async def listing(after: str) -> AsyncGenerator[Listed, None]:
        stale = after and (after.startswith("1.") or ":90000000:" in after)
        if not stale:
            async for part in real(after):
                yield part
            return
        as_of = await world._purchases_clock()
        last = [part async for part in real("")][-1]
        yield Listed([], last.snapshot, as_of)

    world.list_committed = listing
    assert await is_caught(world)


async def test_never_going_back_is_caught(world: World, analytics_db: str) -> None:
    """A keeper that keeps the highest time it ever stored: of a clock that ran ahead, it keeps the lie."""
    async with await connect(analytics_db) as owner:
        await owner.execute(
            "CREATE FUNCTION keep_highest() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.complete_through_at ="
            " greatest(NEW.complete_through_at, OLD.complete_through_at); RETURN NEW; END $$"
        )
        await owner.execute(
            "CREATE TRIGGER highest BEFORE UPDATE OF complete_through_at ON freshness FOR EACH ROW"
            " WHEN (NEW.complete_through_at IS NOT NULL) EXECUTE FUNCTION keep_highest()"
        )
        await owner.execute("GRANT EXECUTE ON FUNCTION keep_highest() TO analytics_consumer")
    assert await is_caught(world)


async def test_not_waiting_is_caught(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper that takes only the oldest id of each part as what it waits for."""
    real = keeper.unsettled

    async def only_the_oldest(connection: Any, ids: str) -> Any:
        return await real(connection, "{" + min(ids.strip("{}").split(",")) + "}")

    monkeypatch.setattr(keeper, "unsettled", only_the_oldest)
    assert await is_caught(world)
