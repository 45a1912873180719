"""Sends what books hold, and asks the service what it has of it."""

import datetime
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from chassis import zones
from chassis.tls import Credentials
from pos.client import PosClient, Recorded, Sale
from pos.errors import PosError, SaleRefused
from pos.lines import Identities, Lines

EXAMPLES = 5  # of each reason

Day = tuple[datetime.date, int]  # a business day of a branch


class Refusal:
    """Why the service would not have some of the sales."""

    def __init__(self) -> None:
        self.sales = self.cents = 0
        self.examples: list[str] = []

    def note(self, sale: Sale, error: PosError) -> None:
        self.sales += 1
        self.cents += sale.total_cents
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"receipt {sale.receipt_id} of {sale.purchase_time:%Y-%m-%d}: {error.status.message}")


class Sums(NamedTuple):
    sales: int
    cents: int


class Sent:
    """What became of the sales."""

    def __init__(self) -> None:
        self.sent = Sums(0, 0)
        self.answered = Sums(0, 0)  # as the service says to have stored them
        self.replayed = 0  # of those, stored before
        self.refused: dict[str, Refusal] = {}
        self.chain = Sums(0, 0)  # of the days and branches that the sales are of, with what else was sold there
        self.lacking: list[Day] = []  # of which the chain has less than was answered
        self._days: Counter[Day] = Counter()
        self._cents: Counter[Day] = Counter()

    @property
    def agrees(self) -> bool:
        """Every sale is stored as it was sent, and the service's own sums have them all."""
        return self.sent == self.answered and not self.refused and not self.lacking

    def note(self, sale: Sale, outcome: Recorded | PosError) -> None:
        """Raises PosError: nobody knows what became of it."""
        self.sent = Sums(self.sent.sales + 1, self.sent.cents + sale.total_cents)
        if isinstance(outcome, SaleRefused):
            reason = outcome.status.reason or outcome.status.code.name
            self.refused.setdefault(reason, Refusal()).note(sale, outcome)
        elif isinstance(outcome, PosError):
            raise outcome
        else:
            stored = outcome.purchase
            self.answered = Sums(self.answered.sales + 1, self.answered.cents + stored.total_cents)
            self.replayed += outcome.replayed

    def count(self, sale: Sale, outcome: Recorded, zone: str) -> None:
        day = zones.business_day(sale.purchase_time, zones.load(zone)), sale.branch_id
        self._days[day] += 1
        self._cents[day] += outcome.purchase.total_cents

    def compare(self, client: PosClient, branch_ids: set[int]) -> None:
        """With the sums of the recorded purchases themselves, of branches that this client may ask for."""
        mine = {key for key in self._days if key[1] in branch_ids}
        if not mine:
            return
        days = [day for day, _ in mine]
        seen: set[Day] = set()
        for row in client.list_control_totals(min(days), max(days), branch_ids=sorted(branch_ids)):
            key = (row.day, row.branch_id)
            if key in mine:
                seen.add(key)
                self.chain = Sums(self.chain.sales + row.purchase_count, self.chain.cents + row.revenue_cents)
                if row.purchase_count < self._days[key] or row.revenue_cents < self._cents[key]:
                    self.lacking.append(key)
        self.lacking += sorted(mine - seen)


def send(
    sales: Iterable[Sale],
    target: str,
    credentials: Credentials | None,
    till_certificates: Path | None,
    *,
    pause: Callable[[float, PosError], None],
    progress: Callable[[Sent], None],
) -> Sent:
    """Upload all sales and compare. May be done any number of times: what is stored stays as it is.

    Raises:
        PosError: the service did not answer for too long, or does not let this client send sales.
        chassis.tls.Broken: a till has no certificate.
    """
    sent = Sent()
    lines = Lines(target, Identities(credentials, till_certificates), shared=1, pause=pause)
    try:
        zone = ""
        askers: dict[PosClient, set[int]] = {}
        for part in _parts(sales, by_till=till_certificates is not None):
            client = lines.of(part[0])
            asked = {branch for branches in askers.values() for branch in branches}
            askers.setdefault(client, set()).update({sale.branch_id for sale in part} - asked)
            zone = zone or client.business_days().time_zone
            for sale, outcome in client.upload_purchases(part, register_customers=True):
                sent.note(sale, outcome)
                if isinstance(outcome, Recorded):
                    sent.count(sale, outcome, zone)
                progress(sent)
        for client, branch_ids in askers.items():
            sent.compare(client, branch_ids)
        return sent
    finally:
        lines.close()


def _parts(sales: Iterable[Sale], *, by_till: bool) -> Iterator[Sequence[Sale]]:
    """What one client may send."""
    parts: dict[tuple[int, str], list[Sale]] = {}
    for sale in sales:
        parts.setdefault((sale.branch_id, sale.pos_id) if by_till else (0, ""), []).append(sale)
    yield from parts.values()
