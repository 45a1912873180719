"""What this cell has, for operators. Every function takes the connection and commits nothing."""

import datetime
from typing import NamedTuple

from chassis.postgres import Connection

LOAD_OVER = datetime.timedelta(minutes=1)


class Moved(NamedTuple):
    branch_id: int
    state: str  # as in the migration
    other_cell: str
    since: datetime.datetime


class CellStatus(NamedTuple):
    database_id: str
    purchases: int  # an estimate; 0 while nothing was analysed
    bytes: int
    sales_per_s: float
    moves: list[Moved]


async def read(connection: Connection) -> CellStatus:
    since = datetime.datetime.now(datetime.UTC) - LOAD_OVER
    cursor = await connection.execute(
        """
        SELECT split_part(realm, '.', 1) || '.' || split_part(realm, '.', 3),
            (SELECT coalesce(sum(greatest(reltuples, 0)), 0)::bigint FROM pg_inherits
                JOIN pg_class ON pg_class.oid = inhrelid WHERE inhparent = 'purchases'::regclass),
            pg_database_size(current_database()),
            (SELECT count(*) FROM outbox_events WHERE event_id >= %s::uuid)
        FROM transaction_ids_realm() AS realm
        """,
        [_uuid7_floor(since)],
        prepare=False,  # planned for this very time: then only today's events are looked at
    )
    ((database_id, purchases, size, sales),) = await cursor.fetchall()
    cursor = await connection.execute(
        "SELECT branch_id, state, other_cell, greatest(since, 'epoch') FROM branch_moves ORDER BY branch_id"
    )
    moves = [Moved(*row) for row in await cursor.fetchall()]
    return CellStatus(database_id, purchases, size, sales / LOAD_OVER.total_seconds(), moves)


def _uuid7_floor(moment: datetime.datetime) -> str:
    return f"{int(moment.timestamp() * 1000):012x}".ljust(32, "0")
