"""Amounts, times, days and page tokens on the wire."""

import datetime
from decimal import Decimal

import pytest
from google.protobuf import timestamp_pb2
from google.type import date_pb2
from hypothesis import given
from hypothesis import strategies as st

from chassis import wire
from chassis.errors import InvalidToken, Violation
from retail.purchases.v1.purchases_service_pb2 import ListControlTotalsRequest, ListPurchasesRequest


@pytest.mark.parametrize(
    ("text", "cents"),
    [
        ("0", 0),
        ("8.9", 890),
        ("8.90", 890),
        ("008.90", 890),
        ("0.05", 5),
        ("999999999999.99", 99_999_999_999_999),
        ("12", 1200),
    ],
)
def test_amounts(text: str, cents: int) -> None:
    """Plain decimals are read exactly."""
    assert wire.parse_cents(text) == cents


@pytest.mark.parametrize(
    "text",
    [
        "", ".5", "5.", "1.234", "+1", "-1", "1e3", "1,5", " 1", "1 ", "1\n", "1.00\n", "١٢", "1٫5", "0x1", "NaN",
        "Infinity", "1234567890123", "1_000", "1.2.3", "１", "\0", "1\0",
    ],
)  # fmt: skip
def test_texts_that_are_no_amount(text: str) -> None:
    """Nothing but the plain form is an amount: no signs, exponents, spaces, line ends or foreign digits."""
    assert wire.parse_cents(text) is None


@given(st.decimals(0, Decimal("999999999999.99"), places=2))
def test_amounts_survive_the_wire(amount: Decimal) -> None:
    """Printed and read again, every amount is itself."""
    assert wire.parse_cents(f"{amount:f}") == int(amount * 100)
    assert Decimal(wire.cents_text(int(amount * 100))) == amount


@given(st.datetimes(timezones=st.just(datetime.UTC)))
def test_times_survive_the_wire(moment: datetime.datetime) -> None:
    """A time goes out and comes back to the microsecond."""
    assert wire.parse_timestamp(wire.timestamp(moment)) == moment


@pytest.mark.parametrize(
    ("seconds", "nanos"), [(0, -1), (0, 1_000_000_000), (2**62, 0), (-(2**62), 0), (253_402_300_800, 0)]
)
def test_times_that_cannot_be(seconds: int, nanos: int) -> None:
    """Times outside the calendar are refused rather than wrapped."""
    assert wire.parse_timestamp(timestamp_pb2.Timestamp(seconds=seconds, nanos=nanos)) is None


@pytest.mark.parametrize("day", [(2026, 2, 30), (0, 1, 1), (2026, 0, 1), (2026, 1, 0), (10_000, 1, 1), (-5, 1, 1)])
def test_days_that_cannot_be(day: tuple[int, int, int]) -> None:
    """Partial dates and days that no month has are violations."""
    violations: list[Violation] = []
    year, month, number = day
    request = ListControlTotalsRequest(first_date=date_pb2.Date(year=year, month=month, day=number))
    assert wire.parse_date(request, "first_date", violations) is None
    assert [v.field for v in violations] == ["first_date"]


def test_page_tokens_belong_to_their_key_and_filters() -> None:
    """A token opens with the same filters under the same key, whatever the page size."""
    request = ListPurchasesRequest(branch_id=1, page_size=5)
    token = wire.PageTokens(b"key").issue(request, ["2026", 7])
    same = ListPurchasesRequest(branch_id=1, page_size=9, page_token=token)
    assert wire.PageTokens(b"key").read(same) == ["2026", 7]
    assert wire.PageTokens(b"key").read(ListPurchasesRequest()) is None
    for key, other in (
        (b"other", same),
        (b"key", ListPurchasesRequest(branch_id=2, page_token=token)),
        (b"key", ListControlTotalsRequest(page_token=token)),
    ):
        with pytest.raises(InvalidToken):
            wire.PageTokens(key).read(other)


@given(st.text(max_size=60))
def test_no_text_passes_for_a_page_token(text: str) -> None:
    """Garbage is refused as such, whatever it is."""
    if text:
        with pytest.raises(InvalidToken):
            wire.PageTokens(b"key").read(ListPurchasesRequest(page_token=text))
