"""Where a relay begins that remembers nothing, and what it costs to go through what was sent."""

import asyncio
from collections.abc import AsyncIterator

import psycopg
import pytest

from chassis.postgres import Pool
from relay_svc import outbox as events
from relay_svc.days import open_days
from tests.conftest import eventually, pool
from tests.integration.outbox_events import insert, make_days, new_ids, states, write
from tests.integration.purchase_events import query


@pytest.fixture
async def outbox(purchases_db: str) -> AsyncIterator[Pool]:
    make_days(purchases_db)
    async with pool(purchases_db, "purchases_relay", size=3) as opened:
        yield opened


async def send(outbox: Pool, position: events.Position) -> tuple[list[str], events.Position]:
    """Claim what there is from a position on, and mark it."""
    async with outbox.connection() as connection, connection.transaction():
        found = await open_days(connection)
        claim = await events.claim(connection, 1_000, position, found)
        ids = [event.event_id for event in claim.events]
        await events.mark_sent(connection, ids, found.days)
    return ids, claim.position


async def start(outbox: Pool) -> events.Position:
    """As a relay does that has just connected."""
    async with outbox.connection() as connection, connection.transaction():
        return await events.sweep(connection, await events.begin(connection))


async def test_it_goes_on_from_where_the_last_sweep_came_to(outbox: Pool, purchases_db: str) -> None:
    old = sorted(write(purchases_db, 5))
    assert (await send(outbox, await start(outbox)))[0] == old
    async with outbox.connection() as connection:
        assert (await events.begin(connection)).xid > 0  # it passes by what was sent before
    new = sorted(write(purchases_db, 3))
    position = await start(outbox)
    assert position.xid > 0
    assert (await send(outbox, position))[0] == new


async def test_what_another_relay_has_in_hand_is_not_passed(outbox: Pool, purchases_db: str) -> None:
    """It may die with it, after this one has noted how far it is, and be the last to know of those events."""
    held = sorted(write(purchases_db, 3))
    async with outbox.connection() as other, other.transaction():
        claim = await events.claim(other, 2, events.START, await open_days(other))
        assert [event.event_id for event in claim.events] == held[:2]
        assert (await send(outbox, await start(outbox)))[0] == held[2:]
        await start(outbox)
        raise psycopg.Rollback
    assert (await send(outbox, await start(outbox)))[0] == held[:2]


async def test_what_commits_late_is_not_passed(outbox: Pool, purchases_db: str) -> None:
    with psycopg.connect(purchases_db) as slow:
        late = sorted(new_ids(2))
        insert(slow, late)
        write(purchases_db, 5)
        assert len((await send(outbox, await start(outbox)))[0]) == 5
        noted = await start(outbox)
        slow.commit()
    assert (await send(outbox, noted))[0] == late
    assert (await send(outbox, await start(outbox)))[0] == []


async def test_events_that_came_with_a_dump(outbox: Pool, purchases_db: str) -> None:
    """Their transactions are another server's, some of which this one has not come to: they are sent all the same,
    and what was sent of them is not passed again with each look."""
    await send(outbox, await start(outbox))
    behind, ahead, gone = (sorted(write(purchases_db, 2)) for _ in range(3))
    with psycopg.connect(purchases_db) as owner:
        owner.execute("UPDATE outbox_events SET created_xid = '3' WHERE event_id = ANY(%s::uuid[])", [behind])
        owner.execute(
            "UPDATE outbox_events SET created_xid = '99999999999' WHERE event_id = ANY(%s::uuid[])", [ahead + gone]
        )
        owner.execute("UPDATE outbox_events SET status = 'SENT' WHERE event_id = ANY(%s::uuid[])", [gone])
        owner.execute("UPDATE outbox_low_water SET realm = '1.00000001.5', xid = '88888888888'")
    position = await start(outbox)
    sent, _ = await send(outbox, position)
    assert sent == behind
    async with outbox.connection() as connection, connection.transaction():
        found = await open_days(connection)
        retries = [event.event_id for event in await events.claim_retries(connection, 10, found.days)]
        assert sorted(retries) == sorted(ahead)
        await events.mark_sent(connection, retries, found.days)
    assert {status for status, _ in states(purchases_db).values()} == {"SENT"}


async def test_a_promoted_standby_is_the_same_server(outbox: Pool, purchases_db: str) -> None:
    """Its note and its events are of one moment: it need not go through days of what was sent before it goes on."""
    await send(outbox, await start(outbox))
    with psycopg.connect(purchases_db) as connection:
        connection.execute(
            "UPDATE outbox_low_water SET realm = split_part(realm, '.', 1) || '.0000000F.' || split_part(realm, '.', 3)"
        )
    async with outbox.connection() as connection:
        assert (await events.begin(connection)).xid > 0


async def test_a_day_that_is_made_meanwhile(outbox: Pool, purchases_db: str) -> None:
    """The relay knows which days are open; if others are by now, what it has seen is not taken for everything."""
    async with outbox.connection() as connection:
        found = await open_days(connection)
        make_days(purchases_db, -3, -3)
        ids = write(purchases_db, 1, age_s=3 * 24 * 3600)
        async with connection.transaction():
            claim = await events.claim(connection, 10, events.START, found)
    assert (claim.events, claim.position, claim.days_changed) == ([], events.START, True)
    assert (await send(outbox, claim.position))[0] == ids


async def test_a_mark_touches_no_index(outbox: Pool, purchases_db: str) -> None:
    """It would change each index of a day with every event. (Rows as small as these may outgrow their page by one.)"""
    write(purchases_db, 200)
    await send(outbox, await start(outbox))

    async def told() -> bool:
        ((all_of_them, within_their_page),) = query(
            purchases_db,
            "SELECT sum(n_tup_upd), sum(n_tup_hot_upd) FROM pg_stat_user_tables WHERE relname LIKE 'outbox_events_2%'",
        )
        if (all_of_them or 0) < 200:
            return False
        assert 10 * within_their_page > 9 * all_of_them
        return True

    async with outbox.connection() as connection:
        await connection.execute("SELECT pg_stat_force_next_flush()")
    await eventually(told, "PostgreSQL has counted the marks")


async def test_a_look_finds_what_a_claim_finds(outbox: Pool, purchases_db: str) -> None:
    async with outbox.connection() as connection:
        found = await open_days(connection)
        position = (await events.claim(connection, 10, events.START, found)).position
        await connection.rollback()
        position = position._replace(in_progress=())
        assert not await events.waits(connection, position, found)
        await asyncio.to_thread(write, purchases_db, 1)
        assert await events.waits(connection, position, found)
        assert await events.waits(connection, position._replace(in_progress=(7,)), found)
