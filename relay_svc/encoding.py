"""Messages as the bytes that go over the wire, for a window at once.

pika encodes a message anew each time, in 20 µs, and hands its frames to the socket one by one; that was more than half
of the relay's time. All our messages are alike: pika encodes one, and the others are that one with other words in the
places that differ. A test compares the bytes with pika's own.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import pika
from pika import frame, spec

from chassis.cells import DEFAULT
from relay_svc.outbox import OutboxEvent
from relay_svc.topology import EXCHANGE, ROUTING_KEY

ROUTING_KEYS: Mapping[str, str] = {"PurchaseCreated": ROUTING_KEY}
SCHEMA_VERSION = 1
PERSISTENT = 2
CHUNK_BYTES = 256 << 10  # handed to the socket at once; what it does not take is copied

_FRAME_OVERHEAD = 8  # bytes around a frame's content
_BODY, _END = b"\x03", b"\xce"
_ID_MARK, _TRACE_MARK = "i", "t"  # stand for the event's id and trace, in the message that pika encodes
_ID_LENGTH = 36


def properties(event: OutboxEvent, cell: str) -> pika.BasicProperties:
    headers: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
    if event.traceparent:
        headers["traceparent"] = event.traceparent
    if cell != DEFAULT:
        headers["cell"] = cell
    return pika.BasicProperties(
        message_id=event.event_id,
        type=event.event_type,
        content_type="application/json",
        delivery_mode=PERSISTENT,
        headers=headers,
    )


def encode(channel_number: int, frame_max: int, events: Sequence[OutboxEvent], cell: str) -> Iterator[bytes]:
    """Basic.Publish of each event of the cell, `mandatory`, in chunks. `frame_max` is what the connection agreed on."""
    channel = channel_number.to_bytes(2, "big")
    chunk: list[bytes] = []
    size = 0
    for event in events:
        body = event.payload.encode()
        before_size, before_id, before_trace, rest = _template(
            channel_number, event.event_type, len(event.traceparent or ""), cell
        )
        chunk += (before_size, len(body).to_bytes(8, "big"), before_id, event.event_id.encode())
        if event.traceparent:  # `headers` come before `message_id` on the wire
            chunk[-2:] = (before_id, event.traceparent.encode(), before_trace, event.event_id.encode())
        chunk.append(rest)
        for start in range(0, len(body), frame_max - _FRAME_OVERHEAD):
            part = body[start : start + frame_max - _FRAME_OVERHEAD]
            chunk += (_BODY, channel, len(part).to_bytes(4, "big"), part, _END)
        size += len(body)
        if size >= CHUNK_BYTES:
            yield b"".join(chunk)
            chunk, size = [], 0
    if chunk:
        yield b"".join(chunk)


@lru_cache(256)
def _template(channel_number: int, event_type: str, trace_length: int, cell: str) -> tuple[bytes, bytes, bytes, bytes]:
    """What comes before the body's size, after it, (after the trace,) and after the id."""
    id_mark, trace_mark = _ID_MARK * _ID_LENGTH, _TRACE_MARK * trace_length
    publish = spec.Basic.Publish(exchange=EXCHANGE, routing_key=ROUTING_KEYS[event_type], mandatory=True)
    like = OutboxEvent(id_mark, event_type, "", trace_mark or None)
    method = frame.Method(channel_number, publish).marshal()
    header = frame.Header(channel_number, 0, properties(like, cell)).marshal()
    size_at = 7 + 2 + 2  # after the frame's own header, class and weight
    before_size, after_size = method + header[:size_at], header[size_at + 8 :]
    up_to_id, rest = after_size.split(id_mark.encode())
    if not trace_mark:
        return before_size, up_to_id, b"", rest
    before_trace, after_trace = up_to_id.split(trace_mark.encode())
    return before_size, before_trace, after_trace, rest
