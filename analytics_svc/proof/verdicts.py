"""What an audit says, and about what."""

from collections.abc import Iterable
from datetime import date
from enum import IntEnum
from typing import NamedTuple

from analytics_svc.upstream.source import Totals


class Verdict(IntEnum):
    """The numbers are those of the contract; the order of severity is that of `worst`."""

    AGREED = 1
    PENDING = 2
    DIFFERENT = 3
    FOREIGN = 4
    UNPROVEN = 5  # the look at it failed, whatever it is


SEVERITY = (Verdict.AGREED, Verdict.PENDING, Verdict.UNPROVEN, Verdict.FOREIGN, Verdict.DIFFERENT)
WRONG = (Verdict.DIFFERENT, Verdict.FOREIGN)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    return max(verdicts, key=SEVERITY.index, default=Verdict.AGREED)


class Row(NamedTuple):
    """A business day in a branch."""

    day: date
    branch_id: int
    recorded: Totals
    counted: Totals  # quarantined purchases included, where they are known
    verdict: Verdict
    detail: str = ""


class Finding(NamedTuple):
    """A row, or a sum of rows, that is wrong by what others or the recorded purchases say."""

    table: str
    key: str  # such as `day 2026-03-01, branch_id 2`
    detail: str
    day: date | None  # rebuilding this day repairs it; None: any day


class Comparison(NamedTuple):
    rows: list[Row]
    findings: list[Finding]  # some
    foreign_ids: list[str]  # of events that are counted, but that nobody recorded; some
    more_findings: int = 0  # beyond those
    more_foreign: int = 0

    @property
    def wrong(self) -> int:
        """Days and branches whose sums are wrong, and wrong rows."""
        return sum(row.verdict in WRONG for row in self.rows) + len(self.findings) + self.more_findings

    @property
    def foreign(self) -> int:
        """Events that are counted, but that nobody recorded."""
        return len(self.foreign_ids) + self.more_foreign

    @property
    def pending(self) -> int:
        """Purchases on their way."""
        waiting = (row for row in self.rows if row.verdict is Verdict.PENDING)
        return sum(max(row.recorded.purchases - row.counted.purchases, 0) for row in waiting)

    @property
    def verdict(self) -> Verdict:
        foreign = [Verdict.FOREIGN] if self.foreign else []
        different = [Verdict.DIFFERENT] if self.findings or self.more_findings else []
        return worst([*(row.verdict for row in self.rows), *different, *foreign])


def at_most(some: Totals, others: Totals) -> bool:
    return all(one <= other for one, other in zip(some, others, strict=True))


def difference(counted: Totals, recorded: Totals) -> str:
    """Such as `-1 purchases, -250 cents of revenue`."""
    words = ("purchases", "of them with a customer", "items", "cents of revenue")
    named = zip((is_ - should for is_, should in zip(counted, recorded, strict=True)), words, strict=True)
    return ", ".join(f"{by:+,} {what}" for by, what in named if by)
