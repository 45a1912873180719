"""A till's own journal: a sale is on the till's disk before its receipt is printed, whatever the network does.

    with Journal(Path("/var/lib/till"), branch_id=1, pos_id="POS-3") as journal:
        receipt = journal.record_sale([Item(1001, 890)], cashier_id=17)   # on the disk: print receipt.receipt_id
        journal.flush(client, within_s=10)                                # when there is a network: each sale once

One code path, online or not: record, print, flush. The idempotency key of a sale is made with its row and never again,
so it may be sent any number of times. A sale that the service refuses waits apart for somebody (`refused`, `resolve`)
and holds up no other one. Safe to share between threads: sales go on while others are sent.
"""

from pos.journal.journal import Journal
from pos.journal.rows import (
    JournalDamaged,
    JournalError,
    JournalLocked,
    JournalNotWritten,
    JournalOfAnotherTill,
    JournalTooNew,
)
from pos.journal.sales import Flushed, JournalFull, JournalStatus, Limits, Receipt, RefusedSale, Resolution

__all__ = [
    "Flushed",
    "Journal",
    "JournalDamaged",
    "JournalError",
    "JournalFull",
    "JournalLocked",
    "JournalNotWritten",
    "JournalOfAnotherTill",
    "JournalStatus",
    "JournalTooNew",
    "Limits",
    "Receipt",
    "RefusedSale",
    "Resolution",
]
