"""What /proc tells: what a process and everything below it has cost, and what machine this is."""

import os
import platform
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """CPU time of a process and all below it, in seconds. What has ended counts too: its parent has reaped its time."""
    ticks, children = _processes()
    total, todo = 0, [pid]
    while todo:
        each = todo.pop()
        total += ticks.get(each, 0)
        todo += children[each]
    return total / TICKS_PER_S


def children_of(pid: int) -> list[int]:
    """Processes that a process has started, and that run."""
    return _processes()[1][pid]


def _processes() -> tuple[dict[int, int], dict[int, list[int]]]:
    """Of all processes: their CPU time in ticks, and their children."""
    ticks: dict[int, int] = {}
    children: dict[int, list[int]] = defaultdict(list)
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):  # it ended meanwhile
                # The command's name, in brackets, may hold anything: count from the last bracket.
                fields = Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(") ")[2].split()
                children[int(fields[1])].append(int(entry))
                ticks[int(entry)] = sum(map(int, fields[11:15]))  # its own and its reaped children's, user and system
    return ticks, children


class Meter:
    """CPU time that processes, and all below them, take from now on."""

    def __init__(self, pids: Mapping[str, Sequence[int]]) -> None:
        self._pids = pids
        self._before_s = self._read()

    def seconds(self) -> dict[str, float]:
        """By name, until now."""
        return {name: now - self._before_s[name] for name, now in self._read().items()}

    def us(self, events: int) -> dict[str, float]:
        """Microseconds an event, until now."""
        return {name: seconds / events * 1e6 for name, seconds in self.seconds().items()}

    def _read(self) -> dict[str, float]:
        return {name: sum(map(cpu_s, pids)) for name, pids in self._pids.items()}


def description() -> dict[str, Any]:
    """What a reader of the figures needs to know about the machine."""
    processor = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    memory_kib = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor or platform.machine(),
        "memory_gib": round(memory_kib / (1 << 20), 1),
        "kernel": platform.release(),
        "python": sys.version.split()[0],
        "load_before": os.getloadavg()[0],  # what others did on the machine when we began
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
