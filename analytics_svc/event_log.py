"""What is counted, and the floor: ids below it may be forgotten, so whatever comes with one is not counted again.

The floor moves first, alone with the apply lock, and only then are ids deleted. An apply holds that lock, too, shared:
so it never meets a log that has forgotten more than the floor that it read.
"""

from chassis.postgres import Connection

APPLY_LOCK = 7_265_746_170  # any number; advisory locks are per database
NO_FLOOR = ""  # below every id


async def enter(connection: Connection) -> str:
    """Hold the apply lock, shared, until the transaction ends; returns the floor. Comes before whatever is applied.

    Two statements: a floor read by the one that waits for the lock would be from before the wait.
    """
    await connection.execute("SELECT pg_advisory_xact_lock_shared(%s)", [APPLY_LOCK])
    cursor = await connection.execute("SELECT log_floor::text FROM freshness")
    ((floor,),) = await cursor.fetchall()
    return floor or NO_FLOOR


async def exclude_applies(connection: Connection) -> None:
    """Wait until no transaction applies events, and let none begin until this one ends."""
    await connection.execute("SELECT pg_advisory_xact_lock(%s)", [APPLY_LOCK])
