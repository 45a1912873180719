"""What the chain sells of each product: batches note it, and one process adds up what many of them have noted.

The rows of the chain are those that every batch would change, and for which consumers would wait for each other. A
reader adds what is noted to what is summed, in one snapshot, so an answer lacks nothing; only its cost grows with what
is noted. Nobody needs to be alive for the numbers to be right: notes wait for whoever comes.
"""

import asyncio

import psycopg
import structlog
from prometheus_client import Gauge
from psycopg_pool import PoolTimeout

from analytics_svc.ingest import event_log
from chassis.postgres import CONFLICT, Connection, Pool

SUMMING_LOCK = 7_265_746_179  # any number; advisory locks are per database
PAUSE_S = 2.0  # notes of two seconds are read in some milliseconds, and hold the same products many times
REST = 4  # times the work, at least: a chain of very many products must not take all of a core
# In one transaction, which HOLD_MAX_S ends: a second's work if no product is among them twice.
LINES_AT_ONCE, NOTES_AT_ONCE = 50_000, 500

NOTES = Gauge(
    "analytics_noted_batches",
    "Batches whose products are not yet in the chain's sums: each answer about the chain's products adds them up.",
)

log = structlog.get_logger()


async def note(connection: Connection, days: str, product_ids: str, quantities: str, cents: str) -> None:
    """Note the lines of a batch, as arrays in PostgreSQL's text form, in the transaction that counts them."""
    await connection.execute(
        "INSERT INTO product_sales_of_chain_notes (days, product_ids, quantities, cents) VALUES (%s, %s, %s, %s)",
        [days, product_ids, quantities, cents],
    )


async def sum_up(connection: Connection, lines: int | None = None, notes: int | None = None) -> bool:
    """Move what is noted into the sums, about so much of it; returns whether that was less than was there.

    Whoever repairs has to be kept out.
    """
    cursor = await connection.execute(
        """
        WITH noted AS (
            DELETE FROM product_sales_of_chain_notes WHERE ctid = ANY (ARRAY(
                SELECT place FROM (
                    SELECT ctid, cardinality(days), sum(cardinality(days)) OVER (ROWS UNBOUNDED PRECEDING)
                    FROM (SELECT ctid, days FROM product_sales_of_chain_notes LIMIT %(notes)s) AS those
                ) AS note (place, lines, with_those_before)
                WHERE %(lines)s::bigint IS NULL OR with_those_before - lines < %(lines)s
            ))
            RETURNING days, product_ids, quantities, cents
        ), summed AS (
            INSERT INTO product_sales_of_chain_sums AS stored (period, first_day, product_id, qty_sum, revenue_sum)
            SELECT CASE WHEN day IS NOT NULL THEN 'day' WHEN month IS NOT NULL THEN 'month' ELSE 'all' END AS period,
                coalesce(day, month, '0001-01-01') AS first_day, product_id, sum(quantity), sum(line.cents) * 0.01
            FROM noted, unnest(days, product_ids, quantities, noted.cents) AS line (day, product_id, quantity, cents),
                date(date_trunc('month', day::timestamp)) AS month
            GROUP BY GROUPING SETS ((day, product_id), (month, product_id), (product_id))
            ORDER BY period, first_day, product_id
            ON CONFLICT (period, first_day, product_id) DO UPDATE SET
                qty_sum = stored.qty_sum + excluded.qty_sum,
                revenue_sum = stored.revenue_sum + excluded.revenue_sum
        )
        SELECT (SELECT count(*) FROM product_sales_of_chain_notes) > (SELECT count(*) FROM noted)
        """,
        {"lines": lines, "notes": notes},
    )
    return await cursor.fetchone() == (True,)


class Summing:
    """Any number of processes may run one; one of them works at a time."""

    def __init__(self, pool: Pool) -> None:
        """The pool needs one connection."""
        self._pool = pool

    async def run(self) -> None:
        """Sum up until cancelled."""
        now = asyncio.get_running_loop().time
        while True:
            began, left = now(), False
            try:
                left = await self.run_once()
            except CONFLICT as error:
                log.info("sums conflict with another; trying again", error=error)
            except Exception as error:
                known = isinstance(error, (psycopg.Error, PoolTimeout))
                log.warning("summing failed; it comes again", error=error, exc_info=not known)
            await asyncio.sleep(0.0 if left else max(PAUSE_S, REST * (now() - began)))

    async def run_once(self) -> bool:
        """Sum up some of the notes, unless another process is at it; whether there are many more."""
        async with self._pool.connection() as connection, connection.transaction():
            await event_log.enter(connection)
            cursor = await connection.execute("SELECT pg_try_advisory_xact_lock(%s)", [SUMMING_LOCK])
            mine = await cursor.fetchone() == (True,)
            more = mine and await sum_up(connection, LINES_AT_ONCE, NOTES_AT_ONCE)
            cursor = await connection.execute("SELECT count(*) FROM product_sales_of_chain_notes")
            ((left,),) = await cursor.fetchall()
        NOTES.set(left)
        return more
