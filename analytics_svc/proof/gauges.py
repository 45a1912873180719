"""What the audit knows, as metrics of every consumer: read from the database, so that all of them say the same."""

import asyncio

import structlog
from prometheus_client import Gauge

from analytics_svc.proof import audit_status
from analytics_svc.proof.verdicts import Verdict
from chassis.postgres import Pool

EVERY_S = 5.0

WRONG_ROWS = Gauge("analytics_audit_wrong", "Days and branches whose sums are wrong, and wrong rows, by the audit.")
VERDICT = Gauge("analytics_audit_verdict", "1 for what the audit says of the numbers.", ["verdict"])
FOREIGN = Gauge("analytics_audit_foreign_events", "Events counted without having been recorded, by the audit.")
PENDING = Gauge("analytics_audit_pending_purchases", "Purchases on their way, by the audit.")
UNPROVEN_DAYS = Gauge("analytics_audit_unproven_days", "Business days that were never proven row by row.")
STALE = Gauge(
    "analytics_audit_stale",
    "1 while what the audit says is older than it should be, or nobody has audited for a minute.",
)
THROUGH_AT = Gauge(
    "analytics_audit_compared_through_seconds", "What was committed before was compared; by the purchases' clock."
)
CYCLE_AT = Gauge("analytics_audit_cycle_timestamp_seconds", "When the sums of all days that change were compared last.")
SWEEP_AT = Gauge("analytics_audit_sweep_timestamp_seconds", "Everything was proven since then; NaN while it never was.")

CELL_LAG = Gauge(
    "analytics_cell_complete_through_lag_seconds",
    "Age of a cell's complete_through_time; NaN while nothing is known of the cell.",
    ["cell"],
)

ALL = (WRONG_ROWS, FOREIGN, PENDING, UNPROVEN_DAYS, STALE, THROUGH_AT, CYCLE_AT, SWEEP_AT)

log = structlog.get_logger()


async def show(pool: Pool) -> None:
    """Keep them up to date, until cancelled; NaN while the database does not say."""
    while True:
        try:
            async with pool.connection() as connection:
                _set(await audit_status.read(connection))
        except Exception as error:
            log.warning("what the audit knows cannot be read", error=error)
            VERDICT.clear()
            CELL_LAG.clear()
            for gauge in ALL:
                gauge.set(float("nan"))
        await asyncio.sleep(EVERY_S)


def _set(status: audit_status.Status) -> None:
    for verdict in Verdict:
        VERDICT.labels(verdict.name).set(verdict == status.verdict)
    CELL_LAG.clear()  # of a cell that is not there any more, nothing is said
    for mark in status.cell_marks:
        CELL_LAG.labels(mark.cell).set(float("nan") if mark.lag is None else mark.lag.total_seconds())
    WRONG_ROWS.set(status.wrong)
    FOREIGN.set(status.foreign)
    PENDING.set(status.pending)
    UNPROVEN_DAYS.set(status.unproven_days)
    STALE.set(status.stale)
    moments = ((THROUGH_AT, status.compared_through), (CYCLE_AT, status.compared_at), (SWEEP_AT, status.oldest_at))
    for gauge, moment in moments:
        gauge.set(moment.timestamp() if moment else float("nan"))
