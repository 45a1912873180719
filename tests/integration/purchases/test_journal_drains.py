"""Sales are made while a journal is being sent, and everything that can go wrong does, by a seed: 0 lost, 0 doubled.

    DRAIN_SEEDS=2500 DRAIN_SEED=5000 make test ARGS='tests/integration/purchases/test_journal_drains.py'

All seeds share one service, each with a branch of its own.
"""

import asyncio
import itertools
import os
import random
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import psycopg
import pytest

from pos.client import Item, PosClient, Reported, TillReport, connect
from pos.errors import OutcomeUnknown, Status
from pos.journal import Journal, JournalError, Receipt
from tests.conftest import WAIT_S
from tests.integration.processes import Processes
from tests.sizes import how_many

SEEDS, FIRST_SEED = how_many("DRAIN_SEEDS"), int(os.environ.get("DRAIN_SEED", "0"))
AT_ONCE = 8
STARTS = 3  # of each till
POS = "POS-3"
# Of the till's disk: memory, where there is such a one, as thousands of syncs of one disk prove nothing more.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Shaky:
    """A client whose calls end at any moment, also between an answer and its being noted."""

    def __init__(self, client: PosClient, rng: random.Random) -> None:
        self._client, self._rng = client, rng

    def report_till(self, report: TillReport, *, within_s: float) -> Reported:
        reported = self._client.report_till(report, within_s=within_s)
        if self._rng.random() < 0.2:
            raise OutcomeUnknown(Status(grpc.StatusCode.UNAVAILABLE, "the line was cut"))
        return reported

    def upload_purchases(self, sales: object, **options: object) -> Iterator[object]:
        left = self._rng.randrange(1, 40)
        for uploaded in self._client.upload_purchases(sales, **options):  # type: ignore[arg-type]
            left -= 1
            if not left:
                raise OutcomeUnknown(Status(grpc.StatusCode.UNAVAILABLE, "the line was cut"))
            yield uploaded


class Till:
    """A till with a journal, and the receipts that it gave out. It is closed at any moment, whatever is under way."""

    def __init__(self, directory: Path, branch: int, client: PosClient, rng: random.Random) -> None:
        self._directory, self._branch, self._client, self._rng = directory, branch, client, rng
        self.receipts: list[Receipt] = []

    def opened(self) -> Journal:
        return Journal(self._directory, branch_id=self._branch, pos_id=POS)

    def run(self) -> None:
        """Started, sells while two flush, ends; some times over. At last all is sent."""
        for _ in range(STARTS):
            rng = self._rng
            journal = self.opened()
            self._sell(journal, rng.randrange(20), rng.randrange(1 << 30))
            at_work = [
                threading.Thread(target=self._sell, args=(journal, rng.randrange(20), rng.randrange(1 << 30))),
                *(threading.Thread(target=self._flush, args=(journal, rng.randrange(1 << 30))) for _ in range(2)),
            ]
            for thread in at_work:
                thread.start()
            if rng.random() < 0.3:
                at_work[rng.randrange(3)].join(rng.random() * 0.02)
                journal.close()
            for thread in at_work:
                thread.join()
            journal.close()
        with self.opened() as journal:
            flushed = journal.flush(self._client, within_s=WAIT_S)
            assert (flushed.waiting, flushed.refused, flushed.trouble) == (0, 0, None)
            assert journal.verify() == []
            journal._reporter._next_at = 0.0
            journal.flush(self._client, within_s=WAIT_S)

    def _sell(self, journal: Journal, count: int, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(count):
            basket = [Item(product, chance.randrange(1, 5000)) for product in range(1, chance.randrange(2, 5))]
            try:
                self.receipts.append(journal.record_sale(basket, cashier_id=17))
            except JournalError:
                return  # closed: no receipt

    def _flush(self, journal: Journal, seed: int) -> None:
        with suppress(JournalError):
            journal.flush(Shaky(self._client, random.Random(seed)), within_s=WAIT_S)  # type: ignore[arg-type]


@pytest.fixture
def service(purchases_db: str, tmp_path: Path) -> Iterator[str]:
    """The address of a purchases service in a process of its own."""
    processes = Processes(purchases_db, purchases_db, "amqp://nowhere", tmp_path)
    processes.start("purchases")
    processes.wait_ready("purchases")
    yield processes.address["purchases"]
    processes.end_all()


@pytest.mark.timeout(300 + SEEDS)
async def test_sales_during_the_drain(service: str, purchases_db: str) -> None:
    """Sold while others are sent, over lines that are cut, by two that flush; the till is closed in the midst of it and
    started again.
    """
    numbers = itertools.count(1)
    own = threading.local()  # a channel and a connection for each thread
    with ExitStack() as opened, ThreadPoolExecutor(AT_ONCE) as threads:

        def one(seed: int) -> None:
            if not hasattr(own, "client"):
                own.client = PosClient(opened.enter_context(connect(service)))
                own.database = opened.enter_context(psycopg.connect(purchases_db, autocommit=True))
            try:
                drain(next(numbers), seed, own.client, own.database)
            except Exception as error:
                error.add_note(f"seed {seed}")
                raise

        loop = asyncio.get_running_loop()
        seeds = range(FIRST_SEED, FIRST_SEED + SEEDS)
        try:
            await asyncio.gather(*(loop.run_in_executor(threads, one, seed) for seed in seeds))
        finally:
            threads.shutdown(wait=False, cancel_futures=True)  # the first that fails is enough


def drain(branch: int, seed: int, client: PosClient, database: psycopg.Connection) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        till = Till(Path(directory), branch, client, random.Random(seed))
        till.run()
    given = {each.sale.idempotency_key: (each.receipt_id, each.sale.total_cents) for each in till.receipts}
    assert len({receipt_id for receipt_id, _ in given.values()}) == len(till.receipts)
    rows = database.execute(
        "SELECT idempotency_key::text, receipt_id, (100 * total_amount)::bigint FROM purchases WHERE branch_id = %s",
        [branch],
    ).fetchall()
    assert len(rows) == len(given)
    assert {key: (receipt_id, cents) for key, receipt_id, cents in rows} == given
    for state in client.till_states(branch, POS):
        assert (state.highest_sequence, state.missing_count, state.conflict_count) == (len(given), 0, 0)
