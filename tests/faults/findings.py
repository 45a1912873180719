"""What may be wrong after a run, or during it. A correct system has none of it."""

from collections import Counter, defaultdict
from collections.abc import Iterator

DETAILS_MAX = 20  # of a kind; the others are counted

LOST = "lost"  # acknowledged, and not stored or not counted
DOUBLED = "doubled"  # stored or counted more than once
FALSELY_SENT = "falsely_sent"  # marked as sent, the queue is empty, and no consumer has seen it
LATE = "late"  # an event waited for the relay, though nothing was broken meanwhile
RESCUED = "rescued"  # the broker's word was false, and the relay published again: though no fault made it so
PARKED_GOOD = "parked_good"  # failed or quarantined though nothing is wrong with it
INVENTED = "invented"  # stored or counted, and never sold
ALTERED = "altered"  # stored or counted otherwise than sold
REFUSED = "refused"  # though nothing spoke against it
STORED_REFUSED = "stored_refused"  # refused, and stored all the same
WRONG_ANSWER = "wrong_answer"  # INTERNAL, UNKNOWN, or another sale's
LEFTOVER = "leftover"  # a key or a receipt number without a purchase
POISON = "poison"  # a bad message is not where it belongs: dropped, counted, or quarantined twice
STOPPED = "stopped"  # others could not go on, though a fault was none of theirs
NOT_QUIET = "not_quiet"  # work is left, long after everything is well again
UNTRUE = "untrue"  # complete_through_time claims what is not there
WENT_BACK = "went_back"  # complete_through_time
UNBALANCED = "unbalanced"  # read models of one moment contradict each other


class Findings:
    """What is wrong: how often, and the first of each kind in words."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.details: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, detail: str, count: int = 1) -> None:
        self.counts[kind] += count
        if len(self.details[kind]) < DETAILS_MAX:
            self.details[kind].append(detail)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def lines(self) -> Iterator[str]:
        for kind, count in self.counts.items():
            yield f"{kind}: {count}"
            yield from (f"    {detail}" for detail in self.details[kind])
