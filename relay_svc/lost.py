"""Events that the broker confirmed, and that will never come out of its queue: they are published once more.

A queue that was deleted, purged, or unbound in the very moment of a window breaks the broker's word, and nothing tells
the relay so. It is known by three things together: the reader of committed events has waited long for events that were
sent long ago; the queue is empty; and somebody consumes from it. Should they have been in a consumer's hands all the
same, they are counted once.
"""

import asyncio
from collections.abc import Sequence

import psycopg
import structlog
from prometheus_client import Counter
from psycopg import sql
from psycopg_pool import PoolTimeout

from chassis.lifecycle import wait_set
from chassis.postgres import Connection, Pool
from relay_svc import days, inspection
from relay_svc.days import Day
from relay_svc.publisher import Publisher

LOOK_EVERY_S = 5.0
AFTER_S = 30.0  # a consumer with an empty queue has counted an event long before
AT_ONCE = 1_000  # events; while the queue is not empty there are no more

AGAIN = Counter("relay_events_lost_by_broker_total", "Confirmed events that were never counted, and published again.")

log = structlog.get_logger()


async def keep(pool: Pool, publisher: Publisher, stop: asyncio.Event) -> None:
    """Look until `stop`."""
    while not await wait_set(stop, LOOK_EVERY_S):
        try:
            await run_once(pool, publisher, AFTER_S)
        except (psycopg.Error, PoolTimeout) as error:
            log.warning("lost events are not looked for", error=error)


async def run_once(pool: Pool, publisher: Publisher, after_s: float) -> int:
    """Have those published again that are lost; how many they are."""
    async with pool.connection() as connection:
        if not await _reader_waits(connection, after_s):
            return 0
        queue = await publisher.queue()
        if queue is None or queue.ready or not queue.consumers:
            return 0
        lost = await _awaited(connection, after_s)
        async with connection.transaction():
            count = await inspection.requeue(connection, lost)
    if count:
        AGAIN.inc(count)
        log.error("confirmed events never came out of the queue; publishing them again", events=count, first=min(lost))
    return count


async def _reader_waits(connection: Connection, after_s: float) -> bool:
    """Whether the reader has asked for nothing since then: it does so when all that it was given last is counted."""
    cursor = await connection.execute(
        """
        SELECT FROM outbox_listing WHERE realm = transaction_ids_realm() AND after_snapshot IS NOT NULL
            AND received_at < now() - %s * interval '1 second'
        """,
        [after_s],
    )
    return bool(await cursor.fetchall())


async def _awaited(connection: Connection, after_s: float) -> list[str]:
    """Events that were sent long ago, among those that the reader was given and has not acknowledged."""
    ((known,),) = await (await connection.execute("SELECT after_snapshot::text FROM outbox_listing")).fetchall()
    lost: list[str] = []
    for part in days.parts((await days.since(connection, known)).days):
        if len(lost) < AT_ONCE:
            lost += await _awaited_of(connection, part, after_s, AT_ONCE - len(lost))
    return lost


async def _awaited_of(connection: Connection, among: Sequence[Day], after_s: float, most: int) -> list[str]:
    statement = sql.SQL(
        """
        SELECT e.event_id::text
        FROM outbox_listing l, outbox_events e
        WHERE (e.created_xid >= pg_snapshot_xmax(l.after_snapshot)
                OR e.created_xid = ANY(ARRAY(SELECT pg_snapshot_xip(l.after_snapshot))))
            AND pg_visible_in_snapshot(e.created_xid, l.given_snapshot)
            AND e.status = 'SENT' AND e.sent_at < now() - %s * interval '1 second' AND {}
        LIMIT %s
        """
    )
    cursor = await connection.execute(statement.format(days.within(among)), [after_s, most])
    return [event_id for (event_id,) in await cursor.fetchall()]
