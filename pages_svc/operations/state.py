"""The state of the whole system at one moment; what cannot be asked is told in its place."""

import asyncio
import datetime
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple, TypeVar
from zoneinfo import ZoneInfo

from pages_svc.owner.figures import Reader, sum_of
from pages_svc.owner.period import DAY
from pages_svc.upstream.insides import Failed, IncompleteTill, Insides, Outbox, Proof, Quarantined
from pages_svc.upstream.remembered import Remembered
from pages_svc.upstream.sales import Marks, Sales, Totals
from pages_svc.upstream.services import Problem
from pages_svc.upstream.watch import Watch

STATUS_LASTS_S = 0.4
LISTS_LAST_S = 3.0
TILLS_LAST_S = 30.0  # what is missing for a day, and looks into each till's journal
RATE_OVER_S = 30.0
PATIENCE_S = 1.0  # this page is opened when something is stuck, and shows what is not

T = TypeVar("T")


class Rate:
    """How fast a count grows: over the last half minute, or since it was looked at."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, datetime.date, int]] = deque()

    def of(self, day: datetime.date, count: int) -> float | None:
        """A second; None until it was looked at twice."""
        now = time.monotonic()
        if self._seen and (self._seen[-1][1] != day or count < self._seen[-1][2]):
            self._seen.clear()
        self._seen.append((now, day, count))
        while len(self._seen) > 2 and now - self._seen[1][0] > RATE_OVER_S:
            self._seen.popleft()
        since, _, before = self._seen[0]
        return (count - before) / (now - since) if now - since > 1 else None


class Group(NamedTuple):
    """Events with the same reason; one of them is shown."""

    reason: str
    size: int
    example: Failed | Quarantined


class State(NamedTuple):
    """What the page shows."""

    now: datetime.datetime
    today: datetime.date
    zone: ZoneInfo
    recorded: Totals | Problem  # today
    recorded_rate: float | None
    counted: Totals | None  # today; None while nothing is followed
    counted_rate: float | None
    outbox: Outbox | Problem
    marks: Marks
    watch_problem: Problem | None
    proof: Proof | Problem
    failed: list[Group] | Problem
    quarantined: list[Group] | Problem
    tills: tuple[list[IncompleteTill], int] | Problem  # some, and how many there are

    @property
    def between(self) -> int | None:
        """Sales of today that were published, or are about to be, and are not counted yet."""
        if isinstance(self.recorded, Problem) or isinstance(self.outbox, Problem) or self.counted is None:
            return None
        return max(self.recorded.purchase_count - self.counted.purchase_count - self.outbox.waiting, 0)

    @property
    def may_act(self) -> bool:
        return not (isinstance(self.outbox, Problem) and self.outbox.refused)


class StateReader:
    """Reads it; many who look ask once."""

    def __init__(self, sales: Sales, insides: Insides, reader: Reader, watch: Watch) -> None:
        self._sales, self._insides, self._reader, self._watch = sales, insides, reader, watch
        self._remembered = Remembered()
        self._recorded_rate, self._counted_rate = Rate(), Rate()

    async def state(self) -> State:
        """Raises Problem: not even the chain's zone can be had."""
        now = datetime.datetime.now(datetime.UTC)
        zone = (await self._reader.calendar()).zone
        today = now.astimezone(zone).date()
        recorded, outbox, proof, failed, quarantined, tills = await asyncio.gather(
            self._ask("recorded", lambda: self._sales.recorded_until(now + DAY, today, None), LISTS_LAST_S),
            self._ask("outbox", self._insides.outbox, STATUS_LASTS_S),
            self._ask("proof", self._insides.proof, LISTS_LAST_S),
            self._ask("failed", self._insides.failed, LISTS_LAST_S),
            self._ask("quarantined", self._insides.quarantined, LISTS_LAST_S),
            self._ask("tills", self._insides.incomplete_tills, TILLS_LAST_S),
        )
        rows = self._watch.between(today, today, None)
        counted = sum_of(rows) if rows is not None else None
        return State(
            now,
            today,
            zone,
            recorded,
            None if isinstance(recorded, Problem) else self._recorded_rate.of(today, recorded.purchase_count),
            counted,
            None if counted is None else self._counted_rate.of(today, counted.purchase_count),
            outbox,
            self._watch.marks,
            self._watch.problem,
            proof,
            failed if isinstance(failed, Problem) else grouped(failed),
            quarantined if isinstance(quarantined, Problem) else grouped(quarantined),
            tills,
        )

    def forget(self) -> None:
        """Something was done: the next look sees what has become of it."""
        self._remembered.clear()

    async def _ask(self, key: str, ask: Callable[[], Awaitable[T]], lasts_s: float) -> T | Problem:
        try:
            return await self._remembered.get(key, lasts_s, ask, patience_s=PATIENCE_S)
        except Problem as problem:
            return problem
        except TimeoutError:
            return Problem("There is no answer yet.", "This page shows it when it comes.")


def grouped(events: Iterable[Failed] | Iterable[Quarantined]) -> list[Group]:
    """By reason, the most frequent first."""
    groups: dict[str, list[Failed | Quarantined]] = {}
    for event in events:
        groups.setdefault(event.reason, []).append(event)
    found = [Group(reason, len(listed), listed[0]) for reason, listed in groups.items()]
    return sorted(found, key=lambda it: (-it.size, it.reason))
