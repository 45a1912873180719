"""A purchase as the read models know it, whether its event told of it or the purchases service did."""

import hashlib
from datetime import date, datetime
from typing import NamedTuple

PRODUCT_ID_MAX = 10**14 - 1  # a GTIN has 14 digits at most


class Item(NamedTuple):
    product_id: int
    quantity: int
    cents: int  # of the whole line


class PurchaseCreated(NamedTuple):
    """What the read models need of an event."""

    event_id: str  # UUIDs are text in lower case: that sorts like the database's uuid
    day: date  # the business day
    purchase_time: datetime  # in UTC
    branch_id: int
    customer_id: str | None
    cents: int
    items: list[Item]
    purchase_id: str | None = None

    def checksum(self) -> int:
        """Tells apart what is counted of two events with one id: 64 bits, signed, as the database's bigint is."""
        content = (str(self.day), self.purchase_time.isoformat(), *self[3:6], sorted(self.items))
        return int.from_bytes(hashlib.blake2b(repr(content).encode(), digest_size=8).digest(), signed=True)
