"""The gRPC face of audit and repair, on the consumer's port: requests to days, verdicts to responses."""

import datetime
from typing import Any

from google.protobuf import duration_pb2, message

from analytics_svc.proof import audit, audit_status, rebuild
from analytics_svc.proof.audit_status import CellMark
from analytics_svc.proof.day import FOREIGN_IDS_MAX
from analytics_svc.proof.verdicts import Finding, Row, Verdict
from analytics_svc.upstream.source import CONTROL_TOTALS_DAYS_MAX, Source, Totals
from chassis import wire
from chassis.errors import FieldReason, InvalidRequest, Violation
from chassis.postgres import Pool
from retail.analytics.v1 import audit_service_pb2 as pb
from retail.analytics.v1 import audit_service_pb2_grpc

COMPLETE_WAIT_S = 5.0  # for purchases on their way, unless the caller's deadline is sooner
CALL_TIMEOUT_S = 1_800.0  # a day of a million purchases is rebuilt in a few minutes


class AuditServicer(audit_service_pb2_grpc.AuditServiceServicer):
    """`retail.analytics.v1.AuditService`."""

    def __init__(self, pool: Pool, database_url: str, source: Source) -> None:
        """Repairs open a session of their own on `database_url`."""
        self._pool, self._database_url, self._source = pool, database_url, source

    async def CompareControlTotals(
        self, request: pb.CompareControlTotalsRequest, context: Any
    ) -> pb.CompareControlTotalsResponse:
        violations: list[Violation] = []
        first, last = (_required_date(request, field, violations) for field in ("first_date", "last_date"))
        if first and last and not 0 <= (last - first).days < CONTROL_TOTALS_DAYS_MAX:
            rule = f"must not be before first_date, nor make the range longer than {CONTROL_TOTALS_DAYS_MAX} days"
            violations.append(Violation("last_date", rule, FieldReason.BAD_RANGE))
        if violations or not (first and last):
            raise InvalidRequest(violations)
        remaining_s = context.time_remaining()
        wait_s = COMPLETE_WAIT_S if remaining_s is None else min(COMPLETE_WAIT_S, remaining_s / 2)
        compared = await audit.compare(self._pool, self._source, first, last, wait_s=wait_s)
        response = pb.CompareControlTotalsResponse(
            rows=map(_row, compared.rows),
            verdict=_verdict(compared.verdict),
            pending_count=compared.pending,
            foreign_event_ids=compared.foreign_ids,
            findings=map(_finding, dict.fromkeys(compared.findings)),
        )
        known = await audit.known_days(self._pool, self._source, first, last)
        for field, day in zip(("earliest_sales_date", "latest_sales_date", "next_sales_date"), known, strict=True):
            if day:
                getattr(response, field).CopyFrom(wire.date(day))
        return response

    async def RebuildDay(self, request: pb.RebuildDayRequest, context: Any) -> pb.RebuildDayResponse:
        violations: list[Violation] = []
        day = _required_date(request, "sales_date", violations)
        if day is None:
            raise InvalidRequest(violations)
        rebuilt = await rebuild.rebuild_day(self._database_url, self._source, day)
        return pb.RebuildDayResponse(
            purchase_count=rebuilt.purchases,
            repaired_row_count=rebuilt.repaired.total(),
            added_purchase_count=rebuilt.added,
            foreign_event_ids=rebuilt.foreign[:FOREIGN_IDS_MAX],
            foreign_event_count=len(rebuilt.foreign),
            agreed=rebuilt.right,
        )

    async def GetAuditStatus(self, request: pb.GetAuditStatusRequest, context: Any) -> pb.GetAuditStatusResponse:
        async with self._pool.connection() as connection:
            status = await audit_status.read(connection)
        response = pb.GetAuditStatusResponse(
            verdict=_verdict(status.verdict) if status.verdict else pb.AUDIT_VERDICT_UNSPECIFIED,
            different_rows=map(_row, status.rows),
            findings=map(_finding, status.findings),
            foreign_event_ids=status.foreign_ids,
            wrong_count=status.wrong,
            foreign_event_count=status.foreign,
            pending_count=status.pending,
            proven_day_count=status.proven_days,
            unproven_day_count=status.unproven_days,
            stale=status.stale,
            cycle_duration=duration_pb2.Duration(seconds=int(status.compare_duration.total_seconds())),
            cell_marks=map(_cell_mark, status.cell_marks),
        )
        if status.oldest_day:
            response.sweep_date.CopyFrom(wire.date(status.oldest_day))
        for field, moment in (
            ("compared_through_time", status.compared_through),
            ("last_cycle_time", status.compared_at),
            ("last_sweep_time", status.oldest_at),
            ("pending_since_time", status.pending_since),
        ):
            if moment:
                getattr(response, field).CopyFrom(wire.timestamp(moment))
        return response


def _required_date(request: message.Message, field: str, violations: list[Violation]) -> datetime.date | None:
    if not request.HasField(field):
        violations.append(Violation(field, "is required", FieldReason.REQUIRED))
        return None
    return wire.parse_date(request, field, violations)


def _row(row: Row) -> pb.AuditRow:
    return pb.AuditRow(
        sales_date=wire.date(row.day),
        branch_id=row.branch_id,
        recorded=_totals(row.recorded),
        counted=_totals(row.counted),
        verdict=_verdict(row.verdict),
        detail=row.detail,
    )


def _cell_mark(mark: CellMark) -> pb.CellMark:
    named = pb.CellMark(cell=mark.cell, oldest_awaited_event_id=mark.oldest_awaited_id or "")
    if mark.complete_through and mark.lag is not None:
        named.complete_through_time.CopyFrom(wire.timestamp(mark.complete_through))
        named.lag.FromTimedelta(mark.lag)
    return named


def _totals(totals: Totals) -> pb.AuditTotals:
    return pb.AuditTotals(
        purchase_count=totals.purchases,
        purchase_with_customer_count=totals.with_customer,
        item_count=totals.items,
        revenue=wire.decimal(wire.cents_text(totals.cents)),
    )


def _finding(finding: Finding) -> pb.AuditFinding:
    named = pb.AuditFinding(table=finding.table, key=finding.key, detail=finding.detail)
    if finding.day:
        named.sales_date.CopyFrom(wire.date(finding.day))
    return named


def _verdict(verdict: Verdict) -> pb.AuditVerdict.ValueType:
    return pb.AuditVerdict.ValueType(verdict)  # the numbers are the contract's
