"""Asks the consumer's AuditService for its verdict on everything that was ever sold."""

import datetime
from typing import Any, NamedTuple

import grpc

from chassis import wire
from pos.calls import Calls, Pause, sleep
from retail.analytics.v1 import audit_service_pb2 as pb
from retail.analytics.v1.audit_service_pb2_grpc import AuditServiceStub

MONTH_TIMEOUT_S = 60.0  # 31 days: what one call may ask for
DAYS_MAX = 31


class Audited(NamedTuple):
    """What the audit says of all days; `problems` are in words."""

    agrees: bool  # but for events that others published
    rows: int
    problems: list[str]
    foreign_events: int


class AuditClient:
    """Calls AuditService. Every method may raise `pos.errors.PosError`."""

    def __init__(self, channel: grpc.Channel, *, total_timeout_s: float, pause: Pause = sleep) -> None:
        """`pause(seconds, why)` waits between two attempts; what it raises ends the call."""
        self._stub: Any = AuditServiceStub(channel)
        self._call = Calls(attempt_timeout_s=MONTH_TIMEOUT_S, total_timeout_s=total_timeout_s, pause=pause)

    def audit(self) -> Audited:
        """Compare all days on which there may be sales, 31 at a time."""
        today = datetime.datetime.now(datetime.UTC).date()
        known = self._compare(today, today)
        replies = []
        if known.HasField("earliest_sales_date"):
            day, last = (_day(getattr(known, field)) for field in ("earliest_sales_date", "latest_sales_date"))
            while True:
                replies.append(self._compare(day, day + datetime.timedelta(days=min(DAYS_MAX - 1, (last - day).days))))
                if not replies[-1].HasField("next_sales_date"):
                    break
                day = _day(replies[-1].next_sales_date)
                last = max(last, day)
        rows = [row for reply in replies for row in reply.rows]
        fine = (pb.AUDIT_VERDICT_AGREED, pb.AUDIT_VERDICT_FOREIGN)
        problems = [
            f"{_day(row.sales_date)}, branch {row.branch_id}: {row.detail}" for row in rows if row.verdict not in fine
        ]
        problems += dict.fromkeys(f"{f.table}, {f.key}: {f.detail}" for reply in replies for f in reply.findings)
        foreign = sum(len(reply.foreign_event_ids) for reply in replies)
        return Audited(not problems, len(rows), problems, foreign)

    def _compare(self, first: datetime.date, last: datetime.date) -> pb.CompareControlTotalsResponse:
        request = pb.CompareControlTotalsRequest(first_date=wire.date(first), last_date=wire.date(last))
        reply: pb.CompareControlTotalsResponse = self._call(self._stub.CompareControlTotals, request)
        return reply


def _day(value: Any) -> datetime.date:
    return datetime.date(value.year, value.month, value.day)
