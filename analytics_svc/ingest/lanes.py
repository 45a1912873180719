"""Which branches of a large batch to count next: those at whose rows no other consumer is.

Two large batches share nearly all branches, and a transaction keeps each row that it has changed until its end. So a
consumer counts its batch lane by lane, a transaction for each, and begins with one that nobody else is at. That is a
matter of speed alone: rows are locked in one order, in whatever lane, and who finds no lane free goes on without.
"""

from collections.abc import Collection

from chassis.postgres import Connection

LANES = 4  # enough that two or three consumers pass each other; each costs a batch one more transaction
LANES_LOCK = 1_691_668  # any number; advisory locks are per database, and those of two numbers apart from those of one


def lane_of(branch_id: int) -> int:
    return branch_id % LANES


async def enter_free(connection: Connection, lanes: Collection[int]) -> int | None:
    """Enter one of these lanes until the transaction ends; None when others are in all of them."""
    cursor = await connection.execute(
        "SELECT lane FROM unnest(%s::int[]) AS lane WHERE pg_try_advisory_xact_lock(%s, lane) LIMIT 1",
        [list(lanes), LANES_LOCK],
    )
    row = await cursor.fetchone()
    return row[0] if row else None
