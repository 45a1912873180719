"""What is counted, and the floor: ids below it may be forgotten, so whatever comes with one is not counted again.

The floor moves first, alone with the apply lock, and only then are ids deleted. An apply holds that lock, too, shared:
so it never meets a log that has forgotten more than the floor that it read.
"""

from chassis.postgres import Connection

APPLY_LOCK = 7_265_746_170  # any numbers; advisory locks are per database
REBUILD_LOCK = 7_265_746_175  # held by a rebuild as long as it must be told what is counted
NO_FLOOR = ""  # below every id


async def enter(connection: Connection) -> tuple[str, bool]:
    """Hold the apply lock, shared, until the transaction ends. Comes before whatever is applied.

    Returns the floor, and whether a rebuild is under way, which must be told what is counted. A rebuild that waits for
    its lock gets it when all transactions that were told of none have ended.

    Two statements: a floor read by the one that waits for the lock would be from before the wait.
    """
    await connection.execute("SELECT pg_advisory_xact_lock_shared(%s)", [APPLY_LOCK])
    cursor = await connection.execute(
        "SELECT log_floor::text, NOT pg_try_advisory_xact_lock_shared(%s) FROM freshness", [REBUILD_LOCK]
    )
    ((floor, rebuilding),) = await cursor.fetchall()
    return floor or NO_FLOOR, rebuilding


async def exclude_applies(connection: Connection) -> None:
    """Wait until no transaction applies events, and let none begin until this one ends."""
    await connection.execute("SELECT pg_advisory_xact_lock(%s)", [APPLY_LOCK])
