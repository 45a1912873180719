"""What the audit knows, as metrics of every consumer: read from the database, so that all of them say the same."""

import asyncio

import structlog
from prometheus_client import Gauge

from analytics_svc.proof import parts
from analytics_svc.proof.verdicts import WRONG
from chassis.postgres import Pool

EVERY_S = 5.0

WRONG_ROWS = Gauge("analytics_audit_wrong", "Days and branches whose sums are wrong, and wrong rows, by the audit.")
FOREIGN = Gauge("analytics_audit_foreign_events", "Events counted without having been recorded, by the audit.")
PENDING = Gauge("analytics_audit_pending_purchases", "Purchases on their way, by the audit.")
UNPROVEN_DAYS = Gauge("analytics_audit_unproven_days", "Business days that were never proven row by row.")
STALE = Gauge("analytics_audit_stale", "1 while nobody audits: what it says is older than it should be.")
CYCLE_AT = Gauge("analytics_audit_cycle_timestamp_seconds", "When the sums of all days that change were compared last.")
SWEEP_AT = Gauge("analytics_audit_sweep_timestamp_seconds", "Everything was proven since then; NaN while it never was.")

log = structlog.get_logger()


async def show(pool: Pool) -> None:
    """Keep them up to date, until cancelled; NaN while the database does not say."""
    while True:
        try:
            async with pool.connection() as connection:
                _set(await parts.read_status(connection))
        except Exception as error:
            log.warning("what the audit knows cannot be read", error=error)
            for gauge in (WRONG_ROWS, FOREIGN, PENDING, UNPROVEN_DAYS, STALE, CYCLE_AT, SWEEP_AT):
                gauge.set(float("nan"))
        await asyncio.sleep(EVERY_S)


def _set(status: parts.Status) -> None:
    WRONG_ROWS.set(sum(row.verdict in WRONG for row in status.rows) + len(status.findings))
    FOREIGN.set(len(status.foreign_ids))
    PENDING.set(status.pending)
    UNPROVEN_DAYS.set(status.unproven_days)
    STALE.set(status.stale)
    CYCLE_AT.set(status.compared_at.timestamp() if status.compared_at else float("nan"))
    SWEEP_AT.set(status.oldest_at.timestamp() if status.oldest_at else float("nan"))
