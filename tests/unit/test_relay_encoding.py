"""The bytes of a window are those that pika would send."""

import pytest
from pika import channel, connection
from uuid_utils import uuid7

from chassis.cells import DEFAULT
from relay_svc import encoding, topology
from relay_svc.outbox import OutboxEvent

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Recorder:
    """What pika's channel needs of a connection, and the place where frames leave it."""

    def __init__(self, frame_max: int) -> None:
        self.sent = b""
        self._body_max_length = frame_max - 8

    def _send_method(self, *arguments: object) -> None:
        connection.Connection._send_message(self, *arguments)

    def _output_marshaled_frames(self, frames: list[bytes]) -> None:
        self.sent += b"".join(frames)


@pytest.mark.parametrize("cell", [DEFAULT, "north"])
@pytest.mark.parametrize("length", [2, 4_087, 4_088, 4_089, 8_176, 8_177, 600_000])
def test_same_bytes_as_pika(length: int, cell: str) -> None:
    events = [
        OutboxEvent(str(uuid7()), "PurchaseCreated", "é" * (length // 2) + "x" * (length % 2), trace)
        for trace in (None, TRACE, "00-short-01", None)
    ]
    pikas = Recorder(4_096)
    publisher = channel.Channel.__new__(channel.Channel)
    publisher.channel_number, publisher.connection, publisher._state = 7, pikas, channel.Channel.OPEN
    for event in events:
        publisher.basic_publish(
            topology.EXCHANGE,
            encoding.ROUTING_KEYS[event.event_type],
            event.payload.encode(),
            encoding.properties(event, cell),
            mandatory=True,
        )
    ours = list(encoding.encode(7, 4_096, events, cell))
    assert b"".join(ours) == pikas.sent
    assert len(ours) == (4 if length == 600_000 else 1)


def test_pika_has_the_way_around_it() -> None:
    """Without it the relay still works, at half the speed: then look for another way."""
    assert callable(connection.Connection._output_marshaled_frames)
