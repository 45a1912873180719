"""`retail-analytics audit [--first DATE] [--last DATE] [--json]`: do the read models say what was recorded?

A client of the consumer's AuditService: it compares sums now, and tells what the continuous audit knows, and how
old that is. Exit code, by the worse of the two: 0 when all agree, 1 when something differs, 3 when that is not known
(yet), as purchases are on their way or nobody has audited for long, 4 when nobody answers.
"""

import datetime
import json
from decimal import Decimal
from typing import Any

import click
import grpc
from google.protobuf import json_format
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from analytics_svc.proof.verdicts import WRONG, Verdict, worst
from analytics_svc.settings import ConsumerClientSettings
from analytics_svc.upstream.source import CONTROL_TOTALS_DAYS_MAX
from chassis import cli, grpc_client, tls, wire
from retail.analytics.v1 import audit_service_pb2 as pb
from retail.analytics.v1.audit_service_pb2_grpc import AuditServiceStub

TIMEOUT_S = 120.0  # for one month
ROWS_SHOWN_MAX = 40  # of those that agree
FOREIGN_SHOWN = 10
STYLES = {Verdict.AGREED: "green", Verdict.DIFFERENT: "red"}  # and yellow
EXIT_CODES = {Verdict.AGREED: 0, Verdict.PENDING: 3, Verdict.UNPROVEN: 3, Verdict.FOREIGN: 1, Verdict.DIFFERENT: 1}
NO_ANSWER = 4
HELD_BACK_S = 60.0  # a cell that is so far behind


DAY = click.DateTime(["%Y-%m-%d"])


@click.command()
@click.option("--first", type=DAY, metavar="YYYY-MM-DD", help="The first business day. [default: the earliest sale's]")
@click.option("--last", type=DAY, metavar="YYYY-MM-DD", help="The last business day. [default: the latest sale's]")
@cli.json_option
def audit(first: datetime.datetime | None, last: datetime.datetime | None, as_json: bool) -> int:
    """Are the numbers right, and complete?

    Compares what is counted with what was recorded, and tells what the continuous audit knows, and how old that is.
    A sum that differs is shown as `recorded → counted`. The exit code is 0 when all agree, 1 when something differs,
    3 while that is not known, as purchases are on their way or nobody has audited for long, 4 when the consumer does
    not answer.
    """
    config = cli.of_environment_or_local_stack(ConsumerClientSettings, "consumer")
    target = config.consumer_target
    try:
        with grpc_client.connect_blocking(target, tls.credentials(config)) as channel:
            stub: Any = AuditServiceStub(channel)
            replies = _ask(stub, first and first.date(), last and last.date())
            status = stub.GetAuditStatus(pb.GetAuditStatusRequest(), timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        click.secho(f"no answer from {target}: {error.code().name}: {error.details()}", fg="red", err=True)
        return NO_ANSWER
    verdict = worst([*(Verdict(reply.verdict) for reply in replies), _known(status)])
    if as_json:
        found = [json_format.MessageToDict(reply, preserving_proto_field_name=True) for reply in (*replies, status)]
        click.echo(json.dumps({"verdict": verdict.name, "comparisons": found[:-1], "audit": found[-1]}))
    else:
        _show(replies, status, verdict, cli.console())
    return EXIT_CODES[verdict]


def _known(status: pb.GetAuditStatusResponse) -> Verdict:
    """What the audit knows is worth nothing when it is too old, unless it is bad."""
    known = Verdict(status.verdict) if status.verdict else Verdict.AGREED  # it has looked, and there was nothing
    return worst([known, Verdict.UNPROVEN]) if status.stale else known


def _ask(stub: Any, first: datetime.date | None, last: datetime.date | None) -> list[pb.CompareControlTotalsResponse]:
    """One answer for every 31 days, from the first day to the last that either side knows."""
    day = first or last or datetime.datetime.now(datetime.UTC).date()
    reply = stub.CompareControlTotals(_request(day, day), timeout=TIMEOUT_S)
    if not reply.HasField("earliest_sales_date"):
        return [reply]
    first = first or min(_day(reply.earliest_sales_date), last or datetime.date.max)
    last = last or max(_day(reply.latest_sales_date), first)
    replies = []
    while first <= last:
        room = (last - first).days
        end = first + datetime.timedelta(days=min(CONTROL_TOTALS_DAYS_MAX - 1, room))
        replies.append(stub.CompareControlTotals(_request(first, end), timeout=TIMEOUT_S))
        if not replies[-1].HasField("next_sales_date"):
            break
        first = _day(replies[-1].next_sales_date)
    return replies or [reply]


def _show(
    replies: list[pb.CompareControlTotalsResponse],
    status: pb.GetAuditStatusResponse,
    verdict: Verdict,
    console: Console,
) -> None:
    rows = [row for reply in replies for row in reply.rows]
    agreeing = [row for row in rows if Verdict(row.verdict) is Verdict.AGREED]
    hidden = {id(row) for row in agreeing[:-ROWS_SHOWN_MAX]}
    columns = [Column(name, justify="right", no_wrap=True) for name in ("purchases", "items", "revenue")]
    table = Table(Column("day", no_wrap=True), "branch", *columns, "verdict")
    for row in rows:
        if id(row) in hidden:
            continue
        both = zip(_sums(row.recorded), _sums(row.counted), strict=True)
        said = Verdict(row.verdict)
        table.add_row(
            str(_day(row.sales_date)),
            str(row.branch_id),
            *(recorded if recorded == counted else f"{recorded} → {counted}" for recorded, counted in both),
            Text(said.name, _style(said)),
        )
    console.print(table)
    for row in rows:
        if row.detail:
            console.print(f"{_day(row.sales_date)}, branch {row.branch_id}: {row.detail}")
    if hidden:
        console.print(f"{len(hidden):,} earlier rows that agree are not shown.")
    shown = {(row.sales_date.SerializeToString(), row.branch_id) for row in rows if row.detail}
    for row in status.different_rows:
        if (row.sales_date.SerializeToString(), row.branch_id) not in shown:
            console.print(f"{_day(row.sales_date)}, branch {row.branch_id}: {row.detail} (known to the audit)")
    known = [finding for reply in replies for finding in reply.findings] + list(status.findings)
    for words in dict.fromkeys(map(_words, known)):
        console.print(words, style="red")
    named = len(status.findings) + sum(Verdict(row.verdict) in WRONG for row in status.different_rows)
    if status.wrong_count > named:
        console.print(f"{status.wrong_count - named:,} more are wrong.", style="red")
    foreign = dict.fromkeys(event_id for reply in replies for event_id in reply.foreign_event_ids)
    foreign |= dict.fromkeys(status.foreign_event_ids)
    if foreign:
        some = ", ".join(list(foreign)[:FOREIGN_SHOWN])
        count = max(len(foreign), status.foreign_event_count)
        console.print(f"{count:,} counted events that nobody recorded: {some} …", style="yellow")
    pending = sum(reply.pending_count for reply in replies)
    since = f" since {_time(status.pending_since_time)}" if status.HasField("pending_since_time") and pending else ""
    console.print(
        f"{verdict.name}: {len(agreeing):,} of {len(rows):,} days and branches agree;"
        f" {sum(row.recorded.purchase_count for row in rows):,} purchases recorded, {pending:,} on their way{since}.",
        style=_style(verdict),
    )
    console.print(_age(status), style=_style(_known(status)))
    if len(status.cell_marks) > 1:
        for mark in status.cell_marks:
            console.print(_cell(mark))


def _cell(mark: pb.CellMark) -> Text:
    """How far a cell's sales go, and since when they go no further."""
    if not mark.HasField("complete_through_time"):
        return Text(f"Cell {mark.cell}: nothing is known of it yet, which holds back the time of all.", style="yellow")
    lag = mark.lag.ToTimedelta().total_seconds()
    waits = f", waiting for event {mark.oldest_awaited_event_id}" if mark.oldest_awaited_event_id else ""
    told = f"Cell {mark.cell}: counted up to {_time(mark.complete_through_time)}, {lag:,.0f} s ago{waits}."
    return Text(told, style="yellow" if lag > HELD_BACK_S else "green")


def _age(status: pb.GetAuditStatusResponse) -> str:
    """What the continuous audit says, and how old that is."""
    if not status.HasField("compared_through_time"):
        return "The continuous audit has not looked yet."
    days = status.proven_day_count
    proven = f"{days:,} {'day' if days == 1 else 'days'} proven row by row"
    if status.unproven_day_count:
        proven += f", {status.unproven_day_count:,} not yet"
    if status.HasField("last_sweep_time"):
        proven += f"; everything since {_time(status.last_sweep_time)}"
    old = f" THAT IS TOO OLD: the last look was at {_time(status.last_cycle_time)}." if status.stale else ""
    said = Verdict(status.verdict).name if status.verdict else "nothing"
    return (
        f"The continuous audit says {said} of all that was recorded before {_time(status.compared_through_time)}, by"
        f" sums; {proven}.{old}"
    )


def _style(verdict: Verdict) -> str:
    return STYLES.get(verdict, "yellow")


def _time(moment: Any) -> str:
    return str(moment.ToDatetime(datetime.UTC).strftime("%Y-%m-%d %H:%M:%SZ"))


def _sums(side: pb.AuditTotals) -> tuple[str, str, str]:
    return f"{side.purchase_count:,}", f"{side.item_count:,}", f"{Decimal(side.revenue.value or 0):,.2f}"


def _words(finding: pb.AuditFinding) -> str:
    repair = f"RebuildDay {_day(finding.sales_date)}" if finding.HasField("sales_date") else "RebuildDay of any day"
    return f"{finding.table}, {finding.key}: {finding.detail} ({repair} repairs it)"


def _request(first: datetime.date, last: datetime.date) -> pb.CompareControlTotalsRequest:
    return pb.CompareControlTotalsRequest(first_date=wire.date(first), last_date=wire.date(last))


def _day(value: Any) -> datetime.date:
    return datetime.date(value.year, value.month, value.day)
