"""What is counted, and the floor: ids below it may be forgotten, so whatever comes with one is not counted again.

The floor moves first, alone with the apply lock, and only then are ids deleted. An apply holds that lock, too, shared:
so it never meets a log that has forgotten more than the floor that it read.
"""

from typing import LiteralString, NamedTuple

from chassis.postgres import Connection

FORGET_LOCK = 7_265_746_178  # held by the process that deletes, or by a repair, as nothing may be forgotten meanwhile
# Whoever is frozen, or whose host is lost, with the lock or rows in hand keeps all others from counting: no transaction
# that counts or repairs lasts longer. Batches are of a size to take a tenth of that.
HOLD_MAX_S = 8.0
NO_FLOOR = ""  # below every id
LATE_DAYS = 30  # beyond the retention, that an event in quarantine may have been under way and still hold the floor


async def enter(connection: Connection) -> str:
    """Hold the apply lock, shared, until the transaction ends. Comes before whatever is applied. Returns the floor.

    Two statements: a floor read by the one that waits for the lock would be from before the wait.
    """
    await connection.execute("LOCK TABLE apply_lock IN ROW EXCLUSIVE MODE")
    cursor = await connection.execute("SELECT log_floor::text FROM freshness")
    ((floor,),) = await cursor.fetchall()
    return floor or NO_FLOOR


async def exclude_applies(connection: Connection) -> None:
    """Wait until no transaction applies events, and let none begin until this one ends."""
    await connection.execute("LOCK TABLE apply_lock IN SHARE ROW EXCLUSIVE MODE")


class Floor(NamedTuple):
    event_id: str
    held_by: str | None  # what is in quarantine and keeps it lower than the retention allows


async def raise_floor(connection: Connection, keep_days: int) -> Floor:
    """Raise the floor to what is older than `keep_days` and settled. In a transaction of its own.

    Settled is what lies below complete_through_time, is not awaited and not in quarantine. Without that time, the floor
    stays. Ids carry the time of recording; random ids of others lie anywhere. Whoever publishes chooses the ids in
    quarantine: one that claims to have been recorded long before it came holds nothing.
    """
    await exclude_applies(connection)
    cursor = await connection.execute(
        f"""
        WITH bounds AS (
            SELECT {_id_at("greatest(least(now(), complete_through_at) - make_interval(days => %(days)s), 'epoch')")}
                    AS allowed,
                (
                    SELECT event_id FROM quarantined_events AS kept
                    WHERE event_id >= coalesce(log_floor, '00000000-0000-0000-0000-000000000000')
                        AND event_id >= {_id_at("quarantined_at - make_interval(days => %(days)s + %(late)s)")}
                        AND NOT EXISTS (SELECT FROM analytics_event_log AS log WHERE log.event_id = kept.event_id)
                    ORDER BY event_id LIMIT 1
                ) AS held
            FROM freshness WHERE complete_through_at IS NOT NULL
        )
        UPDATE freshness SET log_floor = greatest(log_floor, least(allowed, oldest_awaited_id, held)) FROM bounds
        RETURNING log_floor::text, CASE WHEN held < allowed THEN held::text END
        """,
        {"days": keep_days, "late": LATE_DAYS},
    )
    row = await cursor.fetchone()
    return Floor(*row) if row else Floor(NO_FLOOR, None)


def _id_at(moment: LiteralString) -> LiteralString:
    """The lowest id of ours that could have been made then."""
    milliseconds: LiteralString = f"floor(extract(epoch FROM {moment}) * 1000)::bigint"
    return f"(lpad(to_hex({milliseconds}), 12, '0') || repeat('0', 20))::uuid"


async def forget(connection: Connection, after: str, most: int) -> str | None:
    """Delete the lowest `most` ids above `after` and below the floor; returns the last, or None when none was left.

    None, too, while another process does the same: the two would wait for each other.
    """
    cursor = await connection.execute(
        "SELECT CASE WHEN pg_try_advisory_xact_lock(%s) THEN forget_events(%s, %s) END::text",
        [FORGET_LOCK, after, most],
    )
    ((last,),) = await cursor.fetchall()
    return last  # type: ignore[no-any-return]
