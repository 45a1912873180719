"""The numbers of payment cards are found, in whatever form people write them; ids are not taken for them."""

import random
import uuid

import pytest

from chassis.wire import holds_card_number

CARDS = [  # those that the brands give away for tests
    "4111111111111111",
    "4222222222222",
    "4000000000000000006",
    "5500005555555559",
    "2223003122003222",
    "2720992593319364",
    "378282246310005",
    "30569309025904",
    "3530111333300000",
    "6011111111111117",
    "6759649826438453",
]


@pytest.mark.parametrize("number", CARDS)
def test_a_card_number_is_found(number: str) -> None:
    arabic = "".join(chr(ord("٠") + int(digit)) for digit in number)
    full_width = "".join(chr(ord("０") + int(digit)) for digit in number)
    for text in (number, f"R-{number}", f"R{number}", f"{number}X", f"card {number}.", arabic, full_width):
        assert holds_card_number(text), text


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1111",
        "R:4111-1111-1111-1111",
        "3782 822463 10005",
        "3056-930902-5904",
        "4000 0000 0000 0000 006",
    ],
)
def test_groups_as_on_a_card_are_found(text: str) -> None:
    assert holds_card_number(text)


@pytest.mark.parametrize("number", CARDS)
def test_with_one_digit_changed_it_is_none(number: str) -> None:
    last = (int(number[-1]) + 1) % 10
    assert not holds_card_number(f"{number[:-1]}{last}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4711",
        "411111111111",  # 12 digits
        "41111111111111111111",  # 20
        "a4111111111111111",  # a hexadecimal word
        "20261128000123",  # a day and a number: no card begins so
        "S1-20261128-0001",
        "4111.1111.1111.1111",
        "4111 1111-1111 1111",
    ],
)
def test_what_is_none(text: str) -> None:
    assert not holds_card_number(text)


def test_no_uuid_is_taken_for_one() -> None:
    """Tills have them as receipt numbers. These have few letters, so that they look like one as often as can be."""
    chance = random.Random(1)
    for _ in range(50_000):
        made = uuid.UUID(hex="".join(chance.choices("0123456789abc", k=32)), version=4)
        assert not holds_card_number(str(made)), made
        assert not holds_card_number(f"R-{made}"), made
        if not made.hex.isdigit():
            assert not holds_card_number(made.hex), made


def test_a_uuid_of_digits_is_none() -> None:
    for digits in ("41111111-1111-4111-8111-111111111111", "12345678-9012-4111-8111-1a1111111111"):
        assert not holds_card_number(digits)
        assert not holds_card_number(f"R-{digits}")
