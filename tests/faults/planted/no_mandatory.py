"""The relay publishes without `mandatory`: RabbitMQ acknowledges what no queue takes."""

from collections.abc import Sequence
from typing import Any

from tests.faults.planted import replace

FAULTS = ("rabbitmq.unbound", "rabbitmq.unbound")
CAUGHT_AS = {"lost", "falsely_sent", "rescued"}


def plant() -> None:
    from relay_svc import encoding, publisher, topology

    def send(channel: Any, events: Sequence[Any], cell: str) -> None:
        for event in events:
            key = encoding.ROUTING_KEYS[event.event_type]
            channel.basic_publish(topology.EXCHANGE, key, event.payload.encode(), encoding.properties(event, cell))

    replace(publisher, "_send", send)
