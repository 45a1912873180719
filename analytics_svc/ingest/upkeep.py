"""What `consume` does beside: notice that the database is gone, show what is in quarantine, forget the old."""

import asyncio
import time

import psycopg
import structlog
from prometheus_client import Gauge
from psycopg_pool import PoolTimeout

from analytics_svc.ingest import event_log, quarantine, trials
from analytics_svc.ingest.health import Health
from chassis.postgres import Pool
from chassis.standby import standing

EVERY_S = 5.0  # a lost database shows in the health within that time, also when nothing is to be applied
FORGET_EVERY_S = 600.0  # applies stand still for some milliseconds while the floor moves
FORGET_BATCH = 5_000  # ids; some tens of milliseconds
TRIALS_KEPT_DAYS = 30  # a message that nobody tried again for so long is gone
FIRST_ID = "00000000-0000-0000-0000-000000000000"

QUARANTINED = Gauge("analytics_quarantined_events", "Events in quarantine.", ["reason"])
FLOOR_HELD = Gauge(
    "analytics_event_log_held", "1 while an event in quarantine keeps the event log from forgetting what it may forget."
)
UNSAFE = Gauge(
    "analytics_failover_unsafe",
    "1 while the database has standbys and no commit waits for one: after a failover, a rebuild is needed.",
)

LAG = Gauge(
    "analytics_complete_through_lag_seconds",
    "Age of complete_through_time, as the database had it when it was asked last; NaN before there is any.",
)
LAG.set(float("nan"))
SNAPSHOT_HELD = Gauge(
    "analytics_snapshot_held_seconds",
    "For how long a transaction has held back vacuum: rows that every batch changes get slower all the while.",
)

log = structlog.get_logger()


class Upkeep:
    def __init__(self, pool: Pool, health: Health, log_retention_days: int) -> None:
        """`log_retention_days`: how long event ids are kept at least; 0 keeps them for ever."""
        self._pool, self._health, self._log_retention_days = pool, health, log_retention_days
        self._forget_at = 0.0
        self._failover_loses = False

    async def run(self) -> None:
        while True:
            try:
                await self.run_once()
            except Exception as error:
                known = isinstance(error, (psycopg.Error, PoolTimeout))
                log.warning("upkeep failed; it comes again", error=error, exc_info=not known)
            await asyncio.sleep(EVERY_S)

    async def run_once(self) -> None:
        try:
            async with self._pool.connection() as connection:
                quarantined = await quarantine.count_by_reason(connection)
                failover_loses = (await standing(connection)).failover_loses
                cursor = await connection.execute("SELECT extract(epoch FROM snapshot_held())::float8")
                ((held_s,),) = await cursor.fetchall()
                cursor = await connection.execute(_THROUGH)
                ((through,),) = await cursor.fetchall()
        except Exception:
            await self._health.report("database", False)
            raise
        await self._health.report("database", True)
        if failover_loses and not self._failover_loses:
            log.error("the database has standbys, but no commit waits for one: a failover loses what was counted")
        self._failover_loses = failover_loses
        UNSAFE.set(failover_loses)
        SNAPSHOT_HELD.set(held_s)
        if through is not None:
            LAG.set_function(lambda: time.time() - through)
        QUARANTINED.clear()
        for reason, count in quarantined.items():
            QUARANTINED.labels(reason).set(count)
        if time.monotonic() >= self._forget_at:
            await self.forget()
            self._forget_at = time.monotonic() + FORGET_EVERY_S

    async def forget(self) -> None:
        """Forget old trials and, if the log is not to be kept for ever, raise its floor and delete what is below."""
        async with self._pool.connection() as connection:
            await trials.forget_old(connection, TRIALS_KEPT_DAYS)
            if not self._log_retention_days:
                return
            async with connection.transaction():
                floor = await event_log.raise_floor(connection, self._log_retention_days)
            batches, after = 0, FIRST_ID
            while last := await event_log.forget(connection, after, FORGET_BATCH):
                batches, after = batches + 1, last
            FLOOR_HELD.set(floor.held_by is not None)
            log.info("event log cut", floor=floor.event_id, batches=batches)
            if floor.held_by:
                log.warning("an event in quarantine keeps the log from forgetting more", event_id=floor.held_by)


_THROUGH = "SELECT extract(epoch FROM complete_through_at)::float8 FROM freshness"
