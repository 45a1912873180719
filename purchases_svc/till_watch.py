"""Tills of which sales are missing, shown to operators."""

import asyncio

import psycopg
import structlog
from prometheus_client import Gauge
from psycopg_pool import PoolTimeout

from chassis.postgres import Pool
from purchases_svc import tills

LOOK_EVERY_S = 60.0

GAPS = Gauge("purchases_tills_with_gap", "Journals of tills of which sales have been missing for more than a day.")
CONFLICTS = Gauge(
    "purchases_tills_with_conflict",
    "Journals of tills in which, within a week, two sales came with one number: a disk was restored or cloned.",
)

log = structlog.get_logger()


class TillWatch:
    """Counts them, once a minute."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def watch(self) -> None:
        while True:
            try:
                async with self._pool.connection() as connection:
                    found = await tills.troubles(
                        connection, older_than=tills.GAP_AGE, conflicts_for=tills.CONFLICTS_TOLD
                    )
                GAPS.set(sum(trouble.missing_since is not None for trouble in found))
                CONFLICTS.set(sum(trouble.conflicts > 0 for trouble in found))
            except (psycopg.Error, PoolTimeout) as error:
                log.warning("what is missing of tills is not known", error=error)
            await asyncio.sleep(LOOK_EVERY_S)
