"""Whether anybody stops everybody: tills sell at a steady pace while one caller, row or connection misbehaves."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from deploy.local.machine import Process, StackError, spawn, tail
from tests.bench import stage
from tests.bench.figures import Goal, Outcome, Plan, Score, percentile
from tests.bench.isolation import certificates
from tests.bench.isolation.attacks import ATTACKS, KNOWN
from tests.bench.isolation.victims import TILLS
from tests.bench.show import Show

DATABASE = "purchases"
RATIO_MAX = 3.0  # of the victims' p99, beside the same tills left alone just before
SETTLE_S = 30.0
WARM_UP_S = 1.0


class Seen(NamedTuple):
    """What the tills saw."""

    sales: int
    p50_ms: float
    p99_ms: float
    failed: dict[str, int]


def run(plan: Plan, show: Show) -> Outcome:
    with stage.temporary_directory() as directory, stage.private_postgres(directory) as server:
        show.say("Starting a private PostgreSQL and the purchases service …")
        url = stage.migrated(server, DATABASE, "purchases_svc")
        settings = {"PURCHASES_DATABASE_URL": url, "PURCHASES_OUTBOX_MAX": "0", "LOG_LEVEL": "ERROR"}
        known = certificates.make(directory / "certificates", TILLS)
        figures: dict[str, dict[str, float]] = {}
        raw: dict[str, list[dict[str, Any]]] = {}
        for name in plan.attacks or ATTACKS:
            whose = known if name in KNOWN else {}
            rounds: list[tuple[Seen, Seen]] = []
            peak_mib = 0.0
            for _ in range(plan.rounds):
                # A service of its own for each: what an attack leaves behind is not the next one's.
                with stage.service("purchases", ("purchases_svc", "serve"), settings | whose, directory) as service:
                    sell(service.address, WARM_UP_S, directory, whose)
                    alone = sell(service.address, plan.measure_s, directory, whose)
                    with attacking(name, service.address, url, directory, whose):
                        attacked = sell(service.address, plan.measure_s, directory, whose)
                    peak_mib = max(peak_mib, peak_memory_mib(service.process.pid))
                rounds.append((alone, attacked))
            figures[name] = {
                "p99_ratio": statistics.median(attacked.p99_ms / alone.p99_ms for alone, attacked in rounds),
                "failed": float(sum(sum(attacked.failed.values()) for _, attacked in rounds)),
                "memory_peak_mib": peak_mib,
            }
            raw[name] = [{"alone": alone._asdict(), "attacked": attacked._asdict()} for alone, attacked in rounds]
            show.say(f"{name}: {as_words(figures[name], rounds)}")
    lines = [
        [
            name.replace("_", " "),
            f"{found['p99_ratio']:.2f}",
            f"{found['failed']:.0f}",
            f"{found['memory_peak_mib']:.0f}",
            "yes" if found["p99_ratio"] <= RATIO_MAX and not found["failed"] else "no",
        ]
        for name, found in figures.items()
    ]
    show.table("The others, while", ["", "p99 beside alone", "failed", "peak MiB", "as promised"], lines)
    seen = [
        Score(found["p99_ratio"], Goal(f"others' p99 beside alone: {name.replace('_', ' ')}", RATIO_MAX, False))
        for name, found in figures.items()
    ]
    return Outcome({"isolation": figures}, {"rounds": raw}, scores=seen)


def as_words(found: dict[str, float], rounds: list[tuple[Seen, Seen]]) -> str:
    alone, attacked = (statistics.median(each[n].p99_ms for each in rounds) for n in (0, 1))
    return f"p99 {alone:.1f} → {attacked:.1f} ms, {found['failed']:.0f} failed"


def sell(address: str, seconds: float, directory: Path, whose: Mapping[str, str]) -> Seen:
    log = directory / "victims.log"
    with log.open("wb") as errors:
        ended = subprocess.run(
            [sys.executable, "-m", "tests.bench.isolation.victims", address, str(seconds)],
            cwd=stage.ROOT,
            env={**os.environ, **whose},
            stdout=subprocess.PIPE,
            stderr=errors,
            timeout=seconds + SETTLE_S,
            check=False,
        )
    if ended.returncode:
        raise StackError(f"the tills failed:\n{tail(log)}")
    found = json.loads(ended.stdout)
    times = found["ms"]
    return Seen(len(times), percentile(times, 50), percentile(times, 99), found["failed"])


@contextmanager
def attacking(name: str, address: str, url: str, directory: Path, whose: Mapping[str, str]) -> Iterator[None]:
    log = directory / f"{name}.log"
    command = [sys.executable, "-m", "tests.bench.isolation.attacks", name, address, url]
    attacker: Process = spawn(command, {**os.environ, **whose}, stage.ROOT, log)
    try:
        sell(address, WARM_UP_S, directory, whose)  # while it begins
        if not attacker.alive:
            raise StackError(f"the attack {name} failed:\n{tail(log)}")
        yield
        if not attacker.alive:
            raise StackError(f"the attack {name} ended:\n{tail(log)}")
    finally:
        attacker.end(patience_s=SETTLE_S)


def peak_memory_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024
