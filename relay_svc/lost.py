"""Events that the broker confirmed, and that will never come out of its queue: they are published once more.

A queue that was deleted, purged, or unbound in the very moment of a window breaks the broker's word, and nothing tells
the relay so. It is known by three things together: the reader of committed events names them, as it has waited long for
them; they were sent long ago; and the queue is empty, while somebody consumes from it. Should they have been in a
consumer's hands all the same, they are counted once.
"""

from collections.abc import Sequence

import structlog
from prometheus_client import Counter
from psycopg import sql

from chassis.postgres import Connection
from relay_svc import inspection
from relay_svc.publisher import Publisher

AFTER_S = 30.0  # a consumer with an empty queue has counted an event long before

AGAIN = Counter("relay_events_lost_by_broker_total", "Confirmed events that were never counted, and published again.")

log = structlog.get_logger()


async def requeue(connection: Connection, publisher: Publisher, awaited: Sequence[str], after_s: float) -> int:
    """Have those published again that are lost, once the transaction commits; how many they are."""
    queue = await publisher.queue()
    if queue is None or queue.ready or not queue.consumers:
        return 0
    statement = sql.SQL(  # the planner sees the days in the ids
        "SELECT event_id::text FROM outbox_events WHERE event_id = ANY ({}::uuid[]) AND status = 'SENT'"
        " AND sent_at < now() - {} * interval '1 second'"
    )
    cursor = await connection.execute(statement.format(list(awaited), after_s))
    lost = [event_id for (event_id,) in await cursor.fetchall()]
    if not lost:
        return 0
    count = await inspection.requeue(connection, lost)
    AGAIN.inc(count)
    log.error("confirmed events never came out of the queue; publishing them again", events=count, first=min(lost))
    return count
