"""Sales that wait for a flush: whose turn it is, each key once, and what becomes of those that repeat one."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

from purchases_svc import answers
from purchases_svc.admission import Admission, Turns
from purchases_svc.answers import Outcome, Recorded
from purchases_svc.entry import Entry

BATCH_ITEMS_MAX = 4_000  # of a flush: everybody waits for it, so the biggest sales must not make it take seconds
EXPECTED_S = 1.0  # for so long after a sale, another one of its kind is expected at any moment
# While several callers send sales one by one, a flush has one of each, or so many in all, and of one caller no more
# than its share: those who are answered together keep all others waiting meanwhile, a third of a millisecond each.
LIVE_BESIDE_OTHERS, LIVE_OF_CALLER_BESIDE_OTHERS = 100, 16
# Meanwhile, of those that came many at once, so many: their flushes have other connections, and the same processors.
BULK_BESIDE_LIVE, BULK_ITEMS_BESIDE_LIVE = 20, 400


class Waiting:
    def __init__(self, admission: Admission, batch_max: int, come_back: Callable[[Entry], None]) -> None:
        """`come_back` takes a sale that gets its chance now, as the one before with its key is out of the way."""
        self._admission, self._batch_max, self._come_back = admission, batch_max, come_back
        self._live, self._bulk = Turns(), Turns()
        self._live_until = self._several_until = 0.0
        self._last_caller: str | None = None  # of a live sale
        self._on_their_way: dict[str, Entry] = {}  # by key

    @property
    def live_expected(self) -> bool:
        """Somebody at a till may bring a sale at any moment."""
        return asyncio.get_running_loop().time() < self._live_until

    def any(self, *, live: bool) -> bool:
        return bool(self._live if live else self._bulk)

    def put(self, entry: Entry) -> None:
        if not entry.came_alone:
            self._bulk.put(entry)
            return
        self._live.put(entry)
        self._live_until = asyncio.get_running_loop().time() + EXPECTED_S
        if entry.caller != self._last_caller:
            if self._last_caller is not None:
                self._several_until = self._live_until
            self._last_caller = entry.caller

    def next_batch(self, *, live: bool) -> list[Entry]:
        """The sales whose turn it is, each key once: what repeats a key that is on its way waits for its outcome.

        Those that came alone, or those that came many at once: the former do not wait for flushes of the latter.
        """
        now = asyncio.get_running_loop().time()
        if not live:
            if self.live_expected:
                return self._batch(self._bulk, BULK_BESIDE_LIVE, BULK_ITEMS_BESIDE_LIVE)
            return self._batch(self._bulk, self._batch_max, BATCH_ITEMS_MAX)
        if now < self._several_until or self._live.callers > 1:
            most = max(self._live.callers, LIVE_BESIDE_OTHERS)
            return self._batch(self._live, most, BATCH_ITEMS_MAX, LIVE_OF_CALLER_BESIDE_OTHERS)
        return self._batch(self._live, self._batch_max, BATCH_ITEMS_MAX)

    def _batch(self, waiting: Turns, sales_max: int, items_max: int, of_caller_max: int | None = None) -> list[Entry]:
        """At most so many sales, those that repeat a key among them: they are answered together with the others."""
        batch: list[Entry] = []
        items, left = 0, min(sales_max, self._batch_max)
        taken: Counter[str] = Counter()
        while waiting and left and items < items_max:
            if of_caller_max:
                if taken[waiting.next_caller] == of_caller_max:
                    break  # callers take turns: the others have had theirs
                taken[waiting.next_caller] += 1
            entry = waiting.take()
            left -= 1
            first = self._on_their_way.setdefault(entry.sale.idempotency_key, entry)
            if first is not entry:
                first.repeats.append(entry)
            elif entry.abandoned:  # before it was sent anywhere
                self.drop(entry)
            else:
                batch.append(entry)
                items += len(entry.sale.items)
        return batch

    def settle(self, entry: Entry, outcome: Outcome) -> None:
        """Answer a sale, and those that repeat its key: they share its outcome, unless they ask for something else and
        it was refused; then one of them gets its own chance.
        """
        entry.settle(outcome)
        self._leave(entry)
        repeats, entry.repeats = entry.repeats, []
        others = []
        for repeat in repeats:
            if isinstance(outcome, Recorded):
                self.settle(repeat, answers.replay(repeat.sale, outcome.purchase))
            elif _asks_for(repeat) == _asks_for(entry):
                self.settle(repeat, answers.for_one(outcome))
            else:
                others.append(repeat)
        self._pass_on(others)

    def fail(self, entries: Sequence[Entry], error: Exception) -> None:
        for entry in entries:
            self.settle(entry, answers.for_one(error))

    def drop(self, entry: Entry) -> None:
        """Forget a sale that was not sent; the next one with its key takes its place."""
        self._leave(entry)
        self._pass_on(entry.repeats)

    def _leave(self, entry: Entry) -> None:
        self._admission.leave(entry.caller, entry.sale)
        if self._on_their_way.get(entry.sale.idempotency_key) is entry:
            del self._on_their_way[entry.sale.idempotency_key]

    def _pass_on(self, repeats: list[Entry]) -> None:
        """The first of them gets its chance; the others wait for its outcome, besides those that do already."""
        if repeats:
            heir, *others = repeats
            heir.repeats += others
            self._come_back(heir)


def _asks_for(entry: Entry) -> tuple[object, ...]:
    return entry.sale.content(), entry.sale.register_customer
