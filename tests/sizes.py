"""How much the larger tests do: little enough for every run, or as much as proves more to whoever has the time.

    make test LONG=1 ARGS='tests/integration/relay'     # each in its long form
    make test HISTORIES=5000 ARGS='tests/integration/ingest/test_completeness.py -s'

Without arguments it is the short form. That does less of the same thing, and fails for the same faults, if less surely.
"""

import os
from typing import NamedTuple

LONG = os.environ.get("LONG") == "1"


class Size(NamedTuple):
    """In the short form and in the long one; `what` is counted."""

    short: int
    long: int
    what: str


SIZES = {
    "AUDITED_HISTORIES": Size(3, 100, "of whatever may happen to sales, in test_audit_histories.py"),
    "DRAIN_SEEDS": Size(40, 10_000, "of sales while a till's journal is sent, in test_journal_drains.py"),
    "EVENTS": Size(2_000, 10_000, "shuffled, doubled and delayed, in test_consumer.py"),
    "FAULTS": Size(30, 200, "that test_short_run.py brings about; `make faults` is for more"),
    "FUZZ_REQUESTS": Size(10_000, 100_000, "of whatever kind, in test_fuzz_purchases.py"),
    "HELD_SNAPSHOT_S": Size(6, 600, "seconds in which test_held_snapshot.py keeps vacuum from cleaning up"),
    "HISTORIES": Size(30, 1_000, "of commits and clocks, in test_completeness.py"),
    "LARGE_MESSAGES": Size(24, 240, "in test_large_messages.py: three times what may be in hand"),
    "LISTED_IDS": Size(100_000, 1_000_000, "that wait in the outbox, in test_keeper.py"),
    "OUTBOX_DAYS": Size(150, 3_650, "that test_outbox_retention.py keeps"),
    "PAGED_ROWS": Size(30_000, 1_000_000, "through which test_paging_at_scale.py goes"),
    "READ_YOUR_WRITES": Size(100, 1_000, "purchases that are asked for at once, in test_read_your_writes.py"),
    "ROLLOUTS": Size(1, 3, "there, back and there again, in test_rolling_upgrade.py"),
    "YEARS_DAYS": Size(130, 1_096, "of sales that the pages show, in test_years.py; its figures are of the long form"),
    "ZONES": Size(8, 1_000, "of time, the oddest first, in test_business_days.py; all of them take an hour"),
    "ZONES_SIDE_BY_SIDE": Size(100, 1_000, "of time in one database, in test_business_days.py; there are some 600"),
}


def how_many(name: str) -> int:
    """As the variable of that name says, or else the form."""
    set_to = os.environ.get(name)
    return int(set_to) if set_to else SIZES[name].long if LONG else SIZES[name].short
