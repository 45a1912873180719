"""`python -m analytics_svc quarantine list | redrive | discard`: look after the events that could not be counted."""

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import grpc
from rich.console import Console
from rich.table import Column, Table

from analytics_svc.settings import ConsumerClientSettings
from chassis import grpc_client
from retail.analytics.v1 import quarantine_service_pb2 as pb
from retail.analytics.v1.quarantine_service_pb2_grpc import QuarantineServiceStub

PAGE_SIZE = 500
REDRIVE_CHUNK = 200  # entries in one request: some seconds at most
CALL_TIMEOUT_S = 30.0
BODY_SHOWN = 60  # bytes of a body in the table


def run(config: ConsumerClientSettings, arguments: Sequence[str]) -> int:
    """Do what is asked; returns the exit code: 1 when something stays that was to go."""
    asked = _parser().parse_args(arguments)
    with grpc_client.connect_blocking(config.consumer_target) as channel:
        stub: Any = QuarantineServiceStub(channel)
        try:
            return int(asked.run(stub, asked))
        except grpc.RpcError as error:
            print(f"{config.consumer_target}: {error.code().name}: {error.details()}")
            return 1


def list_events(stub: Any, asked: argparse.Namespace) -> int:
    events = list(islice(_events(stub, asked.reason), asked.limit))
    if asked.json:
        for event in events:
            print(json.dumps(_as_json(event)))
        return 0
    table = Table(Column("entry", no_wrap=True), "reason", "since", "event", "detail", "body")
    for event in events:
        table.add_row(event.quarantine_id, event.reason, _time(event), event.event_id, event.detail, _beginning(event))
    Console(highlight=False, markup=False, emoji=False).print(table if events else "Nothing is in quarantine.")
    return 0


def redrive(stub: Any, asked: argparse.Namespace) -> int:
    ids = asked.ids or [event.quarantine_id for event in _events(stub, asked.reason)]
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


def discard(stub: Any, asked: argparse.Namespace) -> int:
    reply = stub.DiscardEvents(pb.DiscardEventsRequest(quarantine_ids=asked.ids), timeout=CALL_TIMEOUT_S)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analytics_svc quarantine",
        description="Events that could not be counted, in the consumer at CONSUMER_TARGET.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    listing = commands.add_parser("list", help="show them, the oldest first")
    listing.add_argument("--reason", default="", help="only those, such as TOTAL_MISMATCH")
    listing.add_argument("--limit", type=int, default=50, help="50 unless told otherwise")
    listing.add_argument("--json", action="store_true", help="one object a line, with the body")
    listing.set_defaults(run=list_events)
    trying = commands.add_parser("redrive", help="try to count them again, say after an update")
    which = trying.add_mutually_exclusive_group(required=True)
    which.add_argument("ids", nargs="*", default=[], metavar="ENTRY", help="entries, as list shows them")
    which.add_argument("--reason", default="", help="all that have this reason")
    which.add_argument("--all", action="store_true", help="all")
    trying.set_defaults(run=redrive)
    removing = commands.add_parser("discard", help="remove them for good; one whose purchase exists is refused")
    removing.add_argument("ids", nargs="+", metavar="ENTRY", help="entries, as list shows them; 1,000 at most")
    removing.set_defaults(run=discard)
    return parser
