"""Days of the outbox go when they are old, wholly sent, and wholly known to the reader of committed events."""

import asyncio
import datetime
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from itertools import chain
from typing import Any

import psycopg
import pytest
from uuid_utils import uuid7

import relay_svc.__main__ as relay
from chassis.postgres import Connection, Pool
from relay_svc import committed, inspection, retention
from relay_svc import days as days_of
from relay_svc import outbox as events
from relay_svc.errors import EventsDropped
from relay_svc.settings import ServeSettings
from retail.relay.v1 import outbox_service_pb2 as pb2
from retail.relay.v1.outbox_service_pb2_grpc import OutboxServiceStub
from tests.conftest import eventually, pool, today
from tests.integration.conftest import free_address, running
from tests.integration.outbox_events import all_sent, insert, make_days, new_ids, states, write
from tests.integration.purchase_events import query
from tests.sizes import how_many

pytestmark = pytest.mark.usefixtures("one_day")

DAY_S = 24 * 3600


@pytest.fixture
async def outbox(purchases_db: str) -> AsyncIterator[Pool]:
    make_days(purchases_db, -9, 1)
    async with pool(purchases_db, "purchases_relay", size=2) as opened:
        yield opened


def mark(url: str, ids: list[str], status: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(
            "UPDATE outbox_events SET status = %s, next_attempt_at = %s WHERE event_id = ANY(%s::uuid[])",
            [status, "infinity" if status == "FAILED" else None, ids],
        )


async def ask(outbox: Pool, after: str = "") -> str:
    """A reader that asks what was committed, and gets all of it; the snapshot to ask with next time."""
    async with outbox.connection() as connection:
        parsed = await committed.parse(connection, after)
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
    async with outbox.connection() as connection:
        horizon = await retention.first_kept(connection)
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
    async with outbox.connection() as connection:
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


DAYS = how_many("OUTBOX_DAYS")
LOCKS_MAX = 200  # of a statement's transaction, however many days there are


@pytest.fixture
def years(purchases_db: str) -> str:
    for first in range(1 - DAYS, 2, 100):  # in one transaction, making them takes as many locks as a server has
        make_days(purchases_db, first, min(first + 99, 1))
    return purchases_db


def open_days(url: str) -> int:
    ((count,),) = query(url, "SELECT count(*) FROM outbox_calendar WHERE settled_in IS NULL")
    return int(count)


@pytest.mark.timeout(120 + DAYS)
async def test_years_of_days(years: str, amqp_url: str) -> None:
    """With as many locks as PostgreSQL has by default: what is in any day is published, counted, listed, requeued."""
    written = {age: sorted(write(years, 2, age_s=age * DAY_S)) for age in (DAYS - 1, DAYS // 2, DAYS // 4, 0)}
    mark(years, written[DAYS // 2], "SENT")
    mark(years, written[DAYS // 4], "FAILED")
    async with pool(years, "purchases_relay", size=1) as opened:
        await retention.begin(opened, asyncio.Event())  # as the relay does it; here, it may take minutes
    assert open_days(years) == 5
    address = free_address()
    config = ServeSettings(database_url=years, amqp_url=amqp_url, listen=address, metrics_listen="127.0.0.1:0")
    async with running(lambda stop: relay.serve(config, stop), address) as channel:
        stub = OutboxServiceStub(channel)

        async def published() -> bool:
            status = await stub.GetOutboxStatus(pb2.GetOutboxStatusRequest())
            return (status.new_count, status.failed_count) == (0, 2)

        async def settled() -> bool:
            await asyncio.to_thread(run_settling, years)
            return open_days(years) == 4

        await eventually(published, "the oldest events are published, and the youngest")
        await eventually(settled, "days in which nothing waits are settled")
        assert await published()
        listed, snapshot = await committed_ids(stub)
        assert sorted(listed) == sorted(chain(*written.values()))
        request = pb2.ListOutboxEventsRequest(page_size=3)
        pages = [await stub.ListOutboxEvents(request)]
        request.page_token = pages[0].next_page_token
        pages.append(await stub.ListOutboxEvents(request))
        in_order = [event.event_id for page in pages for event in page.outbox_events]
        assert in_order == list(chain(*written.values()))[:6]
        asked = pb2.ListOutboxEventsRequest(status=pb2.OUTBOX_STATUS_FAILED)
        failed = (await stub.ListOutboxEvents(asked)).outbox_events
        assert [event.event_id for event in failed] == written[DAYS // 4]

        requeued = await stub.RequeueEvents(pb2.RequeueEventsRequest(all_failed=True))
        assert requeued.requeued_count == 2
        again = await stub.RequeueEvents(pb2.RequeueEventsRequest(event_ids=written[DAYS - 1]))
        assert again.requeued_count == 2
        make_days(years, -DAYS // 2, -DAYS // 2)  # somebody's clock is far behind
        late = write(years, 1, age_s=DAYS // 2 * DAY_S)
        assert (await committed_ids(stub, snapshot))[0] == late
        await eventually(lambda: all_sent(years), "what was requeued is published, and what came late")
    async with pool(years, "purchases_relay", size=1) as opened, opened.connection() as connection:
        counts = {name: await locked(connection, work) for name, work in STATEMENTS.items()}
    assert max(counts.values()) < LOCKS_MAX, counts


def run_settling(url: str) -> None:
    """As the relay does every hour."""
    with psycopg.connect(url, autocommit=True) as connection:
        days = connection.execute("SELECT day FROM outbox_calendar WHERE settled_in IS NULL").fetchall()
        for day in days:
            with suppress(psycopg.errors.LockNotAvailable):
                connection.execute("SELECT settle_outbox_day(%s)", day)


async def committed_ids(stub: Any, after: str = "") -> tuple[list[str], str]:
    replies = stub.ListCommittedEventIds(pb2.ListCommittedEventIdsRequest(after_snapshot=after, acknowledge=True))
    ids: list[str] = []
    async for reply in replies:
        ids += reply.event_ids
    return ids, reply.snapshot


async def claim(connection: Connection) -> None:
    found = await days_of.open_days(connection)
    await events.claim_retries(connection, 10, found.days)
    await events.claim(connection, 10, events.START, found)
    await events.mark_sent(connection, [str(uuid7())], found.days)


async def in_days_since(connection: Connection) -> None:
    ((snapshot,),) = await (await connection.execute("SELECT pg_current_snapshot()::text")).fetchall()
    for part in days_of.parts((await days_of.since(connection, snapshot)).days):
        async for _ in committed._ids(connection, committed.Snapshot("", snapshot), snapshot, part):
            pass


STATEMENTS: dict[str, Callable[[Connection], Awaitable[object]]] = {
    "claim": claim,
    "sweep": lambda connection: events.sweep(connection, events.START),
    "newest": lambda connection: events.newest(connection, 3, (), []),
    "mark_faulty": lambda connection: events.mark_faulty(connection, {str(uuid7()): "no"}, 3),
    "requeue": lambda connection: inspection.requeue(connection, new_ids(10)),
    "missing": lambda connection: inspection.missing(connection, new_ids(10)),
    "status": inspection.backlog,
    "listing": in_days_since,
}


async def locked(connection: Connection, work: Callable[[Connection], Awaitable[object]]) -> int:
    """How many locks its transaction has, however often it was done before: plans change with that."""
    for _ in range(12):
        async with connection.transaction():
            await work(connection)
            cursor = await connection.execute("SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid()")
            ((count,),) = await cursor.fetchall()
    return int(count)


async def test_a_relay_settles_days_before_it_begins(outbox: Pool, purchases_db: str, amqp_url: str) -> None:
    address = free_address()
    config = ServeSettings(database_url=purchases_db, amqp_url=amqp_url, listen=address, metrics_listen="127.0.0.1:0")
    async with running(lambda stop: relay.serve(config, stop), address):
        assert open_days(purchases_db) == 4


async def test_what_settles(outbox: Pool, purchases_db: str) -> None:
    """Days that are over and hold nothing that waits; into one of those nothing is written, until it is opened."""
    waiting = write(purchases_db, 1, age_s=5 * DAY_S)
    gone = days_ago(9, 8, 7, 6, 4, 3)
    assert await retention.settle_days(outbox) == gone
    assert await retention.settle_days(outbox) == []
    for settled_day in (4, 9):
        with pytest.raises(psycopg.errors.CheckViolation):
            write(purchases_db, 1, age_s=settled_day * DAY_S)
    make_days(purchases_db, -4, -4)
    waiting += write(purchases_db, 1, age_s=4 * DAY_S)
    async with outbox.connection() as connection, connection.transaction():
        found = await days_of.open_days(connection)
        claimed = await events.claim(connection, 10, events.START, found)
        assert sorted(event.event_id for event in claimed.events) == sorted(waiting)
        assert await retention.settle_days(outbox) == []  # it is in use
        await events.mark_sent(connection, waiting, found.days)
    assert await retention.settle_days(outbox) == days_ago(5, 4)


async def test_event_that_commits_while_its_day_is_settled(outbox: Pool, purchases_db: str) -> None:
    """The day stays open: whoever settles waits for who writes, and looks again."""
    with psycopg.connect(purchases_db) as slow:
        ids = new_ids(1, age_s=8 * DAY_S)
        insert(slow, ids)
        settling = asyncio.ensure_future(retention.settle_days(outbox))

        async def waits() -> bool:
            here = "(SELECT oid FROM pg_database WHERE datname = current_database())"
            return bool(query(purchases_db, f"SELECT 1 FROM pg_locks WHERE NOT granted AND database = {here}"))

        await eventually(waits, "it waits for the writer")
        slow.commit()
        assert days_ago(8)[0] not in await settling
    assert days_ago(8)[0] not in await retention.settle_days(outbox)
    async with outbox.connection() as connection, connection.transaction():
        claimed = await events.claim(connection, 10, events.START, await days_of.open_days(connection))
    assert [event.event_id for event in claimed.events] == ids


async def test_requeued_while_its_day_is_settled(outbox: Pool, purchases_db: str) -> None:
    """A day with something that was requeued stays open until that is sent."""
    ids = write(purchases_db, 2, age_s=7 * DAY_S)
    mark(purchases_db, ids, "SENT")
    assert days_ago(7)[0] in await retention.settle_days(outbox)
    async with outbox.connection() as connection, connection.transaction():
        assert await inspection.requeue(connection, ids[:1]) == 1
        assert days_ago(7)[0] not in await retention.settle_days(outbox)
    assert days_ago(7)[0] not in await retention.settle_days(outbox)
    assert states(purchases_db)[ids[0]] == ("NEW", 0)
