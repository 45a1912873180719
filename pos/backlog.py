"""A backlog on its way: uploads a list of sales in the background, some of them twice, as `pos.tills` does."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self

from chassis.tls import Broken
from pos.client import PosClient, Recorded, Sale
from pos.errors import PosError
from pos.lines import Identities, Lines
from pos.tills import Repetition, SaleFailed, check_same, repeats


class Backlog:
    """Uploads sales while the block runs; leaving it early stops at once.

    The counters may be read at any time, and mean what those of `Tills` mean.
    """

    def __init__(self, sales: Sequence[Sale], target: str, *, seed: int, identities: Identities = Identities()) -> None:
        """`seed` decides which sales are sent twice. Tills with certificates send their own, one after the other."""
        self.recorded = 0
        self.replayed = 0
        self.duplicates_sent = 0
        self.trouble: PosError | None = None
        self._sales, self._seed = sales, seed
        self._first_answers: dict[str, Recorded] = {}  # to sales that are sent twice, by key
        self._stop = threading.Event()
        self._lines = Lines(target, identities, shared=1, pause=self._pause)
        self._by_till = identities.tills is not None
        self._thread = ThreadPoolExecutor(1, "backlog")
        self._work: Future[None] = Future()

    def __enter__(self) -> Self:
        self._work = self._thread.submit(self._send_all)
        return self

    def wait(self, timeout_s: float) -> bool:
        """Wait until all sales are sent, `timeout_s` at most; True when they are.

        Raises:
            SaleFailed: one of them was not stored, or nobody knows.
        """
        if wait([self._work], timeout_s).done:
            self._work.result()
            return True
        return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._lines.close()  # ends the upload
        self._thread.shutdown(cancel_futures=True)

    def _send_all(self) -> None:
        for sales in self._parts():
            try:
                client = self._lines.of(sales[0])
            except Broken as error:
                raise SaleFailed(sales[0], str(error)) from error
            self._upload(client, self._with_twins(sales))
            self._upload(client, (sale for sale in sales if repeats(sale, self._seed) is Repetition.AGAIN))

    def _parts(self) -> Iterable[Sequence[Sale]]:
        """What one client may send."""
        if not self._by_till:
            return [self._sales] if self._sales else []
        parts: dict[tuple[int, str], list[Sale]] = {}
        for sale in self._sales:
            parts.setdefault((sale.branch_id, sale.pos_id), []).append(sale)
        return parts.values()

    def _with_twins(self, sales: Sequence[Sale]) -> Iterator[Sale]:
        for sale in sales:
            yield sale
            if repeats(sale, self._seed) is Repetition.AT_ONCE:
                yield sale

    def _upload(self, client: PosClient, sales: Iterable[Sale]) -> None:
        for sale, outcome in client.upload_purchases(sales, register_customers=True):
            if isinstance(outcome, PosError):
                raise SaleFailed(sale, str(outcome)) from outcome
            self.trouble = None
            self._note(sale, outcome)

    def _note(self, sale: Sale, answer: Recorded) -> None:
        first = self._first_answers.pop(sale.idempotency_key, None)
        if first:
            check_same(sale, first, answer)
            self.duplicates_sent += 1
            self.replayed += first.replayed and answer.replayed
            return
        self.recorded += 1
        if repeats(sale, self._seed):
            self._first_answers[sale.idempotency_key] = answer
        else:
            self.replayed += answer.replayed

    def _pause(self, pause_s: float, why: PosError) -> None:
        self.trouble = why
        if self._stop.wait(pause_s):
            raise why
