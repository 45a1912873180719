"""A small chain, simulated. A seed gives the same sales every time, so sending them twice changes nothing.

Four branches of different size sell a range of products, some far more popular than others, to customers who
come back, mostly to the branch next to them. Of `random.Random`, only `random()` is used: its sequence alone
is promised to stay the same in later versions of Python.
"""

import bisect
import datetime
import itertools
import uuid
from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

from pos.client import Item, Sale

FIRST_DAY = datetime.date(2026, 3, 2)  # a Monday; fixed, since the sales of a seed must never change
DAYS = 14
PURCHASES = 3_000  # about this many, over all days

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://retail.example/simulated-chain")
_FIRST_PRODUCT_ID = 1001
_PRODUCTS = 400
_PRICES_CENTS = (49, 79, 99, 119, 149, 199, 249, 299, 349, 399, 499, 599, 799, 999, 1295, 1999, 2495, 4950)
_ITEMS_MAX = 40  # what fits into a trolley
_ANOTHER_ITEM = 0.82  # chance that a basket does not end yet: five to six items on average
_CUSTOMERS = 600
_CUSTOMER_KNOWN = 0.6  # share of sales whose customer shows a card
_AWAY_FROM_HOME = 0.15  # share of those made wherever, rather than in the customer's own branch
_SHIFT_CHANGE_HOUR = 14  # UTC
_WEEKDAY_WEIGHTS = (0.85, 0.85, 0.9, 1.0, 1.25, 1.5, 0.6)  # Monday to Sunday
_SUNDAY = 6


class _Branch(NamedTuple):
    branch_id: int
    weight: float  # share of the chain's sales, relative to the other branches
    tills: int
    hours: tuple[int, int]  # opens and closes, UTC
    sunday_hours: tuple[int, int] | None = None  # closed on Sundays when None

    def hours_of(self, day: datetime.date) -> tuple[int, int] | None:
        return self.sunday_hours if day.weekday() == _SUNDAY else self.hours


_BRANCHES = (
    _Branch(1, 1.0, 4, (8, 20), (10, 16)),
    _Branch(2, 0.7, 3, (8, 20)),
    _Branch(3, 0.4, 2, (9, 19)),
    _Branch(4, 0.9, 3, (7, 22), (10, 18)),
)


def simulate(seed: int = 1, *, days: int = DAYS, purchases: int = PURCHASES) -> Iterator[Sale]:
    """Yield the chain's sales in the order in which they were made.

    Different seeds are different books: their keys, customers and receipt numbers never meet.
    """
    rng = Random(seed)
    products = [
        Item(_FIRST_PRODUCT_ID + i, _PRICES_CENTS[int(rng.random() * len(_PRICES_CENTS))]) for i in range(_PRODUCTS)
    ]
    product_picker = _Picker(_popularity(_PRODUCTS, rng))
    customers = [_uuid5(seed, "customer", i) for i in range(_CUSTOMERS)]
    # Each branch has its regulars, and meets some of them more often than others.
    regulars = [customers[home :: len(_BRANCHES)] for home in range(len(_BRANCHES))]
    regular_pickers = [_Picker(_popularity(len(group), rng)) for group in regulars]
    positions = itertools.count()
    for day, openings in _calendar(days, purchases):
        receipt_numbers: dict[tuple[int, int], int] = {}
        for moment, branch in _moments(day, openings, rng):
            till = 1 + int(rng.random() * branch.tills)
            number = receipt_numbers[branch.branch_id, till] = receipt_numbers.get((branch.branch_id, till), 0) + 1
            customer_id = None
            if rng.random() < _CUSTOMER_KNOWN:
                visitor = rng.random() < _AWAY_FROM_HOME
                home = int(rng.random() * len(_BRANCHES)) if visitor else _BRANCHES.index(branch)
                customer_id = regulars[home][regular_pickers[home].pick(rng)]
            yield Sale(
                idempotency_key=_uuid5(seed, "sale", next(positions)),
                # The seed keeps the receipts of two simulated chains apart, the date those of two days,
                # whatever time zone cuts the business days.
                receipt_id=f"S{seed}-{day:%Y%m%d}-{number:04d}",
                branch_id=branch.branch_id,
                cashier_id=100 * branch.branch_id + 2 * till + (moment.hour >= _SHIFT_CHANGE_HOUR),
                pos_id=f"POS-{till}",
                customer_id=customer_id,
                purchase_time=moment,
                items=_basket(products, product_picker, rng),
            )


class _Picker:
    """Picks positions 0 to n - 1, each as often as its weight says."""

    def __init__(self, weights: Sequence[float]) -> None:
        self._bounds = list(itertools.accumulate(weights))

    def pick(self, rng: Random) -> int:
        return bisect.bisect(self._bounds, rng.random() * self._bounds[-1], hi=len(self._bounds) - 1)


def _popularity(count: int, rng: Random) -> list[float]:
    """`count` weights as in real shops: a few are ten times as high as most."""
    return [1 / (0.1 + rng.random()) for _ in range(count)]


def _calendar(days: int, purchases: int) -> Iterator[tuple[datetime.date, list[tuple[_Branch, float]]]]:
    """Each day with its open branches and the number of sales to expect there."""
    calendar = [
        (day, [(b, b.weight * _WEEKDAY_WEIGHTS[day.weekday()]) for b in _BRANCHES if b.hours_of(day)])
        for day in (FIRST_DAY + datetime.timedelta(days=n) for n in range(days))
    ]
    total = sum(weight for _, openings in calendar for _, weight in openings)
    for day, openings in calendar:
        yield day, [(branch, purchases * weight / total) for branch, weight in openings]


def _moments(
    day: datetime.date, openings: list[tuple[_Branch, float]], rng: Random
) -> list[tuple[datetime.datetime, _Branch]]:
    """When and where the day's sales are made, in order; busiest in the middle of the opening hours."""
    midnight = datetime.datetime.combine(day, datetime.time(), datetime.UTC)
    moments = []
    for branch, expected in openings:
        opens, closes = branch.hours_of(day) or (0, 0)
        for _ in range(int(expected * (0.9 + 0.2 * rng.random()) + 0.5)):
            seconds = 3600 * opens + int(3600 * (closes - opens) * (rng.random() + rng.random()) / 2)
            moments.append((midnight + datetime.timedelta(seconds=seconds), branch))
    return sorted(moments)


def _basket(products: list[Item], picker: _Picker, rng: Random) -> tuple[Item, ...]:
    basket = {products[picker.pick(rng)]}
    while len(basket) < _ITEMS_MAX and rng.random() < _ANOTHER_ITEM:
        basket.add(products[picker.pick(rng)])
    return tuple(sorted(basket))


def _uuid5(seed: int, kind: str, number: int) -> str:
    return str(uuid.uuid5(_NAMESPACE, f"{seed}/{kind}/{number}"))
