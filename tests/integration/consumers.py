"""The consumer as it is wired, in this process or in one of its own, and what publishes to it."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pika
from pika.adapters.blocking_connection import BlockingChannel

from analytics_svc.commands.consume import consume
from analytics_svc.ingest.consumer import QUEUE
from analytics_svc.settings import ConsumeSettings
from tests.conftest import WAIT_S, eventually
from tests.integration.conftest import free_address, is_serving, running
from tests.integration.purchase_events import query

COUNTED = "SELECT count(*) FROM analytics_event_log"
QUARANTINED = "SELECT count(*) FROM quarantined_events"


def publish(channel: BlockingChannel, *bodies: bytes, **properties: Any) -> None:
    for body in bodies:
        channel.basic_publish(
            "purchases",
            "purchases.created",
            body,
            pika.BasicProperties(delivery_mode=2, content_type="application/json", **properties),
            mandatory=True,
        )


def config(analytics_db: str, amqp_url: str, **changes: Any) -> ConsumeSettings:
    settings: dict[str, Any] = {"listen": free_address(), "metrics_listen": "127.0.0.1:0"}
    return ConsumeSettings(analytics_db, amqp_url=amqp_url, **(settings | changes))


@asynccontextmanager
async def consuming(analytics_db: str, amqp_url: str, **changes: Any) -> AsyncIterator[grpc.aio.Channel]:
    """A consumer that serves, until the block ends; yields a channel to its health."""
    settings = config(analytics_db, amqp_url, **changes)
    async with running(lambda stop: consume(settings, stop), settings.listen) as opened:
        yield opened


async def is_true(url: str, statement: str) -> bool:
    return bool(query(url, statement)[0][0])


async def counts(url: str, statement: str, count: int, within_s: float = WAIT_S) -> None:
    await eventually(lambda: is_true(url, f"SELECT ({statement}) = {count}"), f"{statement}: {count}", within_s)


def depth(channel: BlockingChannel) -> int:
    """Messages in the queue that nobody holds."""
    return int(channel.queue_declare(QUEUE, passive=True).method.message_count)


async def make_queue(analytics_db: str, amqp_url: str, channel: BlockingChannel) -> None:
    """The queue as a consumer makes it, which then leaves."""
    async with consuming(analytics_db, amqp_url):
        pass
    await all_left(channel)


async def all_left(channel: BlockingChannel) -> None:
    """Wait until the broker has noticed that nobody consumes any more.

    Before that it may still deliver to those who are gone: then whoever comes next gets it as a redelivery.
    """

    async def none() -> bool:
        return int(channel.queue_declare(QUEUE, passive=True).method.consumer_count) == 0

    await eventually(none, "the broker has noticed that the consumers are gone")


def start(command: str, *, bug: str | None = None, **settings: str) -> "subprocess.Popen[bytes]":
    """A process of its own; `bug`: one of those of `poisoned_consumer`."""
    environ = {
        "PATH": os.environ["PATH"],
        "CONSUMER_METRICS_LISTEN": "127.0.0.1:0",
        "ANALYTICS_METRICS_LISTEN": "127.0.0.1:0",
        **settings,
    }
    program = [str(Path(__file__).parent / "poisoned_consumer.py"), bug] if bug else ["-m", "analytics_svc"]
    return subprocess.Popen([sys.executable, *program, command], env=environ, stderr=subprocess.PIPE)


async def serving(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as health:
        await eventually(lambda: is_serving(health), "the process serves")
