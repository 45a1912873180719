"""What one process's login may do in its database stops no other process, and deceives none."""

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from zoneinfo import ZoneInfo

import psycopg
import pytest

from analytics_svc.commands.serve import serve
from analytics_svc.ingest import event_log
from analytics_svc.ingest.announce import CHANNEL, parse
from analytics_svc.ingest.apply import apply
from analytics_svc.ingest.events import decode
from analytics_svc.settings import ServeSettings
from purchases_svc.partitions import Partitions
from relay_svc import committed
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub
from tests.conftest import pool
from tests.integration.conftest import free_address, running
from tests.integration.outbox_events import make_days, write
from tests.integration.purchase_events import query, sold
from tests.integration.serve.test_analytics_queries import record
from tests.integration.serve.test_watch import FIRST, Viewer, sales

ADVISORY_LOCKS = range(7_265_746_160, 7_265_746_190)  # all of ours, also of earlier versions


@contextmanager
def login(url: str, role: str) -> Iterator["psycopg.Connection[Any]"]:
    """A session of a process that somebody else has got hold of."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"SET SESSION AUTHORIZATION {role}")
        yield connection


NOTHING_CHANGED = '{{"number": {0}, "rows": []}}'
LIES = [
    (NOTHING_CHANGED.format(999_999_999),),
    (NOTHING_CHANGED.format(-1), NOTHING_CHANGED.format(0)),
    (NOTHING_CHANGED,),  # of the very next number
    (NOTHING_CHANGED, NOTHING_CHANGED, '{{"number": {1}, "rows": []}}'),
    ('{{"number": {0}, "rows": [["0001-01-01", 1], ["9999-12-31", 99999999999999999999]]}}',),
    ("", "hello", "[" * 7_900, "1" * 7_900, "null", '{{"number": 1e999, "rows": "*"}}', '{{"rows": "*"}}'),
]


@pytest.mark.parametrize("lies", LIES)
async def test_forged_announcements(analytics_db: str, lies: tuple[str, ...]) -> None:
    """The read-only login announces what never was: watchers and tokens go on, and miss nothing."""
    config = ServeSettings(analytics_db, listen=free_address(), metrics_listen="127.0.0.1:0")
    with login(analytics_db, "analytics_server") as stranger:
        async with running(lambda stop: serve(config, stop), config.listen) as channel:
            viewer = Viewer(AnalyticsServiceStub(channel))
            await record(analytics_db, sales(1))
            await viewer.until({(FIRST, 1): 1})
            for count in range(2, 5):
                ((last,),) = query(analytics_db, "SELECT announced_count FROM freshness")
                for lie in lies:
                    payload = lie.format(last + 1, last + 2) if "{0}" in lie or "{{" in lie else lie
                    stranger.execute("SELECT pg_notify(%s, %s)", [CHANNEL, payload])
                await record(analytics_db, sales(1))
                await viewer.until({(FIRST, 1): count})


@pytest.mark.parametrize(
    "payload",
    [
        "",
        "{}",
        "7",
        "[" * 7_900,
        "1" * 7_900,
        '{"number": "1", "rows": "*"}',
        '{"number": true, "rows": "*"}',
        '{"number": NaN, "rows": "*"}',
        '{"number": 1, "rows": 7}',
        '{"number": 1, "rows": [["2026-01-01"]]}',
        '{"number": 1, "rows": [["2026-13-01", 1]]}',
        '{"number": 1, "rows": [["2026-01-01", 2147483648]]}',
        '{"number": 1, "rows": [["2026-01-01", 0]]}',
        '{"number": 1, "rows": [["2026-01-01", 1.5]]}',
        '{"number": 1, "rows": [[20260101, 1]]}',
    ],
)
def test_what_is_no_announcement(payload: str) -> None:
    assert parse(payload) is None


async def test_read_only_login_does_not_stop_counting(analytics_db: str) -> None:
    """It may hold each advisory lock that there is, and none of the locks that counting waits for."""
    complete = "UPDATE freshness SET complete_through_at = now()"
    query(analytics_db, complete)
    with login(analytics_db, "analytics_server") as stranger:
        for lock in ADVISORY_LOCKS:
            stranger.execute("SELECT pg_advisory_lock(%s)", [lock])
        for table in ("apply_lock", "freshness", "sales_totals", "analytics_event_log"):
            for mode in ("ROW SHARE", "ROW EXCLUSIVE", "SHARE UPDATE EXCLUSIVE", "SHARE", "ACCESS EXCLUSIVE"):
                with pytest.raises(psycopg.errors.InsufficientPrivilege), stranger.transaction():
                    stranger.execute(f"LOCK TABLE {table} IN {mode} MODE NOWAIT")
        for strength in ("KEY SHARE", "SHARE", "UPDATE"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                stranger.execute(f"SELECT FROM freshness FOR {strength}")
        async with pool(analytics_db, "analytics_consumer") as opened, opened.connection() as connection:
            async with connection.transaction():
                counted = await apply(connection, [decode(sold("1.00").body(), ZoneInfo("UTC"))], [])
            assert counted.counted == 1
            async with connection.transaction():
                await event_log.raise_floor(connection, 30)


async def test_no_login_stops_the_making_of_partitions(purchases_db: str) -> None:
    """The relay's login holds what it may hold; the next month and day come all the same."""
    with login(purchases_db, "purchases_relay") as stranger:
        for name in ("ensure_purchases_month", "ensure_outbox_day"):
            stranger.execute("SELECT pg_advisory_lock(hashtext(%s))", [name])
        for table in ("months_lock", "days_lock"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege), stranger.transaction():
                stranger.execute(f"LOCK TABLE {table} IN ACCESS SHARE MODE")
        async with pool(purchases_db, "purchases_service") as opened:
            await Partitions(opened).ensure([datetime.date(2026, 3, 1)], [datetime.date(2026, 3, 1)])


async def test_nobody_is_sure_of_what_was_not_given(purchases_db: str) -> None:
    """The database refuses an acknowledgement that is ahead of what was listed, and a listing of the future."""
    make_days(purchases_db)
    async with pool(purchases_db, "purchases_relay") as opened, opened.connection() as connection:

        async def ask(after: committed.Snapshot | None) -> committed.Listing:
            first, *_ = [part async for part in committed.since(connection, after)]
            await committed.remember(connection, first)
            return first

        given = (await ask((await ask(None)).snapshot)).snapshot
        assert given
        write(purchases_db, 3)
        async with connection.transaction():
            ahead = (await committed.position(connection)).snapshot
        assert ahead
        before = query(purchases_db, "SELECT after_snapshot::text, given_snapshot::text FROM outbox_listing")
        for change, snapshot in (
            ("after_snapshot", ahead.value),
            ("after_snapshot", "1:4000000000:"),
            ("given_snapshot", "1:4000000000:"),
        ):
            with pytest.raises(psycopg.errors.InvalidParameterValue):
                await connection.execute(f"UPDATE outbox_listing SET {change} = %s::pg_snapshot", [snapshot])
        assert query(purchases_db, "SELECT after_snapshot::text, given_snapshot::text FROM outbox_listing") == before
        await ask(ahead)  # as if it knew nothing: more is kept, not less
        assert query(purchases_db, "SELECT after_snapshot FROM outbox_listing") == [(None,)]
        await ask(given)  # and the one that was given it goes on
        assert query(purchases_db, "SELECT after_snapshot::text FROM outbox_listing") == [(given.value,)]
