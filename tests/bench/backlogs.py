"""A hundred tills come back at once, with what they sold in seven days: do those that sell meanwhile notice?

    .venv/bin/python -m deploy.local start
    .venv/bin/python -m tests.bench.backlogs [TILLS] [SALES_OF_EACH]

Each till has a journal of its own on the disk, written before. Four tills sell by calls, one sale after the other, for
five seconds alone, and then as long as the backlogs are under way. At the end every sale must be stored, once.
"""

import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pos.client import Item, PosClient, Sale, connect
from pos.journal import Journal
from pos.settings import Settings

BRANCH = 1_000_000 + int(time.time()) % 1_000_000_000  # of this run, so that its sums are those of nobody else
LIVE, ALONE_S, WITHIN_S = 4, 5.0, 200.0
BASKET = [Item(1001 + n, 250) for n in range(5)]


def main(tills: int, sales: int) -> None:
    target = Settings().purchases_target
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(32) as threads:
        journals = list(threads.map(lambda n: _backlog(Path(directory) / str(n), n, sales), range(tills)))
        print(f"{tills} tills have {sales} sales each on their disks")
        live = _Live(target)
        live.sell(ALONE_S)
        print(f"live tills alone:              {live}")
        drained, started = threading.Event(), time.monotonic()
        seller = threading.Thread(target=live.sell, args=(WITHIN_S, drained))
        seller.start()
        with ThreadPoolExecutor(tills) as at_once:
            flushed = list(at_once.map(lambda journal: _flush(target, journal), journals))
        seconds = time.monotonic() - started
        drained.set()
        seller.join()
        print(f"live tills beside the backlog: {live}")
        print(f"backlog: {sum(flushed):,} sales in {seconds:.1f} s, {sum(flushed) / seconds:,.0f} a second")
        with connect(target) as channel:
            client = PosClient(channel)
            stored = sum(row.purchase_count for row in client.list_control_totals(branch_ids=[BRANCH]))
            missing = sum(state.missing_count for n in range(tills) for state in client.till_states(BRANCH, f"POS-{n}"))
        print(f"stored: {stored:,} of {tills * sales + live.sold:,}; missing by the tills' own numbers: {missing}")
        sys.exit(0 if stored == tills * sales + live.sold and not missing else 1)


def _backlog(directory: Path, number: int, sales: int) -> Journal:
    journal = Journal(directory, branch_id=BRANCH, pos_id=f"POS-{number}")
    begin = datetime.now(UTC) - timedelta(days=7)
    for n in range(sales):
        journal.record_sale(BASKET, cashier_id=1, purchase_time=begin + n * timedelta(days=7) / sales)
    return journal


def _flush(target: str, journal: Journal) -> int:
    with connect(target) as channel, journal:
        client, stored = PosClient(channel), 0
        until = time.monotonic() + WITHIN_S
        while time.monotonic() < until:
            flushed = journal.flush(client, within_s=until - time.monotonic())
            stored += flushed.stored
            if not flushed.waiting:
                break
        journal._reporter._next_at = 0.0  # what was given out is told once more, as minutes later
        journal.flush(client, within_s=10)
        return stored


class _Live:
    """Tills where customers wait."""

    def __init__(self, target: str) -> None:
        self.sold, self._target, self._took_s = 0, target, list[float]()

    def sell(self, seconds: float, until: threading.Event | None = None) -> None:
        self._took_s = []
        ends = time.monotonic() + seconds
        with ThreadPoolExecutor(LIVE) as threads:
            for took in threads.map(lambda n: self._till(n, ends, until or threading.Event()), range(LIVE)):
                self._took_s += took
        self.sold += len(self._took_s)

    def _till(self, number: int, ends: float, until: threading.Event) -> Sequence[float]:
        took = []
        with connect(self._target) as channel:
            client = PosClient(channel)
            while time.monotonic() < ends and not until.is_set():
                receipt = f"{number}-{time.time_ns()}-live"
                sale = Sale(receipt_id=receipt, branch_id=BRANCH, cashier_id=1, pos_id=f"LIVE-{number}", items=BASKET)
                started = time.perf_counter()
                client.create_purchase(sale)
                took.append(time.perf_counter() - started)
                until.wait(0.05)
        return took

    def __str__(self) -> str:
        took_ms = sorted(1000 * each for each in self._took_s)
        half, most = (took_ms[int(share * (len(took_ms) - 1))] for share in (0.5, 0.99))
        return f"{len(took_ms):,} sales, p50 {half:.0f} ms, p99 {most:.0f} ms, most {took_ms[-1]:.0f} ms"


if __name__ == "__main__":
    main(*map(int, (*sys.argv[1:], *("100", "70")[len(sys.argv) - 1 :])))
