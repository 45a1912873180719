"""A hundred tills come back at once, with what they sold in seven days: do those that sell meanwhile notice?

    .venv/bin/python -m deploy.local start
    .venv/bin/python -m tests.bench.backlogs [TILLS] [SALES_OF_EACH]

Each till has a journal of its own on the disk, written before. Four tills sell by calls, one sale after the other, for
some seconds alone, and then as long as the backlogs are under way; they are a process of their own, as what they wait
for is the service, and not the threads of a hundred others. At the end every sale must be stored, once.
"""

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

from chassis.settings import load
from pos.client import Item, PosClient, Sale, connect
from pos.journal import Journal
from pos.settings import Settings
from tests.bench.figures import percentile

BRANCH = 1_000_000 + int(time.time()) % 1_000_000_000  # of this run, so that its sums are those of nobody else
LIVE, ALONE_S, WITHIN_S = 4, 10.0, 200.0
BASKET = [Item(1001 + n, 250) for n in range(5)]


def main(tills: int, sales: int) -> None:
    target = load(Settings).purchases_target
    with (
        tempfile.TemporaryDirectory() as directory,
        ThreadPoolExecutor(32) as threads,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as live,
    ):
        journals = list(threads.map(lambda n: _backlog(Path(directory) / str(n), n, sales), range(tills)))
        print(f"{tills} tills have {sales} sales each on their disks")
        drained = Path(directory) / "drained"
        alone = live.submit(sell, target, BRANCH, ALONE_S, drained).result()
        print(f"live tills alone:              {_said(alone)}")
        beside = live.submit(sell, target, BRANCH, WITHIN_S, drained)
        started = time.monotonic()
        with ThreadPoolExecutor(tills) as at_once:
            drains = list(at_once.map(lambda journal: _drain(target, journal, started), journals))
        drained.touch()
        print(f"live tills beside the backlog: {_said(beside.result())}")
        flushed, seconds = sum(stored for stored, _ in drains), [took for _, took in drains]
        print(
            f"backlog: {flushed:,} sales in {max(seconds):.1f} s, {flushed / max(seconds):,.0f} a second; "
            f"a till was through after {statistics.median(seconds):.1f} s"
        )
        sold = len(alone) + len(beside.result())
        with connect(target) as channel:
            client = PosClient(channel)
            stored = sum(row.purchase_count for row in client.list_control_totals(branch_ids=[BRANCH]))
            missing = sum(state.missing_count for n in range(tills) for state in client.till_states(BRANCH, f"POS-{n}"))
        print(f"stored: {stored:,} of {tills * sales + sold:,}; missing by the tills' own numbers: {missing}")
        sys.exit(0 if stored == tills * sales + sold and not missing else 1)


def _backlog(directory: Path, number: int, sales: int) -> Journal:
    journal = Journal(directory, branch_id=BRANCH, pos_id=f"POS-{number}")
    begin = datetime.now(UTC) - timedelta(days=7)
    for n in range(sales):
        journal.record_sale(BASKET, cashier_id=1, purchase_time=begin + n * timedelta(days=7) / sales)
    return journal


def _drain(target: str, journal: Journal, started: float) -> tuple[int, float]:
    """How many sales were stored, and after how many seconds all of them."""
    with connect(target) as channel, journal:
        client, stored = PosClient(channel), 0
        until = time.monotonic() + WITHIN_S
        while time.monotonic() < until:
            flushed = journal.flush(client, within_s=until - time.monotonic())
            stored += flushed.stored
            if not flushed.waiting:
                break
        seconds = time.monotonic() - started
        journal._reporter._next_at = 0.0  # what was given out is told once more, as minutes later
        journal.flush(client, within_s=10)
        return stored, seconds


def sell(target: str, branch: int, seconds: float, until: Path) -> list[float]:
    """Tills where customers wait: how many seconds each sale took."""
    ends = time.monotonic() + seconds
    with ThreadPoolExecutor(LIVE) as threads:
        return [
            took for each in threads.map(lambda n: _till(target, branch, n, ends, until), range(LIVE)) for took in each
        ]


def _till(target: str, branch: int, number: int, ends: float, until: Path) -> Sequence[float]:
    took = []
    with connect(target) as channel:
        client = PosClient(channel)
        while time.monotonic() < ends and not until.exists():
            receipt = f"{number}-{time.time_ns()}-live"
            sale = Sale(receipt_id=receipt, branch_id=branch, cashier_id=1, pos_id=f"LIVE-{number}", items=BASKET)
            started = time.perf_counter()
            client.create_purchase(sale)
            took.append(time.perf_counter() - started)
            time.sleep(0.05)
    return took


def _said(took_s: Sequence[float]) -> str:
    took_ms = sorted(1000 * each for each in took_s)
    half, most = (percentile(took_ms, share) for share in (50, 99))
    return f"{len(took_ms):,} sales, p50 {half:.0f} ms, p99 {most:.0f} ms, most {took_ms[-1]:.0f} ms"


if __name__ == "__main__":
    main(*map(int, (*sys.argv[1:], *("100", "70")[len(sys.argv) - 1 :])))
