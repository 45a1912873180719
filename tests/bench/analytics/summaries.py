"""Many summaries at once, all different, while sales are counted; beside an echo that does one SELECT a call."""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from deploy.local.machine import StackError, tail
from tests.bench import stage
from tests.bench.analytics.asking import History
from tests.bench.analytics.questions import SERVICE
from tests.bench.show import Show

IN_FLIGHT, EVENTS_PER_S = 64, 500
START_TIMEOUT_S = 60.0
ECHO, SUMMARY = "an echo with one SELECT", "GetSalesSummary"


class Load(NamedTuple):
    """What the client saw."""

    calls_per_s: float
    p50_ms: float
    p99_ms: float


def measure_summaries(
    history: History, requests: Sequence[bytes], rounds: int, measure_s: int, directory: Path, show: Show
) -> tuple[dict[str, list[Load]], float]:
    """Both in turn, after a round that does not count; and how many sales were counted in a second meanwhile."""
    settings = {"ANALYTICS_DATABASE_URL": history.url}
    fed: list[float] = []
    with (
        stage.service("echo", ("tests.bench.analytics.echo_server",), settings, directory) as echo,
        feeding(history.url, directory, fed),
    ):
        contenders = {
            ECHO: partial(call, echo.address, "/Echo/Echo", requests, measure_s),
            SUMMARY: partial(call, history.address, SERVICE + SUMMARY, requests, measure_s),
        }
        loads = show.in_turn(contenders, rounds, f"{IN_FLIGHT} summaries at once")
    return loads, fed[0]


def call(address: str, method: str, requests: Sequence[bytes], measure_s: int) -> Load:
    """The load comes from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.analytics.query_client", address, method, str(IN_FLIGHT), str(measure_s)],
        input="\n".join(base64.b64encode(request).decode() for request in requests),
        cwd=stage.ROOT,
        capture_output=True,
        text=True,
        timeout=measure_s + START_TIMEOUT_S,
        check=False,
        start_new_session=True,  # Ctrl-C reaches us alone, and we end it
    )
    if done.returncode:
        raise StackError(f"the load on {method} failed:\n{done.stderr[-2_000:]}")
    return Load(*json.loads(done.stdout))


@contextmanager
def feeding(url: str, directory: Path, fed: list[float]) -> Iterator[None]:
    """Sales are counted while the block lasts; afterwards `fed` has how many in a second."""
    log = directory / "feeder.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.analytics.feeder", url, str(EVENTS_PER_S)],
            cwd=stage.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    try:
        assert process.stdout
        if not process.stdout.readline():
            raise StackError(f"no sales are counted:\n{tail(log)}")
        yield
        counted, _ = process.communicate(timeout=START_TIMEOUT_S)  # closes its stdin
        if process.returncode:
            raise StackError(f"no more sales were counted:\n{tail(log)}")
        sales, seconds = json.loads(counted)
        fed.append(sales / seconds)
    finally:
        process.kill()
        process.wait()
