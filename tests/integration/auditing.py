"""What tests of the audit ask, and how they make it look."""

from collections.abc import Sequence
from datetime import date, timedelta
from typing import Any

import psycopg

from analytics_svc.ingest.apply import fold
from analytics_svc.proof import audit, audit_status, parts
from analytics_svc.proof.auditor import Auditor
from analytics_svc.proof.verdicts import Comparison
from analytics_svc.purchase import PurchaseCreated
from tests.conftest import pool
from tests.integration.chain import DAYS, FIRST, TABLES, Chain
from tests.integration.purchase_events import query, read_models

LAST = FIRST + timedelta(days=DAYS - 1)


# Four cells that make up for each other in every sum that there is.
FOUR_CELLS = """
    UPDATE product_sales_daily
    SET qty_sum = qty_sum {} CASE WHEN (branch_id = 1) = (product_id = 1001) THEN 1 ELSE -1 END
    WHERE day = '{}' AND branch_id IN (1, 2) AND product_id IN (1001, 1002)
"""


async def compare(chain: Chain) -> Comparison:
    return await audit.compare(chain.pool, chain.source, FIRST, LAST, wait_s=0)


def complete(chain: Chain, at: str = "clock_timestamp()") -> None:
    """As the keeper does it: whatever was recorded before is counted or quarantined."""
    query(chain.url, f"UPDATE freshness SET complete_through_at = {at}")


class Kept:
    """A source as it is asked while the keeper keeps up."""

    def __init__(self, chain: Chain) -> None:
        self._chain, self.export = chain, chain.source.export
        self.recorded_day, self.recorded_days = chain.source.recorded_day, chain.source.recorded_days

    async def control_totals(self, first: date, last: date) -> Any:
        recorded = await self._chain.source.control_totals(first, last)
        complete(self._chain)
        return recorded


def auditor(chain: Chain, source: Any = None) -> Auditor:
    """With the production limits; the tests do not rest between its works."""
    return Auditor(chain.pool, source or chain.source, complete_wait_s=0.1)


async def sweep(chain: Chain, worker: Auditor | None = None) -> audit_status.Status:
    """Compare, then prove every part once at least; returns what the audit says."""
    worker = worker or auditor(chain)
    async with pool(chain.url, "analytics_consumer", size=1) as opened, opened.connection() as connection:
        await worker.compare(connection)
        began = await parts.begin(connection)
        while query(chain.url, f"SELECT 1 FROM audit_parts WHERE tried_at IS NULL OR tried_at < '{began}'"):
            await worker.prove(connection)
        return await audit_status.read(connection)


async def status(chain: Chain) -> audit_status.Status:
    async with chain.pool.connection() as connection:
        return await audit_status.read(connection)


async def counted_anew(chain: Chain) -> dict[str, Any]:
    """The read models of the recorded purchases, counted into another schema."""
    return await anew(chain, await chain.recorded())


async def anew(chain: Chain, events: Sequence[PurchaseCreated]) -> dict[str, Any]:
    query(chain.url, "DROP SCHEMA IF EXISTS anew CASCADE")
    query(chain.url, "CREATE SCHEMA anew")
    for table in TABLES.split(", "):
        query(chain.url, f"CREATE TABLE anew.{table} (LIKE public.{table} INCLUDING ALL)")
    if events:
        async with await psycopg.AsyncConnection.connect(chain.url, options="-c search_path=anew") as connection:
            await fold(connection, events)
    return read_models(chain.url, "anew")
