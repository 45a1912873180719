"""The outbox as an operator sees it. Every function takes the connection and never commits."""

import asyncio
import datetime
from collections.abc import Sequence
from typing import LiteralString, NamedTuple

import psycopg
import structlog
from prometheus_client import Gauge
from psycopg import sql
from psycopg_pool import PoolTimeout

from chassis.lifecycle import wait_set
from chassis.postgres import Connection, Pool
from relay_svc import days
from relay_svc.days import Day
from relay_svc.outbox import NIL

COUNT_MAX = 1_000_000  # counting stops there: it takes a tenth of a second, and the answer is the same
BLOCKER_AGE_MIN_S = 5.0  # transactions of the daily work are younger
MEASURE_EVERY_S = 15.0

EVENTS = Gauge("relay_outbox_events", "Events that are not sent, counted up to a million.", ["status"])
OLDEST_SECONDS = Gauge("relay_oldest_pending_seconds", "Age of the oldest event that waits; 0 when none does.")
BLOCKER_SECONDS = Gauge("relay_cleanup_blocker_seconds", "Age of the transaction that holds back vacuum; 0 when none.")

log = structlog.get_logger()


class Backlog(NamedTuple):
    """What has not been sent, and since when the oldest of it waits."""

    new: int
    failed: int
    oldest_age: datetime.timedelta | None


class Blocker(NamedTuple):
    """What holds back vacuum: kind, as in the proto's BlockerKind."""

    kind: str
    pid: int
    name: str
    transaction_age: datetime.timedelta | None
    transactions: int


class StoredEvent(NamedTuple):
    """An event with all that is known of its way, but its payload."""

    event_id: str
    event_type: str
    aggregate_id: str
    occurred_at: datetime.datetime
    status: str
    attempts: int
    last_error: str | None
    sent_at: datetime.datetime | None
    created_xid: str

    @property
    def place(self) -> "Place":
        return Place(self.created_xid, self.event_id)


class Place(NamedTuple):
    """An event's place in the order of the transactions that wrote them."""

    created_xid: str
    event_id: str


BEGINNING = Place("0", NIL)


async def backlog(connection: Connection) -> Backlog:
    statement = sql.SQL(
        """
        SELECT outbox_waiting(%(most)s),
               (SELECT count(*) FROM (
                   SELECT FROM outbox_events e
                   WHERE status = 'FAILED' AND next_attempt_at IS NOT NULL AND {days} LIMIT %(most)s) AS given_up)
                   + (SELECT coalesce(sum(failed), 0) FROM outbox_calendar WHERE settled_in IS NOT NULL),
               (SELECT greatest(now() - min(oldest.occurred_at), '0 s') FROM (
                   (SELECT e.occurred_at FROM outbox_events e
                    WHERE e.status = 'NEW' AND e.created_xid >= outbox_low_water_xid() AND {days}
                    ORDER BY e.created_xid LIMIT 1)
                   UNION ALL
                   (SELECT e.occurred_at FROM outbox_events e
                    WHERE e.status = 'NEW' AND e.next_attempt_at IS NOT NULL AND {days} LIMIT %(most)s)
                ) AS oldest HAVING count(*) > 0)
        """
    )
    among = (await days.open_days(connection)).days
    cursor = await connection.execute(statement.format(days=days.within(among)), {"most": COUNT_MAX})
    row = await cursor.fetchone()
    assert row is not None
    return Backlog(*row)


async def cleanup_blocker(connection: Connection) -> Blocker | None:
    """Who holds back vacuum the most; None when nobody does for longer than a few seconds."""
    cursor = await connection.execute(
        "SELECT kind, pid, name, transaction_age, transactions FROM cleanup_blocker(%s)",
        [datetime.timedelta(seconds=BLOCKER_AGE_MIN_S)],
    )
    row = await cursor.fetchone()
    return Blocker(*row) if row else None


async def measure(pool: Pool, stop: asyncio.Event) -> None:
    """Keep the metrics up to date until `stop`."""
    while not stop.is_set():
        try:
            async with pool.connection() as connection:
                waiting, blocker = await backlog(connection), await cleanup_blocker(connection)
        except (psycopg.Error, PoolTimeout) as error:
            log.warning("the outbox is not measured", error=error)
        else:
            EVENTS.labels("NEW").set(waiting.new)
            EVENTS.labels("FAILED").set(waiting.failed)
            OLDEST_SECONDS.set(waiting.oldest_age.total_seconds() if waiting.oldest_age else 0)
            age = blocker.transaction_age if blocker else None
            BLOCKER_SECONDS.set(age.total_seconds() if age else 0)
        await wait_set(stop, MEASURE_EVERY_S)


# What waits is found from where the relay's last sweep came to; retries and what was given up have indexes.
_STATUS: dict[str | None, Sequence[LiteralString]] = {
    None: ["true"],
    "NEW": [
        "status = 'NEW' AND created_xid >= outbox_low_water_xid()",
        "status = 'NEW' AND created_xid < outbox_low_water_xid() AND next_attempt_at IS NOT NULL",
    ],
    "SENT": ["status = 'SENT'"],
    "FAILED": ["status = 'FAILED' AND next_attempt_at IS NOT NULL"],
}


async def days_with(connection: Connection, status: str | None) -> Sequence[Day]:
    """The days that may have events of a status; of any, if it is None."""
    find = {"NEW": days.open_days, "FAILED": days.with_failed}.get(status or "", days.every_day)
    return (await find(connection)).days


async def page(
    connection: Connection, among: Sequence[Day], *, status: str | None, after: Place, limit: int
) -> list[StoredEvent]:
    """Events of some days in the order in which they were written, from `after` on."""
    return await _page(connection, days.within(among), status, after, limit)


async def page_among(
    connection: Connection, among: Sequence[str], *, status: str | None, after: Place, limit: int
) -> list[StoredEvent]:
    """The same of some ids."""
    return await _page(connection, sql.SQL("e.event_id = ANY ({}::uuid[])").format(list(among)), status, after, limit)


def order(event: StoredEvent) -> tuple[int, str]:
    """In which events were written."""
    return int(event.created_xid), event.event_id


async def _page(
    connection: Connection, which: sql.Composable, status: str | None, after: Place, limit: int
) -> list[StoredEvent]:
    part = sql.SQL(
        """
        (SELECT e.event_id, event_type, aggregate_id::text, occurred_at, status, attempts, last_error, sent_at,
                e.created_xid
         FROM outbox_events e
         WHERE {status} AND {which} AND (e.created_xid, e.event_id) > (%(xid)s::xid8, %(id)s::uuid)
         ORDER BY e.created_xid, e.event_id LIMIT %(limit)s)
        """
    )
    parts = [part.format(status=sql.SQL(each), which=which) for each in _STATUS[status]]
    statement = sql.SQL(
        """
        SELECT event_id::text, event_type, aggregate_id, occurred_at, status, attempts, last_error, sent_at,
               created_xid::text
        FROM ({parts}) AS found ORDER BY found.created_xid, found.event_id LIMIT %(limit)s
        """
    )
    cursor = await connection.execute(
        statement.format(parts=sql.SQL(" UNION ALL ").join(parts)),
        {"xid": after.created_xid, "id": after.event_id, "limit": limit},
    )
    return [StoredEvent(*row) for row in await cursor.fetchall()]


async def missing(connection: Connection, event_ids: Sequence[str]) -> list[str]:
    """Those of the events that are not in the outbox."""
    cursor = await connection.execute(
        sql.SQL("SELECT event_id::text FROM outbox_events WHERE event_id = ANY({}::uuid[])").format(list(event_ids))
    )  # the planner sees the days in the ids
    there = {event_id for (event_id,) in await cursor.fetchall()}
    return [event_id for event_id in dict.fromkeys(event_ids) if event_id not in there]


async def requeue(connection: Connection, event_ids: Sequence[str]) -> int:
    """Make events NEW, as if they had never been tried; how many were not. Locks in order of ids.

    Their days are opened, and stay so until the transaction ends.
    """
    await connection.execute(
        """
        SELECT reopen_outbox_day(day) FROM outbox_calendar WHERE day IN (
            SELECT to_timestamp(('x' || left(translate(id::text, '-', ''), 12))::bit(48)::bigint / 1000.0)::date
            FROM unnest(%s::uuid[]) AS id
        ) ORDER BY day
        """,
        [list(event_ids)],
    )
    which = sql.SQL("e.event_id = ANY ({}::uuid[])").format(list(event_ids))  # the planner sees the days in the ids
    cursor = await connection.execute(
        sql.SQL(
            """
            WITH chosen AS (
                SELECT event_id, status FROM outbox_events e
                WHERE {which} AND (status <> 'NEW' OR attempts > 0)
                ORDER BY event_id FOR UPDATE
            ), requeued AS (
                UPDATE outbox_events e SET status = 'NEW', attempts = 0, next_attempt_at = now(), sent_at = NULL
                FROM chosen WHERE e.event_id = chosen.event_id AND {which}
            )
            SELECT count(*) FROM chosen WHERE status <> 'NEW'
            """
        ).format(which=which)
    )
    row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


async def failed_ids(connection: Connection, among: Sequence[Day], *, after: str, limit: int) -> list[str]:
    """Ids of events of some days that were given up, in order, from `after` on."""
    statement = sql.SQL(
        "SELECT e.event_id::text FROM outbox_events e WHERE e.status = 'FAILED' AND e.next_attempt_at IS NOT NULL"
        " AND {} AND e.event_id > %s ORDER BY e.event_id LIMIT %s"
    )
    cursor = await connection.execute(statement.format(days.within(among)), [after, limit])
    return [event_id for (event_id,) in await cursor.fetchall()]


async def page_token_key(connection: Connection) -> bytes:
    """The secret that signs page tokens; all servers of the database share it."""
    cursor = await connection.execute("SELECT page_token_key FROM chain_settings")
    row = await cursor.fetchone()
    assert row is not None  # the migration's last step writes it
    key: bytes = row[0]
    return key
