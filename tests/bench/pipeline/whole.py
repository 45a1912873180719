"""The whole pipeline at a steady rate, beside pgbench.

The load, the purchases service, the relay, RabbitMQ, the consumer and PostgreSQL share the machine's cores; pgbench and
PostgreSQL have them to themselves.

What is sought is the highest rate at which all sales are taken in and the backlog of events does not grow.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from statistics import linear_regression
from threading import Event
from typing import NamedTuple

import psycopg

from deploy.local.machine import StackError, wait_until
from tests.bench import pgbench as plain
from tests.bench import stage
from tests.bench.figures import Figure, Plan
from tests.bench.load import Job, Load, LoadClient, load_client
from tests.bench.machine import Meter, children_of
from tests.bench.pipeline import broker
from tests.bench.pipeline.moving import Scene, counted
from tests.bench.show import Show

PGBENCH, PIPELINE = "pgbench alone", "whole pipeline"
PURCHASES, ANALYTICS, PLAIN = "purchases", "analytics", "plain"
PGBENCH_CLIENTS = (8, 32)  # the faster one is the yardstick
CALLS_IN_FLIGHT_MAX = 256
TRIAL_LONGER = 2  # times as long as the yardstick's run: a backlog shows the better, the longer one waits
KEPT_UP_MIN = 0.98  # of the rate, in taking in and in counting: the machine has other things to do, too
LOOK_EVERY_S = 0.1
DRAIN_TIMEOUT_S = 120.0

# What a connection of PostgreSQL works for, by how its application_name begins.
CONNECTIONS = {
    "purchases": "PostgreSQL, recording",
    "relay": "PostgreSQL, relaying",
    "analytics": "PostgreSQL, counting",
}

# Those of the keeper and the audit, and those that the purchases service and the relay have for their questions.
PROOF = ("analytics keeper", "analytics audit", "relay service", "purchases read", "purchases export")
LOAD = "load client"

# The search goes by the rate as a multiple of the yardstick's, which is measured anew before every trial.
FIRST_RANGE, FIRST_TRIALS = (0.0, 1.6), 6
LATER_MARGIN, LATER_TRIALS = 0.2, 4
ATTEMPTS = 2  # at each rate


class Trial(NamedTuple):
    """What became of a rate."""

    pgbench: Figure  # just before
    asked_per_s: float
    recorded_per_s: float
    counted_per_s: float  # the slope of the read models' growth
    cpu_us: dict[str, float]  # a purchase, by process
    keeper_and_audit_us: float = 0.0  # of it, what can be told apart: see `System.keeper_and_audit`

    @property
    def keeper_and_audit_share(self) -> float:
        """Of all that a purchase costs us."""
        return self.keeper_and_audit_us / sum(us for name, us in self.cpu_us.items() if name != LOAD)

    @property
    def sustained(self) -> bool:
        """All was taken in, and counted as fast as it was: the backlog did not grow."""
        return min(self.recorded_per_s, self.counted_per_s) >= KEPT_UP_MIN * self.asked_per_s

    @property
    def ratio(self) -> float:
        return self.recorded_per_s / self.pgbench.purchases_per_s


class Round(NamedTuple):
    """The result of one search, and how soon sales are seen at half of that rate."""

    highest: Trial
    half: Load
    trials: list[Trial]

    def raw(self) -> dict[str, object]:
        """For the report."""
        trials = [{**trial._asdict(), "pgbench": trial.pgbench._asdict()} for trial in self.trials]
        return {"ratio": self.highest.ratio, "trials": trials, "half_per_s": self.half.purchases / self.half.seconds}


class System(NamedTuple):
    """All processes, on databases of their own."""

    scene: Scene
    processes: dict[str, stage.Service]
    client: LoadClient
    analytics_url: str
    purchases: psycopg.Connection
    analytics: psycopg.Connection

    def pids(self) -> dict[str, list[int]]:
        """The processes by name, and PostgreSQL's connections, which are part of it, by what they work for."""
        ours = {name: [service.process.pid] for name, service in self.processes.items()}
        connections: dict[str, list[int]] = {name: [] for name in CONNECTIONS.values()}
        for pid, name in self.purchases.execute("SELECT pid, application_name FROM pg_stat_activity"):
            for prefix, work in CONNECTIONS.items():
                if name.startswith(prefix):
                    connections[work].append(pid)
        return {LOAD: [self.client.pid], **ours, **self.scene.pids(), **connections}

    def keeper_and_audit(self) -> list[int]:
        """The audit's process, which is the consumer's only child, and PostgreSQL's connections that do its work and
        the keeper's. What both make the consumer, the relay and the purchases service do in Python is not in it.
        """
        names = self.purchases.execute("SELECT pid, application_name FROM pg_stat_activity")
        audit = children_of(self.processes["consumer"].process.pid)
        return [*audit, *(pid for pid, name in names if name in PROOF)]

    def drain(self) -> None:
        """Wait until every sale is counted.

        Raises:
            StackError: that takes too long, or one is missing, or counted twice.
        """

        def difference() -> int:
            row = self.purchases.execute("SELECT count(*) FROM purchases").fetchone()
            assert row
            return int(row[0]) - counted(self.analytics)

        if not wait_until(lambda: difference() <= 0, DRAIN_TIMEOUT_S) or difference():
            raise StackError(f"{difference()} sales are not counted after {DRAIN_TIMEOUT_S:.0f} s")


@contextmanager
def system(scene: Scene) -> Iterator[System]:
    purchases, analytics = (stage.migrated(scene.postgres, name, f"{name}_svc") for name in (PURCHASES, ANALYTICS))
    settings = {
        "PURCHASES_DATABASE_URL": purchases,
        "ANALYTICS_DATABASE_URL": analytics,
        "AMQP_URL": scene.rabbitmq.url,
        "LOG_LEVEL": "WARNING",
    }
    commands = {
        "purchases": ("purchases_svc", "serve"),
        "relay": ("relay_svc", "serve"),
        "consumer": ("analytics_svc", "consume"),
        "analytics": ("analytics_svc", "serve"),
    }
    with ExitStack() as stack:
        processes: dict[str, stage.Service] = {}
        for name, command in commands.items():
            processes[name] = stack.enter_context(stage.service(name, command, settings, scene.directory))
            settings[f"{name.upper()}_TARGET"] = processes[name].address
        addresses = processes["purchases"].address, scene.directory, processes["analytics"].address
        yield System(
            scene,
            processes,
            stack.enter_context(load_client(*addresses)),
            analytics,
            *(stack.enter_context(psycopg.connect(url, autocommit=True)) for url in (purchases, analytics)),
        )


def measure(scene: Scene, plan: Plan, show: Show) -> list[Round]:
    """A search in every round; the first one is the warm-up, and tells the others where to look."""
    stage.ensure_today(stage.migrated(scene.postgres, PLAIN, "purchases_svc"))
    broker.empty(scene.rabbitmq.url)
    with system(scene) as running, show.progress("the whole pipeline", FIRST_TRIALS + plan.rounds * LATER_TRIALS) as on:
        clients = max(PGBENCH_CLIENTS, key=lambda each: yardstick(running, each, plan.measure_s).purchases_per_s)

        def attempt(ratio: float) -> Trial:
            """Twice, if need be: what others do on the machine may spoil a trial, but never helps it."""
            on(1)
            for _ in range(ATTEMPTS):
                pgbench = yardstick(running, clients, plan.measure_s)
                tried = trial(running, pgbench, ratio * pgbench.purchases_per_s, plan.measure_s * TRIAL_LONGER)
                if tried.sustained:
                    break
            return tried

        first = search(*FIRST_RANGE, FIRST_TRIALS, attempt)
        around = highest(first).ratio
        rounds = []
        for _ in range(plan.rounds):
            low = max(0.0, around - LATER_MARGIN)
            trials = search(low, around + LATER_MARGIN, LATER_TRIALS, attempt)
            if not any(each.sustained for each in trials):  # the machine, or its other users, changed altogether
                on.expect(LATER_TRIALS)
                trials += search(0.0, low, LATER_TRIALS, attempt)
            job = Job(
                "create", CALLS_IN_FLIGHT_MAX, plan.measure_s * TRIAL_LONGER, highest(trials).asked_per_s / 2, True
            )
            half = running.client.run(job, lambda: None)
            running.drain()
            rounds.append(Round(highest(trials), half, trials))
        return rounds


def yardstick(running: System, clients: int, measure_s: int) -> Figure:
    """pgbench, while all processes of ours stand still."""
    with stage.paused(*(service.process for service in running.processes.values())):
        return plain.run(running.scene.postgres, PLAIN, clients, measure_s, running.scene.directory)


def trial(running: System, pgbench: Figure, per_s: float, measure_s: int) -> Trial:
    """The whole pipeline at that rate for a while, then until it is empty again."""
    meter, proof = Meter({}), Meter({})
    cpu_s: dict[str, float] = {}
    proof_s: dict[str, float] = {}

    def at_the_edge() -> None:
        nonlocal meter, proof, cpu_s, proof_s
        cpu_s, proof_s = meter.seconds(), proof.seconds()
        meter, proof = Meter(running.pids()), Meter({"proof": running.keeper_and_audit()})

    with watching(running.analytics_url) as seen:
        load = running.client.run(Job("create", CALLS_IN_FLIGHT_MAX, measure_s, per_s), at_the_edge)
        now = time.perf_counter()
    slope = linear_regression(*zip(*(each for each in seen if each[0] > now - measure_s), strict=True)).slope
    running.drain()
    served_s = sum(cpu_s[name] for name in CONNECTIONS.values())
    cpu_s["PostgreSQL, the rest"] = max(cpu_s.pop("PostgreSQL") - served_s, 0.0)
    cpu_us = {name: seconds / load.purchases * 1e6 for name, seconds in cpu_s.items()}
    proof_us = proof_s["proof"] / load.purchases * 1e6
    return Trial(pgbench, per_s, load.purchases / load.seconds, slope, cpu_us, proof_us)


@contextmanager
def watching(url: str) -> Iterator[list[tuple[float, int]]]:
    """When which number of sales was counted, looked up all the while."""
    seen: list[tuple[float, int]] = []
    over = Event()

    def look() -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            while not over.wait(LOOK_EVERY_S):
                seen.append((time.perf_counter(), counted(connection)))

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            yield seen
        finally:
            over.set()
        looking.result()


def search(low: float, high: float, trials: int, attempt: Callable[[float], Trial]) -> list[Trial]:
    """Halve the range of the multiple so many times: above what was sustained, below what was not."""
    done = []
    for _ in range(trials):
        middle = (low + high) / 2
        done.append(attempt(middle))
        if done[-1].sustained:
            low = middle
        else:
            high = middle
    return done


def highest(trials: list[Trial]) -> Trial:
    """The highest multiple that was sustained.

    Raises:
        StackError: none was.
    """
    sustained = [trial for trial in trials if trial.sustained]
    if not sustained:
        raise StackError("the pipeline keeps up with none of the rates that were tried: is the machine busy otherwise?")
    return max(sustained, key=lambda trial: trial.ratio)
