"""`python -m tests.bench.pipeline.raw_publisher URL QUEUE HOW SECONDS < bodies`: pika alone, as fast as it goes.

HOW is `pipelined`, with a window of unconfirmed messages, or `one_by_one`, which waits for each confirm. Publishes one
message for each line of stdin, until they are out or the time is up; prints as JSON how many, the seconds from the
first message to the last confirm, and the CPU time of this process meanwhile.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pika

WINDOW = 1_000
PROPERTIES = pika.BasicProperties(
    delivery_mode=2, content_type="application/json", message_id="x" * 36, type="PurchaseCreated"
)

Done = tuple[int, float]  # messages that were confirmed, and the seconds that it took


def one_by_one(parameters: pika.URLParameters, queue: str, bodies: Sequence[bytes], limit_s: float) -> Done:
    connection = pika.BlockingConnection(parameters)
    channel = connection.channel()
    channel.confirm_delivery()
    sent, began = 0, time.perf_counter()
    for body in bodies:
        channel.basic_publish("", queue, body, PROPERTIES, mandatory=True)  # returns when it is confirmed
        sent += 1
        if time.perf_counter() - began > limit_s:
            break
    seconds = time.perf_counter() - began
    connection.close()
    return sent, seconds


def pipelined(parameters: pika.URLParameters, queue: str, bodies: Sequence[bytes], limit_s: float) -> Done:
    return Pipeline(parameters, queue, bodies, limit_s).run()


class Pipeline:
    """A window of messages in flight, filled up when half of them are confirmed."""

    def __init__(self, parameters: pika.URLParameters, queue: str, bodies: Sequence[bytes], limit_s: float) -> None:
        self._queue, self._bodies, self._limit_s = queue, bodies, limit_s
        self._sent = self._confirmed = 0
        self._began = self._ended = 0.0
        self._channel: Any = None
        self._connection: Any = pika.SelectConnection(
            parameters,
            on_open_callback=lambda connection: connection.channel(on_open_callback=self._on_channel),
            on_close_callback=lambda *_: self._connection.ioloop.stop(),
        )

    def run(self) -> Done:
        self._connection.ioloop.start()
        if not self._ended:
            raise RuntimeError(f"the connection was lost; {self._confirmed} of {self._sent} messages were confirmed")
        return self._confirmed, self._ended - self._began

    def _on_channel(self, channel: Any) -> None:
        self._channel = channel
        channel.confirm_delivery(self._on_confirm, callback=lambda _: self._begin())

    def _begin(self) -> None:
        self._began = time.perf_counter()
        self._pump()

    def _pump(self) -> None:
        publish, queue = self._channel.basic_publish, self._queue
        most = min(self._confirmed + WINDOW, len(self._bodies))
        for body in self._bodies[self._sent : most]:
            publish("", queue, body, PROPERTIES, mandatory=True)
        self._sent = most

    def _on_confirm(self, frame: Any) -> None:
        tag = frame.method.delivery_tag
        # To a single queue, confirms come in order.
        self._confirmed = tag if frame.method.multiple else max(self._confirmed, tag)
        over = time.perf_counter() - self._began > self._limit_s
        if self._confirmed == self._sent and (over or self._sent == len(self._bodies)):
            self._ended = time.perf_counter()
            self._connection.close()
        elif not over and self._sent - self._confirmed < WINDOW // 2:
            self._pump()


WAYS: dict[str, Callable[[pika.URLParameters, str, Sequence[bytes], float], Done]] = {
    "pipelined": pipelined,
    "one_by_one": one_by_one,
}


def main(url: str, queue: str, how: str, limit_s: str) -> None:
    bodies = sys.stdin.buffer.read().splitlines()
    cpu_before_s = time.process_time()
    events, seconds = WAYS[how](pika.URLParameters(url), queue, bodies, float(limit_s))
    print(json.dumps([events, seconds, time.process_time() - cpu_before_s]))


if __name__ == "__main__":
    main(*sys.argv[1:])
