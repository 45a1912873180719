"""`retail-relay status | events | requeue`: what is in the outbox, why, and once more with it.

Clients of the relay's own OutboxService, at RELAY_TARGET.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
import grpc
from google.protobuf import json_format
from rich.table import Column, Table

from chassis import cli, grpc_client, tls
from relay_svc.settings import ClientSettings
from retail.relay.v1 import outbox_service_pb2 as pb
from retail.relay.v1.outbox_service_pb2_grpc import OutboxServiceStub

CALL_TIMEOUT_S = 30.0
REQUEUE_CHUNK = 1_000  # ids in one request
PAGE_SIZE = 500
STATUSES = ("NEW", "SENT", "FAILED")


def ask(question: Callable[[Any], int]) -> int:
    """The exit code of what is asked of the relay; 1 also when the call fails."""
    config = cli.of_environment_or_local_stack(ClientSettings, "relay")
    target = config.relay_target
    with grpc_client.connect_blocking(target, tls.credentials(config)) as channel:
        try:
            return question(OutboxServiceStub(channel))
        except grpc.RpcError as error:
            click.echo(
                f"{target}: {error.code().name}: {error.details()}", err=True
            )  # never among what a program reads
            return 1


@click.command()
@cli.json_option
def status(as_json: bool) -> int:
    """What waits, since when, and why.

    The exit code is 0 only while the relay publishes and has given up nothing, so it is fit for a check.
    """
    return ask(lambda stub: _status(stub, as_json))


@click.command()
@click.option("--status", type=click.Choice(STATUSES), help="Only those.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, metavar="N", help="Events at most.")
@cli.json_option
def events(status: str | None, limit: int, as_json: bool) -> int:
    """Events in the outbox, the oldest first."""
    return ask(lambda stub: _list(stub, status, limit, as_json))


@click.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all-failed", is_flag=True, help="All that were given up, instead of IDs.")
@cli.json_option
def requeue(ids: tuple[str, ...], all_failed: bool, as_json: bool) -> int:
    """Publish events once more. Whatever their status, they are counted once all the same."""
    if bool(ids) == all_failed:
        raise click.UsageError("name the IDs of events, or --all-failed")
    return ask(lambda stub: _requeue(stub, ids, all_failed, as_json))


def _status(stub: Any, as_json: bool) -> int:
    reply: pb.GetOutboxStatusResponse = stub.GetOutboxStatus(pb.GetOutboxStatusRequest(), timeout=CALL_TIMEOUT_S)
    well = reply.breaker_state == pb.BREAKER_STATE_CLOSED and not reply.failed_count
    if as_json:
        cli.console().print_json(json_format.MessageToJson(reply, always_print_fields_with_no_presence=True))
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
    cli.console().print(table)
    return int(not well)


def _list(stub: Any, status: str | None, limit: int, as_json: bool) -> int:
    table = Table(Column("event", min_width=36), "status", Column("tries", justify="right"), "occurred")
    shown = 0
    for event in _events(stub, status):
        if shown == limit:
            break
        shown += 1
        if as_json:
            print(json.dumps(json_format.MessageToDict(event, always_print_fields_with_no_presence=True)))
            continue
        table.add_row(
            f"{event.event_id}\n{event.last_error}".rstrip(),
            pb.OutboxStatus.Name(event.status).removeprefix("OUTBOX_STATUS_"),
            str(event.attempt_count),
            event.occur_time.ToDatetime().isoformat(timespec="seconds") + "Z",
        )
    if not as_json:
        cli.console().print(table if shown else "There are no such events.")
    return 0


def _requeue(stub: Any, ids: Sequence[str], all_failed: bool, as_json: bool) -> int:
    if all_failed:
        requests = [pb.RequeueEventsRequest(all_failed=True)]
    else:
        chunks = range(0, len(ids), REQUEUE_CHUNK)
        requests = [pb.RequeueEventsRequest(event_ids=ids[start : start + REQUEUE_CHUNK]) for start in chunks]
    count = sum(stub.RequeueEvents(request, timeout=CALL_TIMEOUT_S).requeued_count for request in requests)
    cli.console().print(f'{{"requeued_count": {count}}}' if as_json else f"{count:,} requeued.")
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
