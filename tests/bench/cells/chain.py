"""A chain of some cells, each with a PostgreSQL, a purchases service and a relay of its own; the rest is shared."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import psycopg

from deploy.local.machine import Process, StackError, wait_until
from deploy.local.postgres import Postgres
from deploy.local.rabbitmq import RabbitMQ
from tests.bench import stage
from tests.bench.load import Job, Load, LoadClient, load_client
from tests.bench.load_client import BRANCHES
from tests.bench.machine import Meter
from tests.bench.pipeline import broker
from tests.bench.pipeline.moving import counted

CALLS_IN_FLIGHT_MAX = 256
DRAIN_TIMEOUT_S = 120.0
NOWHERE = "127.0.0.1:1"


class Cell(NamedTuple):
    postgres: Postgres
    purchases: stage.Service
    relay: stage.Service
    client: LoadClient
    first_branch: int


class Measured(NamedTuple):
    loads: list[Load]  # of each cell
    cpu_us: dict[str, float]  # a purchase, by what the time was spent for


class Chain(NamedTuple):
    cells: list[Cell]
    consumer: stage.Service
    analytics: Postgres
    analytics_url: str
    rabbitmq: RabbitMQ

    @property
    def processes(self) -> list[Process]:
        """Those of ours."""
        return [self.consumer.process, *(it.process for cell in self.cells for it in (cell.purchases, cell.relay))]

    def sell(self, per_s: float, measure_s: float) -> Measured:
        """So many purchases a second over all cells, evenly, and then wait until all are counted."""
        before = self._uncounted()
        meters: list[Meter] = []
        cpu_s: dict[str, float] = {}
        share = per_s / len(self.cells)

        def at_the_edge() -> None:
            """Of the first cell's clock: all have one load and one time."""
            nonlocal cpu_s
            if meters:
                cpu_s = meters[0].seconds()
            meters.append(Meter(self._pids()))

        def nothing() -> None:
            pass

        with ThreadPoolExecutor(len(self.cells)) as clients:
            selling = [
                clients.submit(
                    cell.client.run,
                    Job("create", CALLS_IN_FLIGHT_MAX, measure_s, share, first_branch=cell.first_branch),
                    nothing if number else at_the_edge,
                )
                for number, cell in enumerate(self.cells)
            ]
            loads = [each.result() for each in selling]
        self._drain(before)
        purchases = sum(load.purchases for load in loads)
        return Measured(loads, {name: seconds / purchases * 1e6 for name, seconds in cpu_s.items()})

    def _pids(self) -> dict[str, list[int]]:
        def of(postgres: Postgres) -> list[int]:
            return [postgres.process.pid] if postgres.process else []

        return {
            "purchases": [cell.purchases.process.pid for cell in self.cells],
            "relay": [cell.relay.process.pid for cell in self.cells],
            "PostgreSQL of the cells": [pid for cell in self.cells for pid in of(cell.postgres)],
            "consumer": [self.consumer.process.pid],
            "PostgreSQL of the read models": of(self.analytics),
            "RabbitMQ": [self.rabbitmq.process.pid] if self.rabbitmq.process else [],
        }

    def _uncounted(self) -> int:
        """Recorded by these cells and not counted; less than none, as what others have sold is counted, too."""
        recorded = 0
        for cell in self.cells:
            with cell.postgres.connect("purchases") as connection:
                recorded += connection.execute("SELECT FROM purchases").rowcount
        with psycopg.connect(self.analytics_url, autocommit=True) as connection:
            return recorded - counted(connection)

    def _drain(self, before: int) -> None:
        """Until as few are not counted as before.

        Raises:
            StackError: that takes too long.
        """
        if not wait_until(lambda: self._uncounted() <= before, DRAIN_TIMEOUT_S):
            raise StackError(f"{self._uncounted() - before} sales are not counted: is the machine busy otherwise?")


@contextmanager
def chain(directory: Path, number: int) -> Iterator[Chain]:
    """One with so many cells, on servers of its own; it has sold nothing."""
    names = [f"cell-{n}" for n in range(1, number + 1)]
    file = directory / "cells.toml"
    directory.mkdir()
    with ExitStack() as stack:
        rabbitmq = stack.enter_context(stage.private_rabbitmq(directory / "rabbitmq"))
        broker.empty(rabbitmq.url)
        analytics = stack.enter_context(stage.private_postgres(directory / "analytics"))
        analytics_url = stage.migrated(analytics, "analytics", "analytics_svc")
        _write(file, dict.fromkeys(names, (NOWHERE, NOWHERE)))
        found: dict[str, tuple[stage.Service, stage.Service]] = {}
        servers: list[Postgres] = []
        for name in names:
            own = directory / name
            servers.append(stack.enter_context(stage.private_postgres(own / "postgres")))
            url = stage.migrated(servers[-1], "purchases", "purchases_svc")
            stage.ensure_today(url)
            settings = {
                "PURCHASES_DATABASE_URL": url,
                "AMQP_URL": rabbitmq.url,
                "CELLS_FILE": str(file),
                "CELL": name,
                "LOG_LEVEL": "WARNING",
            }
            purchases = stage.service("purchases", ("purchases_svc", "serve"), settings, own)
            relay = stage.service("relay", ("relay_svc", "serve"), settings, own)
            found[name] = stack.enter_context(purchases), stack.enter_context(relay)
        _write(file, {name: (each[0].address, each[1].address) for name, each in found.items()})
        settings = {
            "ANALYTICS_DATABASE_URL": analytics_url,
            "AMQP_URL": rabbitmq.url,
            "CELLS_FILE": str(file),
            "LOG_LEVEL": "WARNING",
        }
        consumer = stack.enter_context(stage.service("consumer", ("analytics_svc", "consume"), settings, directory))
        cells = [
            Cell(
                server,
                purchases,
                relay,
                stack.enter_context(load_client(purchases.address, server.directory)),
                n * BRANCHES + 1,
            )
            for n, (server, (purchases, relay)) in enumerate(zip(servers, found.values(), strict=True))
        ]
        yield Chain(cells, consumer, analytics, analytics_url, rabbitmq)


def _write(file: Path, addresses: dict[str, tuple[str, str]]) -> None:
    """Each cell has as many branches as the load sells in. Processes follow the file."""
    fresh = file.with_suffix(".new")
    fresh.write_text(
        "".join(
            f'[{name}]\nbranches = ["{n * BRANCHES + 1}-{(n + 1) * BRANCHES}"]\n'
            f'purchases = "{purchases}"\nrelay = "{relay}"\n'
            for n, (name, (purchases, relay)) in enumerate(addresses.items())
        )
    )
    fresh.replace(file)
