"""Events on their way: the relay beside pika alone; the consumer beside a second one, and with one event at a time."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psycopg

from deploy.local.machine import StackError, wait_until
from deploy.local.postgres import Postgres
from deploy.local.rabbitmq import RabbitMQ
from tests.bench import stage
from tests.bench.figures import Flow, Plan
from tests.bench.machine import Meter
from tests.bench.pipeline import broker, events
from tests.bench.show import Show

# More than anybody moves in a second; whoever is slower takes longer, or is stopped when the time is over.
EVENTS_PER_S = {"relay": 10_000, "apply": 10_000, "single": 1_500}
PATIENCE = 20.0  # times as long as planned, then something is wrong
WATCH_EVERY_S = 0.01

RAW, RELAY, ONE_BY_ONE = "pika, pipelined", "relay", "pika, one confirm at a time"
APPLY, TWO, SINGLE = "consumer", "two consumers", "one event a transaction"


class Scene(NamedTuple):
    """The private servers, and where files may be left."""

    postgres: Postgres
    rabbitmq: RabbitMQ
    directory: Path

    def pids(self) -> dict[str, list[int]]:
        assert self.postgres.process and self.rabbitmq.process
        return {"PostgreSQL": [self.postgres.process.pid], "RabbitMQ": [self.rabbitmq.process.pid]}


def relay(scene: Scene, plan: Plan, show: Show) -> dict[str, list[Flow]]:
    """Publishing: pika alone and the relay with the same messages to the same, empty queue."""
    url = stage.migrated(scene.postgres, "relayed", "purchases_svc")
    count = plan.measure_s * EVENTS_PER_S["relay"]
    bodies = scene.directory / "bodies"
    stage.ensure_today(url)
    with psycopg.connect(url, autocommit=True) as connection:
        events.write_bodies(connection, count, bodies)
    broker.empty(scene.rabbitmq.url)

    settings = {"PURCHASES_DATABASE_URL": url, "AMQP_URL": scene.rabbitmq.url, "LOG_LEVEL": "WARNING"}
    with stage.service("relay", ("relay_svc", "serve"), settings, scene.directory) as service:
        contenders: dict[str, Callable[[], Flow]] = {
            RAW: partial(_publish, scene, "pipelined", bodies, plan.measure_s * PATIENCE),
            RELAY: partial(_relay, scene, url, service, count, plan.measure_s * PATIENCE),
            ONE_BY_ONE: partial(_publish, scene, "one_by_one", bodies, float(plan.measure_s)),
        }
        return show.in_turn(contenders, plan.rounds, "events to the queue")


def _publish(scene: Scene, how: str, bodies: Path, limit_s: float) -> Flow:
    broker.empty(scene.rabbitmq.url)
    meter = Meter(scene.pids())
    done = broker.publish(scene.rabbitmq.url, how, bodies, limit_s)
    return Flow(done.events / done.seconds, {"in front": done.cpu_s / done.events * 1e6, **meter.us(done.events)})


def _relay(scene: Scene, url: str, service: stage.Service, count: int, limit_s: float) -> Flow:
    """From the moment at which the events are there until all are marked as sent."""
    broker.empty(scene.rabbitmq.url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("TRUNCATE outbox_events")
        with connection.transaction():
            events.fill_outbox(connection, count)
        began, meter = time.perf_counter(), Meter({"in front": [service.process.pid], **scene.pids()})
        # The newest goes last, or nearly; to look for any that waits is to read all.
        while (
            connection.execute(
                "SELECT FROM (SELECT status FROM outbox_events ORDER BY event_id DESC LIMIT 1) AS newest"
                " WHERE status = 'NEW'"
            ).rowcount
            or connection.execute("SELECT FROM outbox_events WHERE status = 'NEW' LIMIT 1").rowcount
        ):
            if time.perf_counter() - began > limit_s:
                raise StackError(f"the relay did not empty the outbox within {limit_s:.0f} s")
            time.sleep(WATCH_EVERY_S)
        seconds = time.perf_counter() - began
        return Flow(count / seconds, meter.us(count))


def apply(scene: Scene, plan: Plan, show: Show) -> tuple[dict[str, list[Flow]], list[float]]:
    """Counting: the consumer on a full queue, as it is, beside a second one, and with one event in each transaction.

    Returns also, for each round, the share of two consumers' transactions in which they waited for a lock.
    """
    url = stage.migrated(scene.postgres, "applied", "analytics_svc")
    count = plan.measure_s * EVENTS_PER_S["apply"]
    waiting: list[float] = []
    contenders: dict[str, Callable[[], Flow]] = {
        APPLY: partial(_apply, scene, url, {}, count, plan.measure_s),
        # The first of them counts while the second starts.
        TWO: partial(_apply, scene, url, {}, 2 * count, plan.measure_s, consumers=2, waiting=waiting),
        SINGLE: partial(
            _apply, scene, url, {"CONSUMER_BATCH_MAX": "1"}, plan.measure_s * EVENTS_PER_S["single"], plan.measure_s
        ),
    }
    flows = show.in_turn(contenders, plan.rounds, "events into the read models")
    return flows, waiting[-plan.rounds :]  # without the round that does not count


def _apply(
    scene: Scene,
    url: str,
    batch: dict[str, str],
    count: int,
    limit_s: float,
    *,
    consumers: int = 1,
    waiting: list[float] | None = None,
) -> Flow:
    """From when the first events are counted until all are, or the time is over: the start is not measured."""
    bodies = scene.directory / "bodies"
    with psycopg.connect(url, autocommit=True) as connection, ExitStack() as stack:
        events.write_bodies(connection, count, bodies)
        broker.empty(scene.rabbitmq.url)
        broker.publish(scene.rabbitmq.url, "pipelined", bodies, limit_s * PATIENCE)
        at_rest = counted(connection)
        settings = {"ANALYTICS_DATABASE_URL": url, "AMQP_URL": scene.rabbitmq.url, "LOG_LEVEL": "ERROR", **batch}
        services = [
            stack.enter_context(stage.service("consumer", ("analytics_svc", "consume"), settings, scene.directory))
            for _ in range(consumers)
        ]
        if not wait_until(lambda: counted(connection) > at_rest, limit_s + stage.START_TIMEOUT_S):
            raise StackError("the consumer counts nothing")
        first, began = counted(connection), time.perf_counter()
        meter = Meter({"in front": [service.process.pid for service in services], **scene.pids()})
        samples = [0, 0]
        while (last := counted(connection)) < at_rest + count and time.perf_counter() - began < limit_s:
            for number, more in enumerate(_lock_waits(connection)):
                samples[number] += more
            time.sleep(WATCH_EVERY_S)
        seconds = time.perf_counter() - began
        if last == first:
            raise StackError("all events were counted before the clock started: measure longer")
        if waiting is not None:
            waiting.append(samples[0] / max(samples[1], 1))
        return Flow((last - first) / seconds, meter.us(last - first))


def _lock_waits(connection: psycopg.Connection) -> tuple[int, int]:
    """How many consumers wait for a lock now, and how many are in a transaction."""
    row = connection.execute(
        "SELECT count(*) FILTER (WHERE wait_event_type = 'Lock'), count(*) FROM pg_stat_activity"
        " WHERE application_name = 'analytics consume' AND xact_start IS NOT NULL"
    ).fetchone()
    assert row
    return row[0], row[1]


def counted(connection: psycopg.Connection) -> int:
    """The purchases in the read models."""
    row = connection.execute("SELECT coalesce(sum(purchases_count), 0)::bigint FROM daily_sales_by_branch").fetchone()
    assert row
    return int(row[0])
