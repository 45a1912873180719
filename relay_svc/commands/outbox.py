"""`python -m relay_svc status | events | requeue`: what is in the outbox, why, and once more with it.

Clients of the relay's own OutboxService, at RELAY_TARGET.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
from google.protobuf import json_format
from rich.console import Console
from rich.table import Column, Table

from chassis import grpc_client
from relay_svc.settings import ClientSettings
from retail.relay.v1 import outbox_service_pb2 as pb
from retail.relay.v1.outbox_service_pb2_grpc import OutboxServiceStub

CALL_TIMEOUT_S = 30.0
REQUEUE_CHUNK = 1_000  # ids in one request
PAGE_SIZE = 500
STATUSES = ("NEW", "SENT", "FAILED")

console = Console(highlight=False, markup=False, emoji=False)
errors = Console(stderr=True, highlight=False, markup=False, emoji=False)  # never among what a program reads


def run(config: ClientSettings, arguments: Sequence[str]) -> int:
    """Do what is asked; returns the exit code: 1 when something is wrong with the outbox, or with the call."""
    asked = parser().parse_args(arguments)
    with grpc_client.connect_blocking(config.relay_target) as channel:
        stub: Any = OutboxServiceStub(channel)
        try:
            return int(asked.run(stub, asked))
        except grpc.RpcError as error:
            errors.print(f"{config.relay_target}: {error.code().name}: {error.details()}")
            return 1


def status(stub: Any, asked: argparse.Namespace) -> int:
    """Exit code 0 only while the relay publishes and has given up nothing: fit for a check."""
    reply: pb.GetOutboxStatusResponse = stub.GetOutboxStatus(pb.GetOutboxStatusRequest(), timeout=CALL_TIMEOUT_S)
    well = reply.breaker_state == pb.BREAKER_STATE_CLOSED and not reply.failed_count
    if asked.json:
        console.print_json(json_format.MessageToJson(reply, always_print_fields_with_no_presence=True))
        return int(not well)
    table = Table(show_header=False)
    table.add_row("waiting", f"{reply.new_count:,}")
    if reply.HasField("oldest_pending_age"):
        table.add_row("the oldest waits for", _age(reply.oldest_pending_age))
    table.add_row("given up (FAILED)", f"{reply.failed_count:,}")
    closed = reply.breaker_state == pb.BREAKER_STATE_CLOSED
    table.add_row("publishing", "yes" if closed else f"no: {reply.breaker_reason}")
    table.add_row("events/s, last minute", f"{reply.events_per_second:,.1f}")
    if reply.HasField("blocking_session"):
        blocker = reply.blocking_session
        kind = pb.BlockerKind.Name(blocker.kind).removeprefix("BLOCKER_KIND_").lower().replace("_", " ")
        since = f" for {_age(blocker.transaction_age)}" if blocker.HasField("transaction_age") else ""
        table.add_row(
            "vacuum is held back by",
            f"{kind} {blocker.pid or ''} “{blocker.application_name}”{since}, "
            f"{blocker.transactions_behind:,} transactions",
        )
    console.print(table)
    return int(not well)


def events(stub: Any, asked: argparse.Namespace) -> int:
    table = Table(Column("event", min_width=36), "status", Column("tries", justify="right"), "occurred")
    shown = 0
    for event in _events(stub, asked.status):
        if shown == asked.limit:
            break
        shown += 1
        if asked.json:
            print(json.dumps(json_format.MessageToDict(event, always_print_fields_with_no_presence=True)))
            continue
        table.add_row(
            f"{event.event_id}\n{event.last_error}".rstrip(),
            pb.OutboxStatus.Name(event.status).removeprefix("OUTBOX_STATUS_"),
            str(event.attempt_count),
            event.occur_time.ToDatetime().isoformat(timespec="seconds") + "Z",
        )
    if not asked.json:
        console.print(table if shown else "There are no such events.")
    return 0


def requeue(stub: Any, asked: argparse.Namespace) -> int:
    if asked.all_failed:
        requests = [pb.RequeueEventsRequest(all_failed=True)]
    else:
        chunks = range(0, len(asked.ids), REQUEUE_CHUNK)
        requests = [pb.RequeueEventsRequest(event_ids=asked.ids[start : start + REQUEUE_CHUNK]) for start in chunks]
    count = sum(stub.RequeueEvents(request, timeout=CALL_TIMEOUT_S).requeued_count for request in requests)
    console.print(f'{{"requeued_count": {count}}}' if asked.json else f"{count:,} requeued.")
    return 0


def _events(stub: Any, wanted: str | None) -> Iterator[pb.OutboxEvent]:
    token = ""
    number = pb.OutboxStatus.Value(f"OUTBOX_STATUS_{wanted or 'UNSPECIFIED'}")
    while True:
        request = pb.ListOutboxEventsRequest(page_size=PAGE_SIZE, page_token=token, status=number)
        reply = stub.ListOutboxEvents(request, timeout=CALL_TIMEOUT_S)
        yield from reply.outbox_events
        if not (token := reply.next_page_token):
            return


def _age(duration: Any) -> str:
    """Days, hours, minutes and seconds, such as 1 day, 2:03:04."""
    return str(duration.ToTimedelta()).partition(".")[0]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m relay_svc", description="The outbox, as the relay at RELAY_TARGET sees it."
    )
    commands = top.add_subparsers(required=True, metavar="command")
    state = commands.add_parser("status", help="what waits, since when, and why; exit code 1 if something is wrong")
    state.set_defaults(run=status)
    listing = commands.add_parser("events", help="events, the oldest first")
    listing.add_argument("--status", choices=STATUSES, help="only those")
    listing.add_argument("--limit", type=int, default=50, help="50 unless told otherwise")
    listing.set_defaults(run=events)
    again = commands.add_parser("requeue", help="publish events once more; they are counted once all the same")
    which = again.add_mutually_exclusive_group(required=True)
    which.add_argument("ids", nargs="*", default=[], metavar="ID", help="events, whatever their status")
    which.add_argument("--all-failed", action="store_true", help="all that were given up")
    again.set_defaults(run=requeue)
    for command in (state, listing, again):
        command.add_argument("--json", action="store_true", help="for programs")
    return top
