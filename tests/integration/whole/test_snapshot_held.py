"""What holds back vacuum, and so makes every commit and every answer slower by and by, is a metric."""

import psycopg

from analytics_svc.ingest.health import Health
from analytics_svc.ingest.upkeep import SNAPSHOT_HELD, Upkeep
from tests.conftest import pool


async def ignore(_serving: bool) -> None:
    pass


async def test_a_snapshot_that_is_held_is_measured(analytics_db: str) -> None:
    """One of this database; and of another one of the server, a transaction that writes."""
    async with pool(analytics_db, "analytics_consumer") as opened:
        upkeep = Upkeep(opened, Health(ignore, set()), 0)

        async def held_s() -> float:
            await upkeep.run_once()
            return float(SNAPSHOT_HELD._value.get())

        other_database = psycopg.conninfo.make_conninfo(analytics_db, dbname="template1")
        for url, question in ((analytics_db, "SELECT 1"), (other_database, "SELECT pg_current_xact_id()")):
            with psycopg.connect(url) as connection:
                connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                connection.execute(question)
                connection.execute("SELECT pg_sleep(1)")
                assert await held_s() >= 1
