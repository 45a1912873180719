"""What an audit says, and about what."""

from collections.abc import Iterable
from datetime import date
from enum import IntEnum
from typing import NamedTuple

from analytics_svc.proof.contradictions import Finding
from analytics_svc.upstream.source import Totals


class Verdict(IntEnum):
    """The numbers are those of the contract; the order of severity is that of `worst`."""

    AGREED = 1
    PENDING = 2
    DIFFERENT = 3
    FOREIGN = 4


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    order = (Verdict.AGREED, Verdict.PENDING, Verdict.FOREIGN, Verdict.DIFFERENT)
    return max(verdicts, key=order.index, default=Verdict.AGREED)


class Row(NamedTuple):
    """A business day in a branch."""

    day: date
    branch_id: int
    recorded: Totals
    counted: Totals  # quarantined purchases included, where they are known
    verdict: Verdict
    detail: str = ""


class Comparison(NamedTuple):
    rows: list[Row]
    findings: list[Finding]
    foreign_ids: list[str]  # of events that are counted, but that nobody recorded; not all, if there are many

    @property
    def pending(self) -> int:
        """Purchases on their way."""
        waiting = (row for row in self.rows if row.verdict is Verdict.PENDING)
        return sum(max(row.recorded.purchases - row.counted.purchases, 0) for row in waiting)

    @property
    def verdict(self) -> Verdict:
        return worst([*(row.verdict for row in self.rows), *(Verdict.DIFFERENT for _ in self.findings)])


def at_most(some: Totals, others: Totals) -> bool:
    return all(one <= other for one, other in zip(some, others, strict=True))


def difference(counted: Totals, recorded: Totals) -> str:
    """Such as `-1 purchases, -250 cents of revenue`."""
    words = ("purchases", "of them with a customer", "items", "cents of revenue")
    named = zip((is_ - should for is_, should in zip(counted, recorded, strict=True)), words, strict=True)
    return ", ".join(f"{by:+,} {what}" for by, what in named if by)
