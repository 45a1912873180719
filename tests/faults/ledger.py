"""What the tills know: every sale they sent and what they were told about it, as JSON lines.

    sent     the sale, in full, before it first leaves the till
    unknown  no answer, or one that says nothing about the sale: sent again, with the same key
    ok       acknowledged: from here on it must never be lost
    refused  with the reason; it must not be stored
    wrong    an answer that no till should ever get
    stopped  somebody could not go on, though a fault was none of theirs

and beside them: `poison_sent` and `poison` (a bad message, before it is published and when the broker has it),
`decided` and `dropped` (before which months nothing is kept, and nothing is there), `fault`, `missed`, `mended`.
"""

import datetime
import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


class Sale(NamedTuple):
    """A sale as the till has it. `time_us` is microseconds since 1970, amounts are whole cents."""

    number: int
    key: str
    receipt_id: str
    branch_id: int
    cashier_id: int
    pos_id: str
    customer_id: str | None
    time_us: int
    items: tuple[tuple[int, int], ...]  # product, cents
    register: bool  # the customer, with the sale

    @property
    def cents(self) -> int:
        return sum(cents for _, cents in self.items)


class Ledger:
    """Written by many threads, one line at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("w", encoding="utf-8")
        self._lock = threading.Lock()
        self.sent = self.acknowledged = self.refused = self.unknown = 0
        self._acknowledged_events: list[tuple[float, str]] = []

    def write(self, what: str, **values: Any) -> float:
        """One line; returns its time, in seconds since 1970."""
        with self._lock:
            at = time.time()
            self._file.write(json.dumps({"what": what, "at": at, **values}, separators=(",", ":")) + "\n")
            self._file.flush()
            return at

    def sale_sent(self, sale: Sale) -> None:
        self.sent += 1
        self.write("sent", **sale._asdict())

    def sale_ok(self, sale: Sale, purchase_id: str, event_id: str) -> None:
        at = self.write("ok", number=sale.number, purchase_id=purchase_id, event_id=event_id)
        self.acknowledged += 1
        if event_id:
            self._acknowledged_events.append((at, event_id))

    def sale_refused(self, sale: Sale, reason: str) -> None:
        self.refused += 1
        self.write("refused", number=sale.number, reason=reason)

    def sale_unknown(self, sale: Sale, why: str) -> None:
        self.unknown += 1
        self.write("unknown", number=sale.number, why=why)

    def acknowledged_since(self, index: int) -> list[tuple[float, str]]:
        """When each sale was acknowledged, and its event's id, from `index` on."""
        return self._acknowledged_events[index:]

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def sale_of(line: dict[str, Any]) -> Sale:
    values = {name: line[name] for name in Sale._fields}
    values["items"] = tuple((product, cents) for product, cents in line["items"])
    return Sale(**values)


class Told(NamedTuple):
    """The ledger, read."""

    sales: dict[int, Sale]
    by_key: dict[str, list[int]]
    purchase_ids: dict[int, set[str]]  # of the acknowledged ones
    refusals: dict[int, list[tuple[str, float]]]  # reason, when
    decided: list[tuple[int, float]]  # months before which time are not to be kept, and since when
    dropped: list[tuple[int, float, str]]  # months before which time were gone, when that was seen, and where
    poison: dict[str, bool]  # SHA-256 of the bad bodies that were sent: whether the broker took it
    faults: dict[int, tuple[str, float, float]]  # by number: kind, begin, end
    wrong: list[str]
    stopped: list[str]

    def under(self, key: str) -> list[int]:
        """The sales that were sent under a key. Some are equal but for the way to register the customer: what is stored
        is the one that was acknowledged, or else one that was not refused; the till may have forgotten to ask."""
        return sorted(self.by_key.get(key, []), key=lambda n: (n not in self.purchase_ids, n in self.refusals))


def read_ledger(path: Path) -> Told:
    told = Told({}, defaultdict(list), defaultdict(set), defaultdict(list), [], [], {}, {}, [], [])
    for line in read(path):
        match line["what"]:
            case "sent":
                sale = sale_of(line)
                told.sales[sale.number] = sale
                told.by_key[sale.key].append(sale.number)
            case "ok":
                told.purchase_ids[line["number"]].add(line["purchase_id"])
            case "refused":
                told.refusals[line["number"]].append((line["reason"], line["at"]))
            case "decided":
                told.decided.append((line["before_us"], line["at"]))
            case "dropped":
                told.dropped.append((line["before_us"], line["at"], line["database"]))
            case "poison_sent":
                told.poison[line["sha256"]] = False
            case "poison":
                told.poison[line["sha256"]] = True
            case "stopped":
                told.stopped.append(line["why"])
            case "fault":
                told.faults[line["number"]] = line["kind"], line["at"], float("inf")
            case "mended":
                told.faults[line["number"]] = *told.faults[line["number"]][:2], line["at"]
            case "wrong":
                told.wrong.append(f"sale {line['number']}: {line['why']}" if line["number"] else line["why"])
    return told


def business_day(time_us: int, zone: ZoneInfo) -> datetime.date:
    return (EPOCH + datetime.timedelta(microseconds=time_us)).astimezone(zone).date()
