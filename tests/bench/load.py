"""The load on a gRPC server of ours, made by a process of its own (`load_client.py`), so that it is no cost of ours."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from typing import NamedTuple

from deploy.local.machine import StackError, tail
from tests.bench.stage import ROOT

STOP_TIMEOUT_S = 10.0


class Job(NamedTuple):
    """What the client is told to do."""

    method: str  # create, stream or upload
    at_once: (
        int  # calls in flight, sales on their way on one stream, or streams of a backlog; with a rate, the most of them
    )
    measure_s: float
    per_s: float = 0.0  # the rate of the calls; 0: each client sends as soon as it has its answer
    probe: bool = False  # whether to watch, beside the load, how soon sales are visible
    journal: bool = False  # whether calls say where their sale stands in its till's journal
    first_branch: int = 1  # of those in which sales are made


class Load(NamedTuple):
    """What the client saw in the measured time."""

    purchases: int
    seconds: float
    p50_ms: float  # from sending a call or message (with a rate: from when it was due) to its answer
    p99_ms: float
    # The probes' figures, in ascending order.
    visible_ms: Sequence[float] = ()  # from the answer to a sale to its being seen in ListDailySales
    lag_ms: Sequence[float] = ()  # how far complete_through_time lay back in those answers


class LoadClient:
    """The client's process, as the benchmark sees it."""

    def __init__(self, process: "Popen[str]", log: Path) -> None:
        self._process, self._log = process, log
        self.pid = process.pid

    def run(self, job: Job, at_the_edges: Callable[[], None]) -> Load:
        """Do the job; `at_the_edges` is called when the measured time begins and when it ends.

        Raises:
            StackError: an answer was not OK, or not what it should be.
        """
        assert self._process.stdin
        print(json.dumps(job), file=self._process.stdin, flush=True)
        for edge in ("begin", "end"):
            self._expect(edge)
            at_the_edges()
        return Load(*json.loads(self._expect()))

    def _expect(self, expected: str | None = None) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline().strip()
        if not line or expected not in (None, line):
            self._process.kill()
            self._process.wait()
            raise StackError(f"the load client failed:\n{tail(self._log)}")
        return line


@contextmanager
def load_client(
    address: str, directory: Path, analytics_address: str = "", identity: Mapping[str, str] | None = None
) -> Iterator[LoadClient]:
    """A client of the server at `address`, whose probes ask the other one; it leaves when its standard input ends.
    `identity`: the settings of its certificate, which is that of a till of branch 1, POS-3."""
    log = directory / f"load_client{'_with_certificates' if identity else ''}.log"
    with log.open("wb") as errors:
        process = Popen(
            [sys.executable, "-m", "tests.bench.load_client", address, analytics_address],
            cwd=ROOT,
            env={**os.environ, **(identity or {})},
            stdin=PIPE,
            stdout=PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # Ctrl-C reaches us alone, and we end it
        )
    try:
        yield LoadClient(process, log)
    finally:
        process.kill()  # nothing of it needs to be kept
        process.wait(STOP_TIMEOUT_S)
