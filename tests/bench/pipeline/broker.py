"""The queue of our events on a private node: emptied, filled, and pika alone in front of it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pika

from analytics_svc.ingest.consumer import EXCHANGE, QUEUE, QUEUE_ARGUMENTS, ROUTING_KEY
from deploy.local.machine import StackError
from tests.bench.stage import ROOT

RAW_TIMEOUT_S = 60.0  # to start, read the messages and finish


class Published(NamedTuple):
    """What the raw publisher did."""

    events: int  # confirmed
    seconds: float
    cpu_s: float  # its own, while the clock ran


@contextmanager
def queue(url: str) -> Iterator[Any]:
    """A channel on which our queue exists and is bound, as the services make it; pika has no types."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        channel = connection.channel()
        channel.exchange_declare(EXCHANGE, "topic", durable=True)
        channel.queue_declare(QUEUE, durable=True, arguments=QUEUE_ARGUMENTS)
        channel.queue_bind(QUEUE, EXCHANGE, ROUTING_KEY)
        yield channel
    finally:
        connection.close()


def empty(url: str) -> None:
    with queue(url) as channel:
        channel.queue_purge(QUEUE)


def publish(url: str, how: str, bodies: Path, limit_s: float) -> Published:
    """Publish the file's lines in one of the raw publisher's WAYS.

    Raises:
        StackError: not all went well.
    """
    with bodies.open("rb") as lines:
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.pipeline.raw_publisher", url, QUEUE, how, str(limit_s)],
            stdin=lines,
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=limit_s + RAW_TIMEOUT_S,
            check=False,
            start_new_session=True,  # Ctrl-C reaches us alone, and we end it
        )
    if done.returncode:
        raise StackError(f"the raw publisher failed:\n{done.stderr}")
    return Published(*json.loads(done.stdout))
