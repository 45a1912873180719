"""Days of the outbox go when they are old, wholly sent, and wholly known to the reader of committed events."""

import asyncio
import datetime
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import psycopg
import pytest

import relay_svc.__main__ as relay
from chassis.postgres import Connection, Pool
from relay_svc import committed, inspection, retention
from relay_svc import outbox as events
from relay_svc.errors import EventsDropped
from tests.conftest import pool, today
from tests.integration.outbox_events import insert, make_days, new_ids, states, write

pytestmark = pytest.mark.usefixtures("one_day")

DAY_S = 24 * 3600


@pytest.fixture
async def outbox(purchases_db: str) -> AsyncIterator[Pool]:
    make_days(purchases_db, -9, 1)
    async with pool(purchases_db, "purchases_relay", size=2) as opened:
        yield opened


def mark(url: str, ids: list[str], status: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("UPDATE outbox_events SET status = %s WHERE event_id = ANY(%s::uuid[])", [status, ids])


async def ask(outbox: Pool, after: str = "") -> str:
    """A reader that asks what was committed, and gets all of it; the snapshot to ask with next time."""
    async with outbox.connection() as connection:
        parsed = await committed.parse(connection, after)
        async with connection.transaction():
            parts = [part async for part in committed.since(connection, parsed)]
        await committed.remember(connection, parts[0])
        return str(parts[0].snapshot)


def keep_days(url: str, days: int) -> None:
    """The owner decides."""
    with psycopg.connect(url) as connection:
        connection.execute("UPDATE chain_settings SET keep_outbox_days = %s", [days])


async def drop(outbox: Pool, keep: int) -> list[datetime.date]:
    assert isinstance(outbox.conninfo, str)
    keep_days(outbox.conninfo, keep)
    return await retention.drop_old_days(outbox)


def days_ago(*ages: int) -> list[datetime.date]:
    return [today() - datetime.timedelta(days=age) for age in ages]


async def verdicts(outbox: Pool, keep: int) -> dict[int, str]:
    assert isinstance(outbox.conninfo, str)
    keep_days(outbox.conninfo, keep)
    horizon = await retention.first_kept(outbox)
    return {(today() - day.day).days: day.verdict(horizon) for day in await retention.days(outbox)}


async def test_what_may_go(outbox: Pool, purchases_db: str) -> None:
    """Not what waits, was given up, is young, or is not known to the reader; and nothing before it has ever asked."""
    for age, status in ((9, "SENT"), (8, "NEW"), (7, "FAILED"), (6, "SENT"), (3, "SENT")):
        mark(purchases_db, write(purchases_db, 3, age_s=age * DAY_S), status)
    first = await ask(outbox)
    assert await drop(outbox, 5) == []  # it has said nothing of what it knows yet
    assert "nobody has said" in (await verdicts(outbox, 5))[9]
    second = await ask(outbox, first)
    late = write(purchases_db, 1, age_s=6 * DAY_S)
    mark(purchases_db, late, "SENT")
    assert await drop(outbox, 30) == []
    assert await verdicts(outbox, 5) | {4: "", 3: "", 2: "", 1: "", 0: "", -1: ""} == {
        9: "drop",
        8: "keep: some of its events are NEW",
        7: "keep: some of its events are FAILED",
        6: "keep: the reader of committed events does not know all of it yet",
        5: "keep",
        **dict.fromkeys(range(-1, 5), ""),
    }
    assert await drop(outbox, 5) == days_ago(9)
    third = await ask(outbox, second)
    assert await drop(outbox, 5) == []  # listed, but not yet known to have arrived
    await ask(outbox, third)
    assert await drop(outbox, 5) == days_ago(6)
    assert await drop(outbox, 5) == []
    assert len(states(purchases_db)) == 9


async def test_event_that_commits_meanwhile(outbox: Pool, purchases_db: str) -> None:
    """A day that is being written to stays, and with it what is written."""
    await ask(outbox, await ask(outbox))
    with psycopg.connect(purchases_db) as slow:
        ids = new_ids(1, age_s=8 * DAY_S)
        insert(slow, ids)
        assert await drop(outbox, 7) == []  # in use
        slow.commit()
    assert await drop(outbox, 7) == days_ago(9)
    assert states(purchases_db) == {ids[0]: ("NEW", 0)}


async def test_who_lacks_what_was_dropped_is_told(outbox: Pool, purchases_db: str) -> None:
    """A listing without events that it should have is refused: to who knows nothing, or was set back to before them."""
    before = await ask(outbox)
    assert await drop(outbox, 8) == []
    during = await ask(outbox, before)
    assert await drop(outbox, 8) == days_ago(9)
    await ask(outbox)  # nothing was in that day
    mark(purchases_db, write(purchases_db, 3, age_s=8 * DAY_S), "SENT")
    after = await ask(outbox, during)
    await ask(outbox, after)
    assert await drop(outbox, 7) == days_ago(8)
    for lacking in ("", before, during):
        with pytest.raises(EventsDropped):
            await ask(outbox, lacking)
    after = await ask(outbox, after)  # the one that has them goes on
    async with outbox.connection() as connection, connection.transaction():
        position = str((await committed.position(connection)).snapshot)
    await ask(outbox, position)  # and who asked where to begin, and got all before that elsewhere

    # After a restore, on another server: who had them there has them, and who has asked here since.
    elsewhere = "1.00000001.5"
    with psycopg.connect(purchases_db) as connection_there:
        connection_there.execute("UPDATE outbox_listing SET dropped_realm = %s", [elsewhere])
    for knowing in (after, f"{elsewhere}:{after.split(':', 1)[1]}"):
        await ask(outbox, knowing)
    for lacking in ("", f"{elsewhere}:{before.split(':', 1)[1]}", f"2.00000001.5:{after.split(':', 1)[1]}"):
        with pytest.raises(EventsDropped):
            await ask(outbox, lacking)


async def test_day_dropped_while_a_listing_begins(outbox: Pool, purchases_db: str) -> None:
    """Neither listed nor refused would be a gap: until the listing has ended, the day stays."""
    before = await ask(outbox)
    ids = write(purchases_db, 3, age_s=9 * DAY_S)
    mark(purchases_db, ids, "SENT")
    await ask(outbox, await ask(outbox, before))
    async with outbox.connection() as connection, connection.transaction():
        listing = committed.since(connection, await committed.parse(connection, before))
        assert sorted((await anext(listing)).event_ids) == sorted(ids)
        assert await drop(outbox, 8) == []
        await listing.aclose()
    assert await drop(outbox, 8) == days_ago(9)


@pytest.mark.parametrize("keep", [30, 5])
async def test_what_is_kept_cannot_be_dropped(outbox: Pool, purchases_db: str, keep: int) -> None:
    """The relay's login drops no day that the owner keeps, whatever it asks for; nor does it decide what is kept."""
    await ask(outbox, await ask(outbox))
    keep_days(purchases_db, keep)
    kept = days_ago(*range(min(keep, 9) + 1))
    async with outbox.connection() as connection:
        for day in [*map(str, kept), *(f"{day} BC" for day in (*kept, *days_ago(9))), "infinity", "-infinity", None]:
            with pytest.raises(psycopg.errors.InvalidParameterValue):
                await connection.execute("SELECT drop_outbox_day(%s)", [day])
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await connection.execute("UPDATE chain_settings SET keep_outbox_days = 1")
    assert {day.day for day in await retention.days(outbox)} == set(days_ago(*range(-1, 10)))


async def test_other_server_knows_nothing(outbox: Pool, purchases_db: str) -> None:
    """What the reader knew of the server before a restore says nothing about this one."""
    await ask(outbox, await ask(outbox))
    with psycopg.connect(purchases_db) as connection:
        connection.execute("UPDATE outbox_listing SET realm = '1.00000001.5'")
    assert await drop(outbox, 5) == []


async def test_command(
    outbox: Pool, purchases_db: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    await ask(outbox, await ask(outbox))
    monkeypatch.setattr("relay_svc.__main__.logs.configure", lambda *_: None)  # it would last longer than this test
    monkeypatch.setenv("PURCHASES_DATABASE_URL", purchases_db)
    monkeypatch.setattr(sys, "argv", ["relay_svc", "partitions"])
    await asyncio.to_thread(relay.main)
    assert f"Days before {days_ago(30)[0]} may go" in " ".join(capsys.readouterr().out.split())
    keep_days(purchases_db, 8)
    monkeypatch.setattr(sys, "argv", ["relay_svc", "partitions", "--json"])
    await asyncio.to_thread(relay.main)
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (first["day"], first["retention"]) == (days_ago(9)[0].isoformat(), "drop")
    monkeypatch.setattr(sys, "argv", ["relay_svc", "partitions", "--drop"])
    await asyncio.to_thread(relay.main)
    assert f"Dropped: {days_ago(9)[0]}" in capsys.readouterr().out
    assert 9 not in await verdicts(outbox, 30)


LOCKS_OF_A_SERVER = 64 * 100  # with PostgreSQL's defaults of max_locks_per_transaction and max_connections
MOST_DAYS = 1 + 365 + 3  # today, those kept at most, those made ahead
DAYS = int(os.environ.get("OUTBOX_DAYS", "60"))


async def test_longest_outbox_fits_a_server(outbox: Pool, purchases_db: str) -> None:
    """Statements that look through all days lock no more, for each day, than lets two of them work side by side.

    OUTBOX_DAYS=369 tries it with all that can be.
    """
    await asyncio.to_thread(make_days, purchases_db, 2 - DAYS, 1)
    write(purchases_db, 1)

    async def locked(work: Callable[[Connection], Awaitable[object]]) -> int:
        async with outbox.connection() as connection, connection.transaction():
            await work(connection)
            cursor = await connection.execute("SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid()")
            ((count,),) = await cursor.fetchall()
            return int(count)

    async def listing(connection: Connection) -> object:
        return [part async for part in committed.since(connection, None)]

    counts = {
        "claim": await locked(lambda connection: events.claim(connection, 10, events.START)),
        "claim_retries": await locked(lambda connection: events.claim_retries(connection, 10)),
        "sweep": await locked(lambda connection: events.sweep(connection, events.START)),
        "listing": await locked(listing),
        "backlog": await locked(inspection.backlog),
    }
    for work, count in counts.items():
        assert count * MOST_DAYS / DAYS < LOCKS_OF_A_SERVER / 2, (work, count)
