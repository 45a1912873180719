"""What the write half tells the query servers, heard on a real database."""

from datetime import timedelta

import psycopg

from analytics_svc.ingest.announce import CHANNEL, EVERYTHING, Announcement, parse
from analytics_svc.ingest.apply import apply
from analytics_svc.ingest.quarantine import QuarantinedEvent
from tests.conftest import pool
from tests.integration.ingest.test_apply import decoded
from tests.integration.purchase_events import NOON, query, sold

POISON = QuarantinedEvent(None, "UNDECODABLE", "no JSON", b"\xff", {})


async def test_each_visible_change_is_announced_once(analytics_db: str) -> None:
    """Numbered without gaps, also when a transaction is rolled back; naming the rows; silent about duplicates."""
    sale = sold("1.00", branch_id=7)
    many = [sold("1.00", branch_id=n, purchase_time=NOON + timedelta(days=n)) for n in range(1, 501)]
    async with (
        await psycopg.AsyncConnection.connect(analytics_db, autocommit=True) as listener,
        pool(analytics_db, "analytics_consumer") as opened,
        opened.connection() as connection,
    ):
        await listener.execute(f"LISTEN {CHANNEL}")
        for events, unfit in (([sale], []), ([sale], []), (many, []), ([], [POISON]), ([], [POISON])):
            async with connection.transaction(), connection.transaction(force_rollback=True):
                await apply(connection, decoded(events), unfit)
            async with connection.transaction():
                await apply(connection, decoded(events), unfit)
        heard = [parse(notify.payload) async for notify in listener.notifies(timeout=10, stop_after=3)]
        assert heard == [
            Announcement(1, frozenset({(NOON.date(), 7)})),
            Announcement(2, EVERYTHING),  # more rows than fit into a notification
            Announcement(3, frozenset()),
        ]
    assert query(analytics_db, "SELECT announced_count, quarantined_count FROM freshness") == [(3, 1)]
