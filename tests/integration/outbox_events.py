"""Events in an outbox, for tests."""

import time
from typing import Any

import psycopg
from uuid_utils import uuid7


def make_days(url: str, first: int = -2, last: int = 1) -> None:
    """The partitions of the days from `first` to `last`, counted from today."""
    with psycopg.connect(url) as connection:
        connection.execute(
            "SELECT ensure_outbox_day((now() + n * interval '1 day')::date) FROM generate_series(%s::int, %s) n",
            [first, last],
        )


def write(url: str, count: int, event_type: str = "PurchaseCreated", age_s: float = 0) -> list[str]:
    """Events as the purchases service writes them, in one transaction."""
    ids = new_ids(count, age_s)
    with psycopg.connect(url) as connection:
        insert(connection, ids, event_type)
    return ids


def new_ids(count: int, age_s: float = 0) -> list[str]:
    return [str(uuid7(nanoseconds=time.time_ns() - int(age_s * 1e9))) for _ in range(count)]


def insert(connection: "psycopg.Connection[Any]", ids: list[str], event_type: str = "PurchaseCreated") -> None:
    connection.execute(
        """
        INSERT INTO outbox_events (event_id, event_type, aggregate_id, occurred_at, payload_json, traceparent)
        SELECT id, %s, gen_random_uuid(), now(), jsonb_build_object('event_id', id, 'amount', 8.90), '00-trace-01'
        FROM unnest(%s::uuid[]) AS id
        """,
        [event_type, ids],
    )


def states(url: str) -> dict[str, tuple[str, int]]:
    """Status and attempts by event."""
    with psycopg.connect(url) as connection:
        rows = connection.execute("SELECT event_id::text, status, attempts FROM outbox_events").fetchall()
    return {event_id: (status, attempts) for event_id, status, attempts in rows}


async def all_sent(url: str) -> bool:
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT FROM outbox_events WHERE status <> 'SENT' LIMIT 1").fetchone() is None
