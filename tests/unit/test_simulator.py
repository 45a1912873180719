"""The simulated chain."""

import datetime
from collections import Counter, defaultdict

import pytest

from pos.client import Sale
from pos.simulator import DAYS, FIRST_DAY, simulate


@pytest.fixture(scope="module")
def sales() -> list[Sale]:
    return list(simulate(1))


def test_a_seed_gives_the_same_sales_every_time(sales: list[Sale]) -> None:
    """Running the simulation again repeats every sale to the last field, so sending it again changes nothing."""
    assert list(simulate(1)) == sales


def test_sales_of_a_seed_never_change(sales: list[Sale]) -> None:
    """The first sale of seed 1 is the same today as when it was first sent to anybody's database."""
    first = sales[0]
    assert first.idempotency_key == "36ad18da-de42-5cca-b8db-ebe628d44458"
    assert first.receipt_id == "S1-20260302-0001"
    assert first.purchase_time == datetime.datetime(2026, 3, 2, 7, 32, 9, tzinfo=datetime.UTC)
    assert [tuple(item) for item in first.items] == [(1068, 1295), (1098, 399)]


def test_seeds_are_books_that_never_meet(sales: list[Sale]) -> None:
    """Keys, receipts and customers of two seeds differ, so both can be sent to one system."""
    others = list(simulate(2))
    for field in ("idempotency_key", "receipt_id"):
        assert not {getattr(s, field) for s in sales} & {getattr(s, field) for s in others}
    assert not {s.customer_id for s in sales} & {s.customer_id for s in others} - {None}


def test_a_shorter_simulation_is_the_beginning_of_the_longer_one(sales: list[Sale]) -> None:
    """The first sales are the same however many are taken."""
    few = [sale for sale, _ in zip(simulate(1), range(100), strict=False)]
    assert few == sales[:100]


def test_about_three_thousand_sales_on_fixed_days(sales: list[Sale]) -> None:
    """By default the chain makes about 3,000 sales, on all of the fixed days and in order of time."""
    assert 2_700 <= len(sales) <= 3_300
    days = {sale.purchase_time.date() for sale in sales}
    assert days == {FIRST_DAY + datetime.timedelta(days=n) for n in range(DAYS)}
    times = [sale.purchase_time for sale in sales]
    assert times == sorted(times)
    assert times[-1] < datetime.datetime.now(datetime.UTC)


def test_each_sale_keeps_the_rules_of_the_chain(sales: list[Sale]) -> None:
    """At least one item, no product twice, positive prices and numbers, opening hours."""
    for sale in sales:
        products = [item.product_id for item in sale.items]
        assert 1 <= len(products) == len(set(products))
        assert all(item.product_id > 0 and item.price_cents > 0 for item in sale.items)
        assert sale.branch_id > 0
        assert sale.cashier_id > 0
        assert 7 <= sale.purchase_time.hour < 22


def test_receipts_count_per_till_and_day(sales: list[Sale]) -> None:
    """Each till numbers its receipts 1, 2, 3, … every day, so no number appears twice."""
    numbers = defaultdict(list)
    for sale in sales:
        numbers[sale.branch_id, sale.pos_id, sale.purchase_time.date()].append(int(sale.receipt_id[-4:]))
    assert all(seen == list(range(1, len(seen) + 1)) for seen in numbers.values())


def test_a_cashier_works_in_one_branch_at_one_till(sales: list[Sale]) -> None:
    """No cashier is seen in two places."""
    places = defaultdict(set)
    for sale in sales:
        places[sale.cashier_id].add((sale.branch_id, sale.pos_id))
    assert all(len(seen) == 1 for seen in places.values())


def test_customers_return_and_some_shop_in_several_branches(sales: list[Sale]) -> None:
    """There is something to find out: loyal customers, anonymous sales, customers of more than one branch."""
    visits = Counter(sale.customer_id for sale in sales)
    branches = defaultdict(set)
    for sale in sales:
        branches[sale.customer_id].add(sale.branch_id)
    assert 0.2 < visits.pop(None) / len(sales) < 0.6
    assert sum(count >= 3 for count in visits.values()) > 100
    assert sum(len(seen) > 1 for seen in branches.values()) > 50


def test_a_product_has_one_price_and_some_are_far_more_popular(sales: list[Sale]) -> None:
    """Prices do not depend on the branch; the best-selling product sells many times what the last one does."""
    prices = defaultdict(set)
    units: Counter[int] = Counter()
    for sale in sales:
        for item in sale.items:
            prices[item.product_id].add(item.price_cents)
            units[item.product_id] += 1
    assert all(len(seen) == 1 for seen in prices.values())
    assert max(units.values()) > 5 * min(units.values())
