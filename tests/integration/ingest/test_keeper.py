"""The keeper of complete_through_time as it runs: one of several, through losses of its lock, and with much to list."""

import asyncio
import contextlib
import resource
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from analytics_svc.errors import RelayUnavailable
from analytics_svc.proof import keeper
from analytics_svc.proof.keeper import KEEPER_LOCK, KEEPER_SESSION, Keeper
from analytics_svc.upstream.outbox import EventsDropped, Listed, SnapshotRefused
from chassis import postgres, signs_of_life
from chassis.cells import DEFAULT
from tests.conftest import WAIT_S, eventually, pool
from tests.integration.purchase_events import NOON, query
from tests.sizes import how_many

HOLDERS = f"""
    SELECT pid FROM pg_locks
    WHERE locktype = 'advisory' AND objid = ({KEEPER_LOCK} & 4294967295) AND granted
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
IDS = how_many("LISTED_IDS")
SECOND = timedelta(seconds=1)
ID = "0190{:04x}-0000-7000-8000-{:012x}"


class FakeOutbox:
    """Lists what the test says; the snapshot is the number of listings so far."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.asked: list[str] = []
        self.trouble: Exception | None = None
        self.missed: list[Sequence[str]] = []  # what the keeper took for lost

    async def requeue_lost(self, event_ids: Sequence[str]) -> int:
        self.missed.append(event_ids)
        if len(self.missed) == 1:
            raise RelayUnavailable("the relay does not answer")
        return len(event_ids)

    async def list_committed(self, after: str) -> AsyncGenerator[Listed, None]:
        self.asked.append(after)
        if self.trouble and (after or not isinstance(self.trouble, SnapshotRefused)):
            raise self.trouble
        for start in range(0, len(self.ids), 1_000):
            yield Listed(self.ids[start : start + 1_000])
        yield Listed([], str(len(self.asked)), NOON + len(self.asked) * SECOND)


@asynccontextmanager
async def keeping(url: str, fake: FakeOutbox, **options: Any) -> AsyncIterator[asyncio.Task[None]]:
    async with postgres.open_pool(
        url,
        role="analytics_consumer",
        application_name="keeper",
        size=1,
        statement_timeout_s=10,
        settings=KEEPER_SESSION,
    ) as opened:
        task = asyncio.ensure_future(Keeper(opened, fake.list_committed, fake.requeue_lost, **options).run())
        try:
            yield task
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def complete_through(url: str) -> datetime | None:
    moment: datetime | None = query(url, "SELECT complete_through_at FROM freshness")[0][0]
    return moment


async def moves(url: str, what: str) -> None:
    before = complete_through(url)

    async def moved() -> bool:
        now = complete_through(url)
        return now is not None and (before is None or now > before)

    await eventually(moved, what)


async def test_one_keeps_and_another_takes_over(analytics_db: str) -> None:
    """Of three, one asks the relay. When its connection is cut it stores nothing more, and one of them goes on."""
    fakes = [FakeOutbox() for _ in range(3)]
    async with contextlib.AsyncExitStack() as stack:
        for fake in fakes:
            await stack.enter_async_context(keeping(analytics_db, fake))
        for _ in range(3):
            await moves(analytics_db, "somebody keeps")
            assert len(query(analytics_db, HOLDERS)) == 1
            query(analytics_db, f"SELECT pg_terminate_backend(pid) FROM ({HOLDERS}) AS holder")
    assert sum(bool(fake.asked) for fake in fakes) >= 1
    assert query(analytics_db, HOLDERS) == []  # all have stopped


async def test_a_frozen_keeper_loses_the_lock(analytics_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits for the relay shows that it lives; one that shows nothing any more is ended by the server."""
    monkeypatch.setitem(KEEPER_SESSION, "idle_session_timeout", "1s")
    monkeypatch.setattr(signs_of_life, "SIGN_OF_LIFE_EVERY_S", 0.1)
    slow = FakeOutbox()
    answer = asyncio.Event()

    async def list_slowly(after: str) -> AsyncGenerator[Listed, None]:
        await answer.wait()
        async for part in slow.list_committed(after):
            yield part

    waiting = SimpleNamespace(list_committed=list_slowly, requeue_lost=slow.requeue_lost)
    async with keeping(analytics_db, waiting):  # type: ignore[arg-type]

        async def keeps() -> bool:
            return len(query(analytics_db, HOLDERS)) == 1

        await eventually(keeps, "it keeps")
        ((pid,),) = query(analytics_db, HOLDERS)

        async def long_after() -> bool:
            connected = (
                f"SELECT clock_timestamp() > backend_start + interval '3 s' FROM pg_stat_activity WHERE pid = {pid}"
            )
            return query(analytics_db, connected) == [(True,)]

        await eventually(long_after, "it has waited for longer than a silent one may")
        assert query(analytics_db, HOLDERS) == [(pid,)]
        monkeypatch.setattr(signs_of_life, "SIGN_OF_LIFE_EVERY_S", WAIT_S)  # now it stands still

        async def gone() -> bool:
            return query(analytics_db, f"SELECT FROM pg_stat_activity WHERE pid = {pid}") == []

        await eventually(gone, "the server has ended its session, and with it goes the lock")
        answer.set()


def test_how_long_a_frozen_keeper_has_the_lock() -> None:
    assert KEEPER_SESSION == {"idle_session_timeout": "8s"}


async def test_a_relay_that_cannot_be_asked(analytics_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No news, no promise; and it goes on by itself. A snapshot that the relay cannot read: everything is listed."""
    fake = FakeOutbox()
    fake.trouble = RelayUnavailable("not there")
    async with keeping(analytics_db, fake):

        async def tried() -> bool:
            return len(fake.asked) >= 2

        await eventually(tried, "it tries again")
        assert complete_through(analytics_db) is None
        fake.trouble = None
        await moves(analytics_db, "it is back")
        fake.trouble = SnapshotRefused("of an older version")
        await moves(analytics_db, "it lists everything")
        fake.trouble = EventsDropped("past their retention")
        await eventually(lambda: _equal(rebuild_needed, 1.0), "it says that it cannot go on")
        stands_at, asked = complete_through(analytics_db), len(fake.asked)

        async def asked_again() -> bool:
            return len(fake.asked) >= asked + 2

        await eventually(asked_again, "it tries again")
        assert (complete_through(analytics_db), await rebuild_needed()) == (stands_at, 1.0)
        fake.trouble = None
        await moves(analytics_db, "after a rebuild it goes on")
        assert await rebuild_needed() == 0.0
        fake.trouble = ValueError("a bug")
        fake.trouble, asked = None, len(fake.asked)
        await moves(analytics_db, "it survives")
        assert len(fake.asked) > asked


async def test_what_holds_it_back_is_shown_and_let_go(analytics_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest id that is waited for is shown, until all are settled: counted, quarantined or forgotten."""
    monkeypatch.setattr(keeper, "SHOW_AFTER_S", 0.1)
    fake = FakeOutbox()
    fake.ids = [ID.format(9, n) for n in (3, 1, 2)] + [ID.format(8, 1)]
    query(analytics_db, f"UPDATE freshness SET log_floor = '{ID.format(8, 2)}'")

    async def shown() -> Any:
        return query(analytics_db, "SELECT oldest_awaited_id::text FROM freshness")[0][0]

    async with keeping(analytics_db, fake):
        log = "INSERT INTO analytics_event_log (event_id, event_type) VALUES ('{}', 'PurchaseCreated')"
        for n in (1, 2):
            await eventually(lambda n=n: _equal(shown, ID.format(9, n)), "it shows the oldest")  # type: ignore[misc]
            query(analytics_db, log.format(ID.format(9, n)))
        assert complete_through(analytics_db) is None
        query(
            analytics_db,
            "INSERT INTO quarantined_events (event_id, reason, detail, body, properties)"
            f" VALUES ('{ID.format(9, 3)}', 'UNDECODABLE', '', '', '{{}}')",
        )
        await moves(analytics_db, "all are settled")
        await eventually(lambda: _equal(shown, None), "nothing is waited for")


async def rebuild_needed() -> float:
    return float(keeper.REBUILD_NEEDED.labels(DEFAULT)._value.get())


async def _equal(value: Any, wanted: Any) -> bool:
    return bool(await value() == wanted)


async def test_a_clock_that_ran_ahead_and_others_who_set_the_mark(analytics_db: str) -> None:
    """A promise that has turned out false is taken back and counted; a tick from another mark stores nothing."""
    query(analytics_db, "INSERT INTO cell_marks (cell, complete_through_at) VALUES ('default', '2030-01-01Z')")
    fake = FakeOutbox()
    taken_back = keeper.TAKEN_BACK.labels(DEFAULT)._value.get()
    async with pool(analytics_db, "analytics_consumer") as opened, opened.connection() as connection:
        worker = Keeper(opened, fake.list_committed, fake.requeue_lost)
        assert await worker.run_once(connection)
        assert complete_through(analytics_db) == NOON + SECOND
        assert keeper.TAKEN_BACK.labels(DEFAULT)._value.get() == taken_back + 1
        assert await worker.run_once(connection)
        assert keeper.TAKEN_BACK.labels(DEFAULT)._value.get() == taken_back + 1
        assert query(analytics_db, "SELECT after_snapshot FROM cell_marks") == [("2",)]

        async def disturbed(after: str) -> AsyncGenerator[Listed, None]:
            query(analytics_db, "UPDATE cell_marks SET after_snapshot = 'restored'")
            async for part in fake.list_committed(after):
                yield part

        assert not await Keeper(opened, disturbed, fake.requeue_lost).run_once(connection)
        assert query(analytics_db, "SELECT after_snapshot FROM cell_marks") == [("restored",)]


async def test_events_that_never_come_are_asked_for(analytics_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while, again and again, though the relay may be away; those that are settled are not."""
    monkeypatch.setattr(keeper, "LOST_AFTER_S", 0.2)
    monkeypatch.setattr(keeper, "LOST_EVERY_S", 0.1)
    fake = FakeOutbox()
    fake.ids = [ID.format(0, n) for n in range(3)]
    query(analytics_db, f"INSERT INTO analytics_event_log (event_id, event_type) VALUES ('{fake.ids[0]}', 'x')")

    async def asked() -> bool:
        return len(fake.missed) >= 2

    async with keeping(analytics_db, fake):
        await eventually(asked, "the relay is asked")
        assert all(sorted(missed) == fake.ids[1:] for missed in fake.missed)
        for event_id in fake.ids[1:]:
            query(analytics_db, f"INSERT INTO analytics_event_log (event_id, event_type) VALUES ('{event_id}', 'x')")
        await moves(analytics_db, "all are settled")


async def test_a_million_ids(analytics_db: str) -> None:
    """The first listing of a large outbox: read part by part; what is not settled is kept, up to a bound."""
    count = IDS
    fake = FakeOutbox()
    fake.ids = [ID.format(n >> 16, n) for n in range(count)]
    query(
        analytics_db,
        "INSERT INTO analytics_event_log (event_id, event_type) SELECT ('0190' || lpad(to_hex(n >> 16), 4, '0') ||"
        f" '-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 'x' FROM generate_series(0, {count - 2_501}) n",
    )
    async with pool(analytics_db, "analytics_consumer") as opened, opened.connection() as connection:
        begin, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        worker = Keeper(opened, fake.list_committed, fake.requeue_lost, awaited_max=2_000)
        tick = asyncio.ensure_future(worker.run_once(connection))

        async def kept() -> bool:
            return bool(keeper.AWAITED.labels(DEFAULT)._value.get() >= 2_000)

        await eventually(kept, "it waits")
        query(
            analytics_db,
            "INSERT INTO analytics_event_log (event_id, event_type) SELECT ('0190' || lpad(to_hex(n >> 16), 4, '0') ||"
            f" '-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 'x'"
            f" FROM generate_series({count - 2_500}, {count - 1}) n",
        )
        # More than may be kept were not settled: that tick promises nothing. The next one finds them all.
        assert not await asyncio.wait_for(tick, WAIT_S)
        assert await worker.run_once(connection)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
        print(f"{count} ids twice: {time.monotonic() - begin:.1f} s, {grown / 1024:.0f} MB more", file=sys.stderr)
        assert grown < 60 * 1024  # kB
