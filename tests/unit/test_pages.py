"""What the pages say, without any server: words, days and charts."""

import datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chassis.errors import Violation
from pages_svc import charts, words
from pages_svc.owner import period
from pages_svc.owner.page import ranked
from pages_svc.owner.period import Selection
from pages_svc.till import assortment
from pages_svc.till.cart import Cart
from pages_svc.upstream.sales import Product, Products

SUNDAY = datetime.date(2026, 11, 29)


@pytest.mark.parametrize(
    ("said", "written"),
    [
        (words.amount(0), "0.00"),
        (words.amount(123_455_005), "1,234,550.05"),
        (words.amount(-5), "−0.05"),
        (words.percent(1, 3), "33.3 %"),
        (words.percent(1, 0), "–"),
        (str(words.Change(110, 100)), "+10.0 %"),
        (str(words.Change(90, 100)), "−10.0 %"),
        (str(words.Change(90, 0)), "–"),
        (words.days(datetime.date(2026, 11, 2), SUNDAY), "2 – 29 Nov 2026"),
        (words.days(datetime.date(2026, 10, 2), SUNDAY), "2 Oct – 29 Nov 2026"),
        (words.days(datetime.date(2025, 12, 31), SUNDAY), "31 Dec 2025 – 29 Nov 2026"),
        (words.span(0.42), "0.4 s"),
        (words.span(200), "3 min 20 s"),
        (words.span(7_200), "2 h"),
        (words.span(273_600), "3 d 4 h"),
    ],
)
def test_words(said: str, written: str) -> None:
    """As people write them."""
    assert said == written


def test_times_are_those_of_the_chain() -> None:
    zone = datetime.timezone(datetime.timedelta(hours=2))
    moment = datetime.datetime(2026, 11, 28, 23, 30, tzinfo=datetime.UTC)
    assert words.clock(moment, zone, SUNDAY) == "01:30:00"  # type: ignore[arg-type]
    assert words.clock(moment, zone, SUNDAY + period.DAY) == "29 Nov 2026, 01:30:00"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ({"branch": "x"}, {"branch"}),
        ({"branch": "0"}, {"branch"}),
        ({"branch": "99999999999999999999"}, {"branch"}),
        ({"range": "century"}, {"range"}),
        ({"range": "custom"}, {"first", "last"}),
        ({"range": "custom", "first": "2026-02-30", "last": "2026-03-01"}, {"first"}),
        ({"range": "custom", "first": "2026-03-02", "last": "2026-03-01"}, {"last"}),
        ({"range": "custom", "first": "2001-01-01", "last": "2026-03-01"}, {"last"}),
        ({"branch": "-1", "range": "?", "first": "?"}, {"branch", "range", "first"}),
    ],
)
def test_what_is_wrong_with_an_address_is_told_all_at_once(query: dict[str, str], wrong: set[str]) -> None:
    selection, found = period.read(query)
    assert found.keys() == wrong
    period.resolve(selection, SUNDAY, None)  # a page is shown all the same


def test_an_address_says_what_is_selected() -> None:
    first = datetime.date(2026, 3, 1)
    for selection in (Selection(), Selection(7, "28"), Selection(None, "custom", first, SUNDAY, by_units=True)):
        query = dict(pair.split("=") for pair in selection.address().removeprefix("/").lstrip("?").split("&") if pair)
        assert period.read(query) == (selection, {})


def test_days_and_what_they_are_compared_with() -> None:
    def resolved(asked: str, latest: datetime.date | None = SUNDAY) -> tuple[str, str, str, str]:
        found = period.resolve(Selection(range=asked), SUNDAY, latest)
        return tuple(map(str, found[:4]))  # type: ignore[return-value]

    assert resolved("today") == ("2026-11-29", "2026-11-29", "2026-11-28", "2026-11-28")
    assert resolved("7") == ("2026-11-23", "2026-11-29", "2026-11-16", "2026-11-22")
    assert resolved("28") == resolved("") == ("2026-11-02", "2026-11-29", "2026-10-05", "2026-11-01")
    assert resolved("month") == ("2026-11-01", "2026-11-29", "2026-10-01", "2026-10-29")
    # Nothing was sold for weeks: the latest days that have sales, unless others were asked for.
    march = datetime.date(2026, 3, 15)
    assert resolved("", march)[:2] == ("2026-02-16", "2026-03-15")
    assert resolved("28", march)[:2] == ("2026-11-02", "2026-11-29")
    assert period.resolve(Selection(range="month"), datetime.date(2026, 3, 31), None).before_last == datetime.date(
        2026, 2, 28
    )


@given(
    st.lists(st.integers(0, 10**12), min_size=1, max_size=30),
    st.integers(1, 9),
    st.sampled_from([1, 7, 28, 62, 63, 400, 401, 3_660]),
)
@example([1_001], 1, 1)  # a grid of 2.50 each has no whole numbers on it
def test_charts_lose_nothing(amounts: list[int], branches: int, length: int) -> None:
    """All columns together are as high as all sales; none leaves the plot; the grid begins at 0 and is above all."""
    days = [SUNDAY - n * period.DAY for n in reversed(range(length))]
    revenue: dict[int, dict[datetime.date, int]] = {branch: {} for branch in range(1, branches + 1)}
    for place, cents in enumerate(amounts):
        revenue[1 + place % branches][days[place % length]] = cents
    drawn = charts.columns(days, revenue)
    sold = sum(sum(by_day.values()) for by_day in revenue.values())
    top = float(drawn.lines[-1].label.replace(",", "")) * 100
    height = sum(block.height for column in drawn.columns for block in column.blocks)
    assert height * top / charts.HEIGHT == pytest.approx(sold, rel=1e-6)
    for column in drawn.columns:
        assert all(block.x >= 0 and block.x + block.width <= 100 for block in column.blocks)
        assert all(block.y >= -1e-6 and block.y + block.height <= charts.HEIGHT + 1e-6 for block in column.blocks)
    assert drawn.lines[0].label == "0" and 2 <= len(drawn.lines) <= charts.LINES + 1
    assert 1 <= sum(bool(column.label) for column in drawn.columns) <= charts.LABELS_MAX
    assert len({line.label for line in drawn.lines}) == len(drawn.lines)


def test_ties_share_a_rank() -> None:
    best = [Product(1, 9, 500), Product(2, 7, 400), Product(3, 7, 300), Product(4, 1, 200)]
    assert [rank for rank, _ in ranked(Products(best, False), by_units=True)] == ["1", "2 =", "2 =", "4"]
    assert [rank for rank, _ in ranked(Products(best, False), by_units=False)] == ["1", "2", "3", "4"]


def test_the_sample_assortment_is_well() -> None:
    products = assortment.sample()
    assert len(products) == 24
    assert len({product.name for product in products.values()}) == 24


def test_an_assortment_that_is_wrong_is_told_line_by_line() -> None:
    text = "product_id,name,price,group\n0,Nothing,1.00,\n7,Bread,1.234,\n8,,1.00,\n9,Milk,1.00,\n9,Milk,1.00,\n"
    with pytest.raises(ValueError, match=r"line 2: .*line 3: .*line 4: .*line 6: 9 is there twice"):
        assortment.read(text)


@given(st.dictionaries(st.sampled_from(["branch", "pos", "key", "time", "customer", "find", "receipt"]), st.text()))
def test_a_form_may_hold_anything(form: dict[str, str]) -> None:
    """What it makes is a cart all the same, and what is said in it is never taken for a sale."""
    cart = Cart.of_form(form, ["", ":", "1", "x:1", "1:x", "7:1.50", "7:2.00", "-1:1.00"])
    assert [tuple(item) for item in cart.lines] == [(7, 150)]
    sale = cart.sale(datetime.datetime.now(datetime.UTC))
    assert sale is None or sale.idempotency_key == cart.key


def test_rules_are_shown_where_they_are_broken() -> None:
    cart = Cart.begin().scan("7", "1.00", {}).scan("8", "2.00", {})
    violations = [
        Violation("purchase.pos_id", "must be short", ""),
        Violation("purchase.items[1].product_id", "is strange", ""),
        Violation("purchase.items[1].unit_price", "is high", ""),
        Violation("purchase.total_amount", "is wrong", ""),
    ]
    assert cart.refused("no", violations).wrong == {
        "pos": "must be short",
        "line-8": "is strange; is high",
        "pay": "purchase.total_amount: is wrong",
    }
