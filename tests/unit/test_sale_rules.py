"""The rules of a sale, without any server."""

import base64
from zoneinfo import ZoneInfo

import pytest

from analytics_svc.errors import Rejected
from analytics_svc.ingest.events import decode
from chassis import wire
from chassis.errors import VIOLATIONS_MAX, to_status
from chassis.wire import parse_uuid
from purchases_svc.answers import Recorded
from purchases_svc.errors import InvalidPurchase
from purchases_svc.messages import answer, parse_sale, to_purchase, to_response
from purchases_svc.sale import ITEMS_MAX, Item, Purchase
from tests.integration.purchase_events import sold
from tests.integration.sales import sale


def fields(**changes: object) -> list[str]:
    with pytest.raises(InvalidPurchase) as caught:
        parse_sale(sale(**changes))  # type: ignore[arg-type]
    return [violation.field for violation in caught.value.violations]


def test_sale_is_read_into_whole_cents() -> None:
    """Amounts become cents, ids canonical, a left-out total is the sum."""
    parsed = parse_sale(sale(("8.9", "124.70"), customer_id="4F7C2D1E-9B3A-4C58-8E6F-0A1B2C3D4E5F"))
    assert (parsed.total_cents, parsed.items) == (13_360, (Item(1001, 890), Item(1002, 12_470)))
    assert parsed.customer_id == "4f7c2d1e-9b3a-4c58-8e6f-0a1b2c3d4e5f"


@pytest.mark.parametrize(
    "text",
    [
        *("a\nb", "a\0", "\x7f", "\x85", "", "x" * 65),
        *("4711\u200b", "\ufeff4711", "47\u00ad11", "\u202e4711", "\u20664711", "\u2028", "\u2029", "\ue000", "\ufdd0"),
        *("\ufffe", "\U0001ffff", "\U000e0041", "\U00100000"),
    ],
)
def test_receipt_numbers_that_are_refused(text: str) -> None:
    """Nothing that people cannot see, nothing empty, nothing too long; consumers would not take it, either."""
    assert fields(receipt_id=text) == ["purchase.receipt_id"]
    with pytest.raises(Rejected, match=r"purchase\.receipt_id"):
        decode(sold().body(receipt_id=text), ZoneInfo("UTC"))


@pytest.mark.parametrize("text", ["", "x" * 33, "Kasse 3", "POS/3", "Ä1", "POS-3\n", "\u200bPOS", "３"])
def test_tills_that_are_refused(text: str) -> None:
    """A till's name becomes part of an identity; consumers take no other, either."""
    assert fields(pos_id=text) == ["purchase.pos_id"]
    with pytest.raises(Rejected, match=r"purchase\.pos_id"):
        decode(sold().body(pos_id=text), ZoneInfo("UTC"))


def test_tills_that_are_taken() -> None:
    """With a shift in its name, for one."""
    assert parse_sale(sale(pos_id="POS-3.2_a")).pos_id == "POS-3.2_a"


@pytest.mark.parametrize("text", ["x" * 64, "Bon Nr. 7/ä", "レシート", "\U0001f6d2" * 64, "'; DROP TABLE purchases --"])
def test_receipt_numbers_that_are_taken(text: str) -> None:
    """Any other text is a receipt number, counted in characters."""
    assert parse_sale(sale(receipt_id=text)).receipt_id == text


def test_number_of_items() -> None:
    """1 to 2,000 items."""
    assert fields(prices=()) == ["purchase.items"]
    assert fields(prices=("1.00",) * (ITEMS_MAX + 1)) == ["purchase.items"]
    assert len(parse_sale(sale(("999999999999.99",) * ITEMS_MAX)).items) == ITEMS_MAX


GTIN = 99_999_999_999_999  # the largest, of 14 digits


def test_products_have_numbers_of_up_to_fourteen_digits() -> None:
    """And what any stub may send beyond is refused, not cut to the number of another product."""
    request = sale()
    request.purchase.items[0].product_id = GTIN
    assert parse_sale(request).items[0].product_id == GTIN
    for beyond in (GTIN + 1, 2**63 - 1, -1):
        request.purchase.items[0].product_id = beyond
        with pytest.raises(InvalidPurchase) as caught:
            parse_sale(request)
        assert [violation.field for violation in caught.value.violations] == ["purchase.items[0].product_id"]


@pytest.mark.parametrize("number", [2**31, 2**32 + 1, 2**63 - 1])
def test_number_out_of_range_is_refused(number: int) -> None:
    """Whatever a till's stub declares: an int32 would arrive as another number, and without an error."""
    assert fields(branch_id=number, cashier_id=number) == ["purchase.branch_id", "purchase.cashier_id"]
    request = sale()
    request.purchase.items[1].quantity = number
    with pytest.raises(InvalidPurchase) as caught:
        parse_sale(request)
    assert [violation.field for violation in caught.value.violations] == ["purchase.items[1].quantity"]


def test_violations_are_bounded() -> None:
    """A refusal fits into the 8 KiB of trailers that every client takes, however many items are wrong."""
    with pytest.raises(InvalidPurchase) as caught:
        parse_sale(sale(("1.00",) * (ITEMS_MAX - 100) + ("x",) * 100))  # the later the item, the longer its path
    assert len(caught.value.violations) == VIOLATIONS_MAX
    details = base64.b64encode(to_status(caught.value, "purchases.retail.example").SerializeToString())
    assert len(details) + len(caught.value.message) < 8_192 - 512  # which is for the names, and for other trailers


def test_no_work_for_violations_that_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody keeps a server busy with broken items: it looks for as many as it tells, and no further."""
    looked_at: list[str] = []
    parse_cents = wire.parse_cents

    def look_at(text: str) -> int | None:
        looked_at.append(text)
        return parse_cents(text)

    monkeypatch.setattr(wire, "parse_cents", look_at)
    fields(prices=("x",) * ITEMS_MAX)
    assert len(looked_at) <= VIOLATIONS_MAX + 1


def test_missing_price_and_third_duplicate() -> None:
    """Each item is told what is wrong with it, in terms of what was sent."""
    request = sale(("1.00", "1.00", "1.00"))
    request.purchase.items[0].ClearField("unit_price")
    for item in request.purchase.items:
        item.product_id = 7
    with pytest.raises(InvalidPurchase) as caught:
        parse_sale(request)
    assert [(v.field, v.description) for v in caught.value.violations] == [
        ("purchase.items[0].unit_price", "is required"),
        ("purchase.items[1].product_id", "must be unique in the purchase; items[0] has the same product"),
        ("purchase.items[2].product_id", "must be unique in the purchase; items[0] has the same product"),
    ]


@pytest.mark.parametrize(
    "text", ["", "4f7c2d1e9b3a4c588e6f0a1b2c3d4e5f", "urn:uuid:4f7c2d1e-9b3a-4c58-8e6f-0a1b2c3d4e5f"]
)
def test_only_the_usual_form_of_a_uuid(text: str) -> None:
    """Ids have one spelling but for case."""
    assert parse_uuid(text) is None


def test_reply_says_what_was_understood() -> None:
    """Amounts are printed with two digits, and each line has its total."""
    parsed = parse_sale(sale(("8.9",)))
    reply = to_purchase(Purchase("p", "e", parsed.purchase_time, parsed.purchase_time.date(), parsed))
    assert (reply.total_amount.value, reply.items[0].unit_price.value, reply.items[0].line_total.value) == (
        "8.90",
        "8.90",
        "8.90",
    )


def test_both_ways_to_answer_are_one() -> None:
    """Made of the request or of what is stored, the answer is the same, whatever spelling the request has."""
    request = sale(("008.9", "124"), customer_id="4F7C2D1E-9B3A-4C58-8E6F-0A1B2C3D4E5F", total="132.9")
    request.purchase.purchase_time.nanos = 1_999
    request.purchase.purchase_id = "ignored"
    request.purchase.business_day.year = 1999  # as well
    request.purchase.items[0].line_total.value = "8.90"
    request.MergeFromString(b"\x12\x05\xfa\x06\x02hi")  # a field that this version does not know
    parsed = parse_sale(request)
    recorded = Recorded(Purchase("p", "e", parsed.purchase_time, parsed.purchase_time.date(), parsed), replayed=False)
    assert answer(request, recorded) == to_response(recorded)
    assert answer(request, recorded).SerializeToString() == to_response(recorded).SerializeToString()
