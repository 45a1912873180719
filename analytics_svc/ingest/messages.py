"""A message as the broker delivers it, read into an event to count or a case for the quarantine; pure."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias
from zoneinfo import ZoneInfo

import structlog

from analytics_svc.errors import Rejected, quoted
from analytics_svc.ingest import events
from analytics_svc.ingest.quarantine import QuarantinedEvent
from analytics_svc.purchase import PurchaseCreated
from chassis.cells import Cells
from chassis.traces import TRACEPARENT

READ_FAILED = "READ_FAILED"  # a reason, see `events`: a bug of ours
UNKNOWN_CELL = "UNKNOWN_CELL"  # of a cell that is not listed: nobody would wait for its sales, or compare them
HEADER_LEVELS_MAX = 8  # of tables in tables; those of dead-lettering have three

log = structlog.get_logger()


class Message(NamedTuple):
    body: bytes
    properties: Mapping[str, Any]  # AMQP's, by name; None or missing when not set

    @property
    def traceparent(self) -> str | None:
        """What the publisher's span says of itself, if the sale is traced."""
        said = (self.properties.get("headers") or {}).get(TRACEPARENT)
        return said if isinstance(said, str) else None

    def digest(self) -> bytes:
        """Tells one message from another without a look into it."""
        return hashlib.sha256(self.body).digest()


Event: TypeAlias = PurchaseCreated | QuarantinedEvent


def read(message: Message, zone: ZoneInfo, cells: Cells) -> Event:
    properties = message.properties
    headers = properties.get("headers") or {}
    try:
        event = events.decode(
            message.body,
            zone,
            message_id=properties.get("message_id"),
            message_type=properties.get("type"),
            schema_version=headers.get("schema_version"),
        )
        if unknown := _of_no_cell(event, headers.get("cell"), cells):
            return unfit(message, event.event_id, UNKNOWN_CELL, unknown)
        return event
    except Rejected as rejected:
        return unfit(message, rejected.event_id, rejected.reason, rejected.detail)
    except Exception as error:
        log.exception("event that our decoder does not cope with")
        return unread(message, READ_FAILED, f"{type(error).__name__}: {quoted(str(error))}")


def _of_no_cell(event: PurchaseCreated, cell: Any, cells: Cells) -> str | None:
    """Why nobody looks after the event. Where a relay knows of no cells, its branch tells whose it is."""
    if cell is None:
        return None if cells.of_branch(event.branch_id) else f"branch {event.branch_id} is in no cell"
    listed = isinstance(cell, str) and cell in cells.by_name
    return None if listed else f"it comes from {quoted(cell)}, which is not listed"


def unread(message: Message, reason: str, detail: str) -> QuarantinedEvent:
    """For a body that nobody must look into: its id is the one that the message bears."""
    return unfit(message, events.message_event_id(message.properties.get("message_id")), reason, detail)


def unfit(message: Message, event_id: str | None, reason: str, detail: str) -> QuarantinedEvent:
    known = {name: value for name, value in message.properties.items() if value is not None}
    return QuarantinedEvent(event_id, reason, detail, message.body, _plain(known, HEADER_LEVELS_MAX))


def _plain(value: Any, levels: int) -> Any:
    """AMQP's types as those of JSON, not nested without end, and without the NUL that the database refuses."""
    match value:
        case bool() | int() | None:
            return value
        case dict() if levels:
            return {str(_plain(name, 0)): _plain(inner, levels - 1) for name, inner in value.items()}
        case list() if levels:
            return [_plain(inner, levels - 1) for inner in value]
        case dict() | list():
            return "..."
        case str():
            return value.replace("\0", "\ufffd")
        case _:  # times, decimals, bytes
            return str(value)
