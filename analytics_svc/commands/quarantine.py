"""`retail-analytics quarantine list | redrive | discard`: look after the events that could not be counted."""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import click
import grpc
from rich.table import Column, Table

from analytics_svc.settings import ConsumerClientSettings
from chassis import cli, grpc_client, tls
from retail.analytics.v1 import quarantine_service_pb2 as pb
from retail.analytics.v1.quarantine_service_pb2_grpc import QuarantineServiceStub

PAGE_SIZE = 500
REDRIVE_CHUNK = 200  # entries in one request: some seconds at most
CALL_TIMEOUT_S = 30.0
BODY_SHOWN = 60  # bytes of a body in the table


@click.group()
def quarantine() -> None:
    """Look after events that cannot be counted.

    The exit code is 1 when something stays that was to go.
    """


@quarantine.command("list")
@click.option("--reason", default="", help="Only those, such as TOTAL_MISMATCH.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, metavar="N", help="Events at most.")
@click.option("--json", "as_json", is_flag=True, help="One object a line, with the body.")
def list_command(reason: str, limit: int, as_json: bool) -> int:
    """Show them, the oldest first."""
    return ask(lambda stub: _list(stub, reason, limit, as_json))


@quarantine.command("redrive")
@click.argument("ids", nargs=-1, metavar="[ENTRY]...")
@click.option("--reason", default="", help="All that have this reason.")
@click.option("--all", "everything", is_flag=True, help="All.")
def redrive_command(ids: tuple[str, ...], reason: str, everything: bool) -> int:
    """Try to count them again. Each ENTRY that list shows, or all that an option names."""
    if sum(map(bool, (ids, reason, everything))) != 1:
        raise click.UsageError("name entries, or --reason, or --all: one of the three")
    return ask(lambda stub: _redrive(stub, ids, reason))


@quarantine.command("discard")
@click.argument("ids", nargs=-1, required=True, metavar="ENTRY...")
def discard_command(ids: tuple[str, ...]) -> int:
    """Remove them for good. 1,000 at most; one whose purchase exists is refused."""
    return ask(lambda stub: _discard(stub, ids))


def ask(question: Callable[[Any], int]) -> int:
    """The exit code of what is asked of the consumer; 1 also when the call fails."""
    config = cli.of_environment_or_local_stack(ConsumerClientSettings, "consumer")
    target = config.consumer_target
    with grpc_client.connect_blocking(target, tls.credentials(config)) as channel:
        try:
            return question(QuarantineServiceStub(channel))
        except grpc.RpcError as error:
            click.echo(f"{target}: {error.code().name}: {error.details()}", err=True)
            return 1


def _list(stub: Any, reason: str, limit: int, as_json: bool) -> int:
    events = list(islice(_events(stub, reason), limit))
    if as_json:
        for event in events:
            print(json.dumps(_as_json(event)))
        return 0
    table = Table(Column("entry", no_wrap=True), "reason", "since", "event", "detail", "body")
    for event in events:
        table.add_row(event.quarantine_id, event.reason, _time(event), event.event_id, event.detail, _beginning(event))
    cli.console().print(table if events else "Nothing is in quarantine.")
    return 0


def _redrive(stub: Any, asked: Sequence[str], reason: str) -> int:
    ids = asked or [event.quarantine_id for event in _events(stub, reason)]
    redriven = remaining = 0
    unknown: list[str] = []
    for start in range(0, len(ids), REDRIVE_CHUNK):
        reply = stub.RedriveEvents(
            pb.RedriveEventsRequest(quarantine_ids=ids[start : start + REDRIVE_CHUNK]), timeout=CALL_TIMEOUT_S
        )
        redriven, remaining = redriven + reply.redriven_count, remaining + reply.remaining_count
        unknown += reply.unknown_quarantine_ids
    print(f"{redriven:,} counted, {remaining:,} remain in quarantine.")
    return _unknown(unknown) or int(remaining > 0)


def _discard(stub: Any, ids: Sequence[str]) -> int:
    reply = stub.DiscardEvents(pb.DiscardEventsRequest(quarantine_ids=ids), timeout=CALL_TIMEOUT_S)
    print(f"{reply.discarded_count:,} discarded.")
    return _unknown(reply.unknown_quarantine_ids)


def _unknown(ids: Sequence[str]) -> int:
    for quarantine_id in ids:
        print(f"{quarantine_id} is not in quarantine: never, or no longer.")
    return int(bool(ids))


def _as_json(event: pb.QuarantinedEvent) -> dict[str, Any]:
    return {
        "quarantine_id": event.quarantine_id,
        "event_id": event.event_id,
        "reason": event.reason,
        "detail": event.detail,
        "quarantine_time": _time(event),
        "body": event.body.decode("utf-8", "backslashreplace"),
        "body_size": event.body_size,
    }


def _time(event: pb.QuarantinedEvent) -> str:
    return event.quarantine_time.ToDatetime().isoformat(timespec="seconds") + "Z"


def _beginning(event: pb.QuarantinedEvent) -> str:
    """Without what a terminal might obey."""
    text = event.body[:BODY_SHOWN].decode("utf-8", "replace")
    shown = "".join(character if character.isprintable() else "\ufffd" for character in text)
    return f"{shown} … {event.body_size:,} bytes" if event.body_size > BODY_SHOWN else shown


def _events(stub: Any, reason: str) -> Iterator[pb.QuarantinedEvent]:
    token = ""
    while True:
        request = pb.ListQuarantinedEventsRequest(page_size=PAGE_SIZE, page_token=token, reason=reason)
        reply = stub.ListQuarantinedEvents(request, timeout=CALL_TIMEOUT_S)
        yield from reply.quarantined_events
        if not (token := reply.next_page_token):
            return
