"""`python -m tests.bench.capacity REPORT`: what chains of some sizes need, by the report of `make bench`, as a table.

It multiplies what a purchase cost there, process by process, and knows nothing else: not how a network, more cores or
another disk behave. So it says how many of which a chain has to have at least, and is no measurement of such a chain.
"""

import json
import sys
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tests.bench.history import BYTES_PER_PURCHASE
from tests.bench.pipeline.whole import CONNECTIONS, KEPT_UP_MIN, LOAD

STEPS = ((100, 500), (400, 2_000), (1_000, 5_000), (2_000, 10_000), (5_000, 25_000), (10_000, 50_000))
BUSY = 0.5  # of the cores, at the chain's peak: the other half is for what comes back after an outage
CORES = 16  # of a cell's PostgreSQL server; a cell is as large as that bears
CORES_OF_READ_MODELS = 64  # of the one server that has them: beyond that there is no larger one to count on
PEAK_HOURS = 6  # of a day's sales, if all of it were sold as fast as at the peak
NODES = 3  # of the broker, each of which has every message

RECORDING, RELAYING, COUNTING = CONNECTIONS.values()
REST = "PostgreSQL, the rest"


class Need(NamedTuple):
    """What a chain with so many sales at its peak needs; cores are those of the report's machine."""

    branches: int
    sales_per_s: int
    cells: int
    cell_cores: float  # of each cell's PostgreSQL
    purchases_cores: float
    relay_cores: float
    consumer_cores: float
    read_models_cores: float
    broker_node_cores: float
    cell_disk_tb: float  # a year, of each cell

    @property
    def within(self) -> bool:
        """Whether one server can have the read models."""
        return self.read_models_cores <= CORES_OF_READ_MODELS


def costs(report: Mapping[str, Any]) -> dict[str, float]:
    """CPU µs a purchase, by process, at the highest steady rate of each round."""
    rounds = []
    for each in report["details"]["pipeline"]["whole"]:
        sustained = [
            trial
            for trial in each["trials"]
            if min(trial["recorded_per_s"], trial["counted_per_s"]) >= KEPT_UP_MIN * trial["asked_per_s"]
        ]
        rounds.append(max(sustained, key=lambda trial: trial["recorded_per_s"])["cpu_us"])
    return {name: median(each[name] for each in rounds) for name in rounds[0] if name != LOAD}


def need(branches: int, sales_per_s: int, us: Mapping[str, float]) -> Need:
    def cores(cost_us: float) -> float:
        return sales_per_s * cost_us / 1e6 / BUSY

    # Checkpoints and WAL are of what is written; as much of that for the cells as for the read models.
    cell_us = us[RECORDING] + us[RELAYING] + us[REST] / 2
    cells = ceil(cores(cell_us) / CORES)
    a_year = sales_per_s / cells * 3_600 * PEAK_HOURS * 365
    return Need(
        branches,
        sales_per_s,
        cells,
        cores(cell_us) / cells,
        cores(us["purchases"]),
        cores(us["relay"]),
        cores(us["consumer"]),
        cores(us[COUNTING] + us[REST] / 2),
        cores(us["RabbitMQ"]),
        a_year * BYTES_PER_PURCHASE / 1e12,
    )


def table(report: Mapping[str, Any]) -> str:
    us = costs(report)
    lines = [
        "| branches | sales/s at the peak | cells | PostgreSQL of a cell | purchases services | relays | consumers"
        " | PostgreSQL of the read models | each broker node | disk of a cell |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for each in (need(*step, us) for step in STEPS):
        figures = [f"{each.branches:,}", f"{each.sales_per_s:,}", f"{each.cells:,}", f"{each.cell_cores:,.1f} cores"]
        # A process is one event loop, so it has one core; two of each, at least, as one is replaced at a time.
        shared = (each.purchases_cores, 2 * each.cells), (each.relay_cores, 2 * each.cells), (each.consumer_cores, 2)
        figures += [f"{max(ceil(cores), least):,}" for cores, least in shared]
        figures += [
            f"{each.read_models_cores:,.0f} cores" if each.within else f"**{each.read_models_cores:,.0f} cores**"
        ]
        figures += [f"{each.broker_node_cores:,.1f} cores", f"{each.cell_disk_tb:,.1f} TB a year"]
        lines.append(f"| {' | '.join(figures)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__.partition("\n")[0], file=sys.stderr)
        return 2
    try:
        report = json.loads(Path(arguments[0]).read_text())
        made = table(report)
    except (OSError, ValueError, KeyError) as error:
        print(f"{arguments[0]}: no report of `make bench` with its pipeline part: {error!r}", file=sys.stderr)
        return 1
    machine, us = report["details"]["machine"], costs(report)
    print(f"{machine['cores']} cores of {machine['processor']}; CPU µs a purchase there:")
    print(", ".join(f"{name} {cost:,.0f}" for name, cost in us.items()))
    print(f"\n{made}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
