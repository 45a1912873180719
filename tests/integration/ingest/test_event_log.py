"""The log of counted events forgets what is old, and never counts it again."""

import asyncio
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import psycopg
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from analytics_svc.ingest import event_log
from analytics_svc.ingest.apply import apply
from analytics_svc.ingest.events import decode
from tests.conftest import eventually, pool
from tests.integration.consumers import COUNTED, QUARANTINED, consuming, counts, depth, is_true, publish
from tests.integration.purchase_events import GOLDEN, query, read_models, sold


def uuid7(moment: datetime, rest: int = 0) -> str:
    """An id as the purchases service makes them at that moment."""
    return str(uuid.UUID(int=int(moment.timestamp() * 1000) << 80 | 7 << 76 | 2 << 62 | rest))


@pytest.fixture
def ago() -> Callable[..., str]:
    """Gives ids of so long ago, counted from one moment for the whole test."""
    now = datetime.now(UTC)
    return lambda **age: uuid7(now - timedelta(**age))


async def raised(url: str, days: int = 30) -> str:
    async with pool(url, "analytics_consumer") as opened, opened.connection() as connection, connection.transaction():
        return (await event_log.raise_floor(connection, days)).event_id


def complete_through(url: str, days_ago: int = 0, awaited: str | None = None) -> None:
    moment = datetime.now(UTC) - timedelta(days=days_ago)
    with psycopg.connect(url) as connection:
        connection.execute("UPDATE freshness SET complete_through_at = %s, oldest_awaited_id = %s", [moment, awaited])


def quarantine(url: str, event_id: str | None, reason: str = "BROKEN_CONTRACT") -> None:
    with psycopg.connect(url) as connection:
        connection.execute(
            "INSERT INTO quarantined_events (event_id, reason, detail, body, properties) VALUES (%s, %s, '', %s, '{}')",
            [event_id, reason, uuid.uuid4().bytes],
        )


async def test_floor_passes_nothing_that_is_not_settled(analytics_db: str, ago: Callable[..., str]) -> None:
    """Without complete_through_time there is none; else the oldest of what is kept, awaited or in quarantine."""
    assert await raised(analytics_db) == ""
    complete_through(analytics_db)
    quarantine(analytics_db, None)
    quarantine(analytics_db, ago(days=1))
    assert ago(days=30.01) < await raised(analytics_db) < ago(days=29.99)
    complete_through(analytics_db, days_ago=2)
    assert ago(days=12.01) < await raised(analytics_db, days=10) < ago(days=11.99)
    complete_through(analytics_db, awaited=ago(days=9))
    assert await raised(analytics_db, days=5) == ago(days=9)
    complete_through(analytics_db)
    quarantine(analytics_db, ago(days=8))
    quarantine(analytics_db, ago(days=20))  # came from below the floor: it holds nothing back
    assert await raised(analytics_db, days=5) == ago(days=8)
    complete_through(analytics_db, days_ago=-300)  # a clock that is wrong
    query(analytics_db, "DELETE FROM quarantined_events")
    assert ago(days=1.01) < await raised(analytics_db, days=1) < ago(days=0.99)


async def test_no_strangers_id_holds_the_floor(analytics_db: str, ago: Callable[..., str]) -> None:
    """Who publishes what is not ours chooses its id; of real ones that came late, the oldest does, and is named."""
    complete_through(analytics_db)
    for forged in ("00000000-0000-0000-0000-000000000001", ago(days=1_000), "01000000-0000-4000-8000-000000000000"):
        quarantine(analytics_db, forged, "UNDECODABLE")
    counted = ago(days=33)
    query(analytics_db, f"INSERT INTO analytics_event_log (event_id, event_type) VALUES ('{counted}', 'x')")
    quarantine(analytics_db, counted, "CONFLICTING_DUPLICATE")
    async with pool(analytics_db, "analytics_consumer") as opened, opened.connection() as connection:
        async with connection.transaction():
            floor = await event_log.raise_floor(connection, 60)
        assert ago(days=60.01) < floor.event_id < ago(days=59.99)
        assert floor.held_by is None
        quarantine(analytics_db, late := ago(days=36))
        async with connection.transaction():
            assert await event_log.raise_floor(connection, 10) == (late, late)


async def test_floor_never_goes_back(analytics_db: str, ago: Callable[..., str]) -> None:
    """Neither by a longer retention, nor by hand."""
    complete_through(analytics_db)
    floor = await raised(analytics_db, days=10)
    assert await raised(analytics_db, days=36_500) == floor
    complete_through(analytics_db, awaited=ago(days=20))
    assert await raised(analytics_db, days=10) == floor
    for value in ("NULL", "'00000000-0000-0000-0000-000000000000'"):
        with pytest.raises(psycopg.errors.RaiseException, match="never goes back"):
            query(analytics_db, f"UPDATE freshness SET log_floor = {value}")


async def test_only_what_is_below_the_floor_is_forgotten(analytics_db: str, ago: Callable[..., str]) -> None:
    """In batches, the lowest first; without a floor, nothing."""
    ids = [ago(days=day) for day in range(60, 0, -1)]
    query(analytics_db, f"INSERT INTO analytics_event_log SELECT unnest('{{{','.join(ids)}}}'::uuid[]), now(), 'x'")
    async with pool(analytics_db, "analytics_consumer") as opened, opened.connection() as connection:
        assert await event_log.forget(connection, ids[-1], 7) is None
        assert await event_log.forget(connection, "00000000-0000-0000-0000-000000000000", 7) is None
        complete_through(analytics_db)
        async with connection.transaction():
            await event_log.raise_floor(connection, 40)
        assert await event_log.forget(connection, "00000000-0000-0000-0000-000000000000", 7) == ids[6]
        assert await event_log.forget(connection, ids[6], 7) == ids[13]
        last = await event_log.forget(connection, ids[13], 100)
        assert last in ids[19:21]
        assert await event_log.forget(connection, str(last), 100) is None
    assert query(analytics_db, COUNTED)[0][0] in (39, 40)


async def test_floor_waits_for_applies_and_applies_for_the_floor(analytics_db: str, ago: Callable[..., str]) -> None:
    """An apply that read the old floor ends before the floor moves; one that comes later reads the new one."""
    complete_through(analytics_db)
    old = decode(sold("1.00", event_id=ago(days=50)).body(), ZoneInfo("UTC"))
    blocked = "SELECT count(*) = {} FROM pg_locks WHERE relation = 'apply_lock'::regclass AND NOT granted"
    async with pool(analytics_db, "analytics_consumer", size=3) as opened, opened.connection() as first:
        async with first.transaction():
            assert (await apply(first, [old], [])).counted == 1
            raising = asyncio.create_task(raised(analytics_db))
            await eventually(lambda: is_true(analytics_db, blocked.format(1)), "the floor waits")

            async def late() -> tuple[int, int]:
                async with opened.connection() as second, second.transaction():
                    applied = await apply(second, [old], [])
                    return applied.counted, len(applied.below_floor)

            applying = asyncio.create_task(late())
            await eventually(lambda: is_true(analytics_db, blocked.format(2)), "the other apply waits")
        assert await raising > old.event_id
        assert await applying == (0, 1)


async def test_replay_of_a_forgotten_event(
    analytics_db: str, amqp_url: str, channel: BlockingChannel, ago: Callable[..., str]
) -> None:
    """Counted, forgotten and published again, it is quarantined and changes no number; new ones count."""
    forgotten, recent = sold("1.00", event_id=ago(days=50)), sold("2.00", event_id=ago(days=10))
    async with consuming(analytics_db, amqp_url):
        publish(channel, GOLDEN, forgotten.body(), recent.body())
        await counts(analytics_db, COUNTED, 3)
    before = read_models(analytics_db)
    complete_through(analytics_db)
    async with consuming(analytics_db, amqp_url, log_retention_days=30):
        await counts(analytics_db, COUNTED, 1)
        publish(channel, recent.body(), GOLDEN, *[forgotten.body()] * 2)
        await counts(analytics_db, QUARANTINED, 2)
        assert read_models(analytics_db) == before
        new = sold("3.00", event_id=ago(days=1))
        publish(channel, new.body())
        await counts(analytics_db, COUNTED, 2)
    assert depth(channel) == 0
    assert query(analytics_db, "SELECT DISTINCT reason FROM quarantined_events") == [("OLDER_THAN_FLOOR",)]
    assert query(analytics_db, "SELECT quarantined_count FROM freshness") == [(2,)]
    assert read_models(analytics_db)["totals"][0][2] == 4
