"""How soon an event is in the queue when there are a hundred a second, each committed by itself; and how soon a message
of pika alone, which is what the broker takes of that."""

import json
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pika
import psycopg

from analytics_svc.ingest.consumer import EXCHANGE, QUEUE, ROUTING_KEY
from deploy.local.machine import StackError, wait_until
from tests.bench import stage
from tests.bench.figures import Plan
from tests.bench.machine import Meter
from tests.bench.pipeline import broker, events
from tests.bench.pipeline.moving import Scene
from tests.bench.show import Show

EVENTS_PER_S = 100
ARRIVAL_TIMEOUT_S = 30.0
LISTEN_S = 0.1
RELAY, ALONE = f"relay at {EVENTS_PER_S} events/s", "pika alone"


class Soon(NamedTuple):
    """What one round saw."""

    waits_ms: list[float]  # from an event's commit to its coming out of the queue
    cpu_us: dict[str, float]  # an event, by process; PostgreSQL's with what the writing costs


def measure(scene: Scene, plan: Plan, show: Show) -> dict[str, list[Soon]]:
    """The relay's process as it is, on an outbox in which there is always something, and never much; beside pika."""
    url = stage.migrated(scene.postgres, "soon", "purchases_svc")
    stage.ensure_today(url)
    broker.empty(scene.rabbitmq.url)
    settings = {"PURCHASES_DATABASE_URL": url, "AMQP_URL": scene.rabbitmq.url, "LOG_LEVEL": "WARNING"}
    count = plan.measure_s * EVENTS_PER_S
    with (
        stage.service("relay", ("relay_svc", "serve"), settings, scene.directory) as service,
        psycopg.connect(url, autocommit=True) as connection,
    ):
        pids = {"in front": [service.process.pid], **scene.pids()}

        def commit() -> tuple[str, float]:
            event_id = events.write_one(connection)
            return event_id, time.perf_counter()

        def alone() -> Soon:
            with broker.queue(scene.rabbitmq.url) as channel:
                channel.confirm_delivery()  # a call returns when the broker has the message

                def publish() -> tuple[str, float]:
                    event_id, body = events.one(connection)
                    began = time.perf_counter()
                    channel.basic_publish(EXCHANGE, ROUTING_KEY, body, pika.BasicProperties(delivery_mode=2))
                    return event_id, began

                return _trial(scene, pids, count, publish)

        contenders = {RELAY: lambda: _trial(scene, pids, count, commit), ALONE: alone}
        return show.in_turn(contenders, plan.rounds, "events one by one")


def _trial(scene: Scene, pids: dict[str, list[int]], count: int, send: Callable[[], tuple[str, float]]) -> Soon:
    """`send` tells the id of what it has sent, and since when it is on its way."""
    arrivals = _Arrivals(scene.rabbitmq.url)
    sent: dict[str, float] = {}
    with arrivals:
        meter = Meter(pids)
        began = time.perf_counter()
        for number in range(count):
            time.sleep(max(began + number / EVENTS_PER_S - time.perf_counter(), 0))
            event_id, at = send()
            sent[event_id] = at
        if not wait_until(lambda: len(arrivals.bodies) >= count, ARRIVAL_TIMEOUT_S):
            raise StackError("not all events came out of the queue")
        cpu_us = meter.us(count)
    arrived = {json.loads(body)["event_id"]: at for at, body in arrivals.bodies}
    # An event may be out of the queue before its writer has heard of the commit.
    return Soon(sorted(max(arrived[each] - at, 0) * 1_000 for each, at in sent.items()), cpu_us)


class _Arrivals:
    """Notes what comes out of the queue, and when."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.bodies: list[tuple[float, bytes]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _listen(self) -> None:
        def note(_: Any, __: Any, ___: Any, body: bytes) -> None:
            self.bodies.append((time.perf_counter(), body))

        with broker.queue(self._url) as channel:
            channel.basic_consume(QUEUE, note, auto_ack=True)
            while not self._stop.is_set():
                channel.connection.process_data_events(LISTEN_S)
