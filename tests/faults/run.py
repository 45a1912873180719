"""One run: load, faults one after another and over each other, then silence, then the count.

A run is cut into rounds. Each ends with everything mended and everybody done, and must then be quiet and correct, so
that a finding is known to be of this round.
"""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from deploy.local.machine import StackError, wait_until
from tests.faults.answers import check_answers
from tests.faults.checker import Checker
from tests.faults.findings import DOUBLED, FALSELY_SENT, LOST, NOT_QUIET, PARKED_GOOD, RESCUED, Findings
from tests.faults.kinds import Faults
from tests.faults.ledger import Ledger
from tests.faults.messages import Messages
from tests.faults.read_models import unchecked_tables
from tests.faults.sampler import Sampler
from tests.faults.servers import EXCHANGE, QUEUE
from tests.faults.system import TIME_ZONE, System
from tests.faults.tills import Numbers, Tills

ROUND = 25  # faults
LONG_RUN, EACH = 200, 5  # a run of so many faults goes on until every kind has happened so often
AT_ONCE_MAX = 3  # faults that overlap
FAULT_TIME_MAX_S = 360.0  # with the restarts that it causes; longer, and the rig itself hangs
# Where somebody else listens, too, an unbinding in the middle of a window loses events that were confirmed. And what a
# consumer holds for long looks lost, as the queue is empty; while the broker is away, nobody holds anything.
LOSES_CONFIRMED, HELD_S = "rabbitmq.tapped", 25.0
RESCUE = "confirmed events never came out of the queue; publishing them again"
QUIET_WITHIN_S = 60.0  # after everything was mended
POLL_S = 0.2


class Options(NamedTuple):
    faults: int
    seed: int
    kinds: Sequence[str] = ()  # all, when empty
    tills: int = 8
    rate: float = 60.0  # sales a second
    long_s: float = 12.0  # of faults that outlast timeouts
    gap_s: float = 1.5  # between the beginnings of two faults, on average
    quiet_s: float = QUIET_WITHIN_S
    cluster: bool = False  # three nodes of RabbitMQ
    certified: bool = False  # mutual TLS for every call
    cells: int = 1
    in_order: bool = False  # the kinds as they are given, instead of shuffled

    @property
    def each(self) -> int:
        """How often every kind must have happened."""
        return EACH if self.faults >= LONG_RUN else 0


@dataclass
class Result:
    """What a run has seen."""

    seed: int
    hits: Counter[str] = field(default_factory=Counter)
    misses: Counter[str] = field(default_factory=Counter)
    seconds_broken: Counter[str] = field(default_factory=Counter)
    findings: Findings = field(default_factory=Findings)
    sent: int = 0
    acknowledged: int = 0
    refused: int = 0
    unknown: int = 0
    samples: int = 0
    claims: int = 0
    rounds: int = 0
    restarts: int = 0
    rescued: int = 0  # events that the relay has published again, as they never came out of the queue
    seconds: float = 0.0
    unchecked: set[str] = field(default_factory=set)
    enough: bool = False  # whether as many faults happened as were asked for

    def report(self) -> dict[str, Any]:
        counts = self.findings.counts
        return {
            "faults": self.hits.total(),
            "kinds": dict(sorted(self.hits.items())),
            "acknowledged": self.acknowledged,
            "lost": counts[LOST],
            "doubled": counts[DOUBLED],
            "falsely_sent": counts[FALSELY_SENT],
            "parked_good": counts[PARKED_GOOD],
            "rescued": self.rescued,
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "other_findings": {
                kind: count for kind, count in counts.items() if kind not in (LOST, DOUBLED, FALSELY_SENT, PARKED_GOOD)
            },
        }


class Run:
    """`tell` hears of every fault as it ends: its number, kind, whether it happened, and how long it took."""

    def __init__(self, system: System, options: Options, tell: Callable[["Run", int, str, bool, float], None]) -> None:
        self._system, self._options, self._tell = system, options, tell
        self.ledger = Ledger(system.directory / "ledger.jsonl")
        self.result = Result(options.seed)
        self.under_way: dict[int, str] = {}  # kinds, by the fault's number
        self._numbers = Numbers()
        self._tills: Tills | None = None
        messages = Messages(system, self.ledger)
        self._faults = Faults(
            system, self._present_tills, self.ledger, messages, options.long_s, _months(options.faults)
        )
        unknown = set(options.kinds) - self._faults.kinds.keys()
        if unknown:
            raise StackError(f"no such kinds of faults: {', '.join(sorted(unknown))}")
        self._schedule = self._deal()
        self._missed: list[str] = []  # since the last deal
        self._excused = False  # events that were confirmed may be lost in this round, or look so
        self._read = Counter[str]()  # of each relay's log
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self.sampler = Sampler(
            lambda: system.url("analytics"), lambda: system.set_back, self.ledger, self.result.findings
        )

    def _present_tills(self) -> Tills:
        assert self._tills is not None  # there are tills while there are faults
        return self._tills

    @property
    def kinds(self) -> list[str]:
        return list(self._options.kinds or self._faults.kinds)

    def run(self) -> Result:
        begin = time.monotonic()
        self.sampler.start()
        try:
            while self._to_do() > 0 and not self.result.findings:
                attempts = self.result.hits.total() + self.result.misses.total()
                if attempts >= 2 * max(self._options.faults, len(self.kinds) * self._options.each):
                    break  # the report tells how few there were
                self._round()
            self.result.enough = self._to_do() <= 0
        finally:
            self._system.ending.set()
            for thread in self._threads:
                thread.join(FAULT_TIME_MAX_S)
            self.sampler.stop()
            self.ledger.close()
            self.result.seconds = time.monotonic() - begin
        return self.result

    def _seen(self) -> Counter[str]:
        """How often each kind has happened, those under way included."""
        with self._lock:
            return self.result.hits + Counter(self.under_way.values())

    def _short(self) -> Counter[str]:
        """How often each kind is still to happen."""
        return Counter(dict.fromkeys(self.kinds, self._options.each)) - self._seen()

    def _to_do(self) -> int:
        """How many faults are still to happen, at least."""
        return max(self._options.faults - self._seen().total(), self._short().total())

    def _deal(self) -> Iterator[tuple[int, str, random.Random]]:
        """All kinds in random order, those that did not happen once more, then again: none is rare.

        When there were enough faults, only the kinds that are still short. The seed decides, and what did not happen.
        """
        dealer, number = random.Random(f"{self._options.seed}/faults"), 0
        while True:
            with self._lock:
                kinds, self._missed = self.kinds + self._missed, []
            if self._seen().total() >= self._options.faults:
                kinds = list(self._short().elements())
            if not self._options.in_order:
                dealer.shuffle(kinds)
            for kind in kinds:
                number += 1
                yield number, kind, random.Random(f"{self._options.seed}/fault/{number}")

    def _round(self) -> None:
        self.result.rounds += 1
        self._excused = False
        options = self._options
        self._tills = Tills(
            self._system.identities,
            self._system.targets_of,
            self._system.target(self._system.of("analytics")[0]),
            self.ledger,
            self._numbers,
            seed=f"{options.seed}/{self.result.rounds}",
            count=options.tills,
            rate=options.rate,
        )
        self._tills.start()
        try:
            # Whatever the seed deals, each count has bad messages to look for.
            self._faults.kinds["message.bad"](random.Random(f"{options.seed}/bad/{self.result.rounds}"))
            self._break_things()
            self._heal()
            if not self._tills.finish(self._options.quiet_s):
                self.result.findings.add(NOT_QUIET, "tills still have no answer, though everything is well again")
        finally:
            self._tills.close()
        self._await_quiet(time.time())
        self._check()

    def _break_things(self) -> None:
        room = threading.Semaphore(AT_ONCE_MAX)
        goal = self._seen().total() + ROUND
        for _ in range(2 * ROUND):
            if self._is_enough(goal):
                self._join_faults()  # unless some of these miss, that was all
            if self._is_enough(goal):
                return
            number, kind, chance = next(self._schedule)
            time.sleep(chance.uniform(0, 2) * self._options.gap_s)
            room.acquire()
            with self._lock:
                self.under_way[number] = kind
            thread = threading.Thread(target=self._fault, args=[number, kind, chance, room], name=kind, daemon=True)
            self._threads.append(thread)
            thread.start()
        self._join_faults()

    def _is_enough(self, goal: int) -> bool:
        return self._seen().total() >= goal or self._to_do() <= 0

    def _join_faults(self) -> None:
        for thread in self._threads:
            thread.join(FAULT_TIME_MAX_S)
            if thread.is_alive():
                raise StackError(f"the fault {thread.name} does not end")
        self._threads.clear()

    def _fault(self, number: int, kind: str, chance: random.Random, room: threading.Semaphore) -> None:
        begin = time.monotonic()
        self.ledger.write("fault", number=number, kind=kind)
        try:
            hit = self._faults.kinds[kind](chance)
        except Exception as error:  # whatever it is: this fault did not happen, and the run goes on
            self.ledger.write("missed", number=number, kind=kind, why=repr(error))
            hit = False
        seconds = time.monotonic() - begin
        with self._lock:
            (self.result.hits if hit else self.result.misses)[kind] += 1
            if not hit:
                self._missed.append(kind)
            self.result.seconds_broken[kind] += round(seconds)
            self._excused |= kind == LOSES_CONFIRMED or (seconds > HELD_S and not kind.startswith("rabbitmq."))
            del self.under_way[number]
            self._count()
            self._tell(self, number, kind, hit, seconds)
        self.ledger.write("mended", number=number, kind=kind, hit=hit)
        room.release()

    def _count(self) -> None:
        result, book = self.result, self.ledger
        result.sent, result.acknowledged, result.refused, result.unknown = (
            book.sent,
            book.acknowledged,
            book.refused,
            book.unknown,
        )
        result.samples, result.claims = self.sampler.samples, self.sampler.claims
        result.restarts = sum(instance.starts - 1 for instance in self._system.instances.values())

    def _heal(self) -> None:
        self._system.start_servers()
        self._system.heal()
        with self._system.channel() as channel:
            channel.queue_bind(QUEUE, EXCHANGE, QUEUE)
        self._system.wait_ready()

    def _await_quiet(self, since: float) -> None:
        """No work is left anywhere, soon enough, and the system says so itself."""
        if not wait_until(self._quiet, self._options.quiet_s):
            self.result.findings.add(
                NOT_QUIET, f"{self._options.quiet_s:.0f} s after everything is well: {self._left()}"
            )
        elif not wait_until(lambda: self._complete_through() > since, self._options.quiet_s):
            why = f"complete_through_time is {since - self._complete_through():.1f} s before the last sale's answer"
            self.result.findings.add(NOT_QUIET, f"{self._options.quiet_s:.0f} s after everything is well, {why}")

    def _complete_through(self) -> float:
        return self.sampler.newest.timestamp() if self.sampler.newest else 0.0

    def _left(self) -> dict[str, int]:
        counting = "SELECT count(*), count(*) FILTER (WHERE status <> 'SENT') FROM outbox_events"
        with self._system.connections() as (purchases, analytics):
            rows = [connection.execute(counting).fetchone() for connection in purchases.values()]
            counted = analytics.execute("SELECT count(*) FROM analytics_event_log").fetchone()
        assert all(rows) and counted
        events, unsent = (sum(int(str(row[column])) for row in rows if row) for column in (0, 1))
        left = {"not sent": unsent, "not counted": events - int(str(counted[0]))}
        if not any(left.values()):
            left["on the queue"] = self._queued()
        return left

    def _queued(self) -> int:
        lines = self._system.rabbitmq.ctl("list_queues", "name", "messages").splitlines()
        return sum(int(line.split("\t")[1]) for line in lines if line.startswith(QUEUE + "\t"))

    def _quiet(self) -> bool:
        return not any(self._left().values())

    def _check(self) -> None:
        self.result.unchecked = check(self._system, self.ledger, self.result.findings)
        if (rescued := self._rescued()) and not self._excused:
            self.result.findings.add(
                RESCUED, "events were SENT in vain, and published again half a minute later", rescued
            )
        self.result.rescued += rescued
        self._count()

    def _rescued(self) -> int:
        """How many events relays have published again since the last round, as their logs say."""
        rescued = 0
        for relay in self._system.of("relay"):
            with relay.log.open("rb") as log:
                log.seek(self._read[relay.name])
                for line in log:
                    if RESCUE.encode() in line and line.startswith(b"{"):
                        rescued += int(json.loads(line)["events"])
                self._read[relay.name] = log.tell()
        return rescued


def _months(faults: int) -> int:
    """Enough for one in eight faults to use up one, and not before the year 2000."""
    return min(10 + faults // 6, 300)


def check(system: System, ledger: Ledger, findings: Findings) -> set[str]:
    """Count everything; returns the tables that the checker does not know."""
    with system.connections() as (purchases, analytics):
        checker = Checker(ledger.path, purchases, analytics, TIME_ZONE, findings)
        checker.check()
        unchecked = unchecked_tables(analytics)
    (server,) = system.of("analytics")
    check_answers(system.identities, server.address, checker.counted, findings)
    return unchecked
