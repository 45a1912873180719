"""The owner's questions answered from the sales themselves, by plain loops: what the analytics server has to say.

Shares no code with the services, neither for reading files, nor for days, nor for money.
"""

import csv
import gzip
import uuid
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import NamedTuple
from zoneinfo import ZoneInfo

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://archive.ics.uci.edu/dataset/352/online+retail")
CENT = Decimal("0.01")


class Entry(NamedTuple):
    """A sale: lines are (product, units, amount of the line)."""

    event_id: str
    day: date  # in the chain's zone
    time: datetime  # in UTC
    branch: int
    customer: str | None
    lines: tuple[tuple[int, int, Decimal], ...]

    @property
    def units(self) -> int:
        return sum(units for _, units, _ in self.lines)

    @property
    def amount(self) -> Decimal:
        return sum((amount for _, _, amount in self.lines), Decimal("0.00"))


class Books(NamedTuple):
    """Sales, to be summed up in any way; a filter that is None or empty takes all."""

    entries: list[Entry]

    def of(self, first: date | None, last: date | None, *branches: int) -> "Books":
        return Books(
            [
                entry
                for entry in self.entries
                if (not first or entry.day >= first)
                and (not last or entry.day <= last)
                and (not branches or entry.branch in branches)
            ]
        )

    def daily_sales(self) -> list[tuple[date, int, str, int, int, int]]:
        groups = defaultdict(list)
        for entry in self.entries:
            groups[entry.day, entry.branch].append(entry)
        return [
            (day, branch, *Books(group).summary(), sum(entry.customer is not None for entry in group))
            for (day, branch), group in sorted(groups.items())
        ]

    def product_sales(self, *products: int) -> list[tuple[date, int, int, int, str]]:
        sums: dict[tuple[date, int, int], tuple[int, Decimal]] = {}
        for entry in self.entries:
            for product, units, amount in entry.lines:
                if not products or product in products:
                    key = (entry.day, entry.branch, product)
                    so_far = sums.get(key, (0, Decimal("0.00")))
                    sums[key] = (so_far[0] + units, so_far[1] + amount)
        return [(*key, units, str(amount)) for key, (units, amount) in sorted(sums.items())]

    def top_products(self, limit: int, *, by_revenue: bool, ties: bool) -> list[tuple[int, int, str]]:
        sums: dict[int, tuple[int, Decimal]] = {}
        for entry in self.entries:
            for product, units, amount in entry.lines:
                so_far = sums.get(product, (0, Decimal("0.00")))
                sums[product] = (so_far[0] + units, so_far[1] + amount)
        ranking = sorted(sums, key=lambda product: (-sums[product][by_revenue], product))
        listed = ranking[:limit]
        if ties and listed:
            least = sums[listed[-1]][by_revenue]
            listed = [product for product in ranking if sums[product][by_revenue] >= least]
        return [(product, sums[product][0], str(sums[product][1])) for product in listed]

    def loyal_customers(self, purchases_min: int) -> list[tuple[str, int, datetime]]:
        times = defaultdict(list)
        for entry in self.entries:
            if entry.customer:
                times[entry.customer].append(entry.time)
        loyal = [(who, len(visits), max(visits)) for who, visits in times.items() if len(visits) >= purchases_min]
        return sorted(loyal, key=lambda row: (-row[1], row[0]))

    def summary(self) -> tuple[str, int, int]:
        revenue = sum((entry.amount for entry in self.entries), Decimal("0.00"))
        return str(revenue), sum(entry.units for entry in self.entries), len(self.entries)


def online_retail(path: Path) -> Books:
    """The UCI file as sales, by the project's rules for it (see the README)."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = {code: 1001 + place for place, code in enumerate(sorted({row["StockCode"] for row in rows}))}
    invoices: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        number = row["InvoiceNo"]
        if number.isascii() and number.isdigit() and Decimal(row["Quantity"]) > 0 and _price(row) >= CENT:
            invoices.setdefault(number, []).append(row)
    return Books(list(_entries(invoices, numbers)))


def _entries(invoices: dict[str, list[dict[str, str]]], numbers: dict[str, int]) -> Iterator[Entry]:
    for number, rows in invoices.items():
        prices: dict[int, Decimal] = {}
        for row in rows:
            prices.setdefault(numbers[row["StockCode"]], _price(row))
        time = datetime.fromisoformat(rows[0]["InvoiceDate"]).replace(tzinfo=UTC)
        who = rows[0]["CustomerID"].removesuffix(".0")
        yield Entry(
            str(uuid.uuid5(NAMESPACE, f"event/{number}")),
            time.date(),
            time,
            1 + int(number) % 3,
            str(uuid.uuid5(NAMESPACE, f"customer/{who}")) if who else None,
            tuple((product, 1, price) for product, price in prices.items()),
        )


def _price(row: dict[str, str]) -> Decimal:
    return Decimal(row["UnitPrice"]).quantize(CENT, ROUND_HALF_UP)


def day_in(zone: str, time: datetime) -> date:
    return time.astimezone(ZoneInfo(zone)).date()
