"""The decoder of the event contract: what counts, what is refused and why. Pure."""

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analytics_svc.errors import Rejected
from analytics_svc.ingest.events import BODY_BYTES_MAX, decode, uuid7_time
from analytics_svc.purchase import Item, PurchaseCreated
from chassis import zones

GOLDEN = (Path(__file__).parent.parent.parent / "proto" / "events" / "purchase_created.v1.example.json").read_bytes()
EVENT_ID = "019b92cd-80a0-7c3e-8f5a-2b6d1c0e4f77"
OTHER_ID = "4f7c2d1e-9b3a-4c58-8e6f-0a1b2c3d4e5f"
UTC_ZONE = zones.load("UTC")


def golden(**changes: Any) -> bytes:
    """The golden event with other fields of the event or the purchase; amounts as text are written as they are.

    At another time, it is one without a business day.
    """
    event = json.loads(GOLDEN, parse_float=Raw)
    if "purchase_time" in changes:
        del event["purchase"]["business_day"]
    for name, value in changes.items():
        (event if name in event else event["purchase"])[name] = value
    return dumps(event)


class Raw(str):
    """A token to be written as it is."""


def dumps(value: Any) -> bytes:
    match value:
        case Raw():
            return value.encode()
        case dict():
            return b"{" + b",".join(json.dumps(k).encode() + b":" + dumps(v) for k, v in value.items()) + b"}"
        case list():
            return b"[" + b",".join(map(dumps, value)) + b"]"
        case _:
            return json.dumps(value).encode()


def line(price: str, qty: Any = 1, product_id: Any = 1001) -> dict[str, Any]:
    return {"product_id": product_id, "qty": qty, "unit_price": Raw(price)}


def refusal(body: bytes, **properties: Any) -> Rejected:
    with pytest.raises(Rejected) as raised:
        decode(body, UTC_ZONE, **properties)
    return raised.value


def test_golden_event() -> None:
    """The contract's example reads as what was sold, to the cent, with its quantities as they stand."""
    assert decode(GOLDEN, UTC_ZONE) == PurchaseCreated(
        event_id=EVENT_ID,
        day=date(2026, 1, 6),
        purchase_time=datetime(2026, 1, 6, 10, 14, 59, tzinfo=UTC),
        branch_id=1,
        customer_id=None,
        cents=14_250,
        items=[Item(1001, 2, 1_780), Item(2007, 1, 12_470)],
        purchase_id="019b92cd-7cb8-7a11-9c44-5e8f00d2b3a6",
    )


@pytest.mark.parametrize(
    ("number", "cents"),
    [
        ("8.9", 890),
        ("8.90", 890),
        ("8.900000000000000000000000000000", 890),
        ("89e-1", 890),
        ("0.89E1", 890),
        ("8.9e0", 890),
        ("0.00089e+4", 890),
        ("9", 900),
        ("9.0", 900),
        ("1e2", 10_000),
        ("0", 0),
        ("0.0", 0),
        ("-0.0", 0),
        ("0e999999", 0),
        ("0.1", 10),
        ("0.29", 29),
        ("1.15", 115),
        ("4.35", 435),
        ("9999999999999999.99", 999_999_999_999_999_999),
        ("9007199254740993.01", 900_719_925_474_099_301),
    ],
)
def test_amounts_are_exact(number: str, cents: int) -> None:
    """Every spelling of a number of cents is that number, also where binary floating point would miss it."""
    assert decode(golden(total_amount=Raw(number), items=[line(number)]), UTC_ZONE).cents == cents


@pytest.mark.parametrize(
    "number",
    [
        "0.001",
        "8.905",
        "1e-3",
        "1.000000000000000000000000000000000000000001",
        "10000000000000000",
        "10000000000000000.0",
        "1e16",
        "1e999999999",
        "1e99999999999999999999",
        "1e-99999999999999999999",
        "-0.01",
        "-1",
        '"8.90"',
        "true",
        "null",
        "[]",
    ],
)
def test_amounts_that_are_none(number: str) -> None:
    """A third decimal, a sign, a text, too much: refused, and named by path."""
    assert refusal(golden(total_amount=Raw(number))).reason == "BROKEN_CONTRACT"
    assert refusal(golden(total_amount=Raw(number))).detail.startswith("purchase.total_amount ")
    assert refusal(golden(items=[line("1"), line(number)])).detail.startswith("purchase.items[1].unit_price ")


@pytest.mark.parametrize("field", ["event_id", "event_type", "occurred_at", "purchase"])
def test_field_of_the_event_is_missing(field: str) -> None:
    """Every field of the contract but the business day must be there."""
    event = json.loads(GOLDEN)
    del event[field]
    rejected = refusal(json.dumps(event).encode())
    assert (rejected.reason, rejected.detail.split()[0]) == ("BROKEN_CONTRACT", field)


@pytest.mark.parametrize("field", sorted(json.loads(GOLDEN)["purchase"].keys() - {"business_day"}))
def test_field_of_the_purchase_is_missing(field: str) -> None:
    """Every field of the contract but the business day must be there, and the refusal tells the event's id."""
    event = json.loads(GOLDEN)
    del event["purchase"][field]
    rejected = refusal(json.dumps(event).encode())
    assert (rejected.reason, rejected.detail.split()[0]) == ("BROKEN_CONTRACT", f"purchase.{field}")
    assert rejected.event_id == EVENT_ID


LONG_AGO = "0001-01-01T00:00:00+14:00"  # before the calendar begins, in UTC


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("event_id", ["", "x", 7, None, EVENT_ID[:-1], f"{{{EVENT_ID}}}", EVENT_ID + "\n", EVENT_ID.replace("-", "")]),
        ("occurred_at", ["", "2026-01-06", 1, None, "2026-01-06T10:15:00"]),
        ("purchase", [None, [], "x", 1]),
        ("purchase_id", ["", 1, None]),
        ("idempotency_key", ["", 1, None, "٤f7c2d1e-9b3a-4c58-8e6f-0a1b2c3d4e5f"]),
        ("customer_id", ["", 1, False, "nobody"]),
        ("receipt_id", ["", 123456, None, "x" * 65, "a\0b"]),
        ("pos_id", ["", 3, None, "x" * 65, "\0"]),
        ("branch_id", [0, -1, 2**31, "1", None, True, Raw("1.5"), Raw("1e400"), [], {}]),
        ("cashier_id", [0, -1, 2**31, "1", None, False]),
        (
            "purchase_time",
            [
                "2026-02-30T10:00:00Z",
                "2026-01-06T24:00:00Z",
                "2026-01-06T10:00:60Z",
                "0000-01-06T10:00:00Z",
                "12026-01-06T10:00:00Z",
                "2026-01-06T10:00:00",
                "2026-01-06 10:00:00Z",
                "2026-01-06T10:00:00.Z",
                "2026-01-06T10:00:00.1234567Z",
                "2026-01-06T10:00:00+24:00",
                "20260106T100000Z",
                "٢٠٢٦-01-06T10:00:00Z",
                LONG_AGO,
                1_767_694_499,
                None,
            ],
        ),
        ("items", [[], None, {}, "x", [line("0")] * 2_001]),
    ],
)
def test_wrong_values(field: str, values: list[Any]) -> None:
    """A value outside the contract is refused, and named by path."""
    for value in values:
        rejected = refusal(golden(**{field: value}))
        assert rejected.reason == "BROKEN_CONTRACT"
        assert rejected.detail.split()[0].rpartition(".")[2] == field, value


@pytest.mark.parametrize(
    ("item", "path"),
    [
        (None, "purchase.items[1]"),
        ([], "purchase.items[1]"),
        (line("1", qty=0), "purchase.items[1].qty"),
        (line("1", qty=-1), "purchase.items[1].qty"),
        (line("1", qty=1_000_001), "purchase.items[1].qty"),
        (line("1", qty=Raw("0.5")), "purchase.items[1].qty"),
        (line("1", product_id=0), "purchase.items[1].product_id"),
        (line("1", product_id="1001"), "purchase.items[1].product_id"),
        ({"product_id": 1, "qty": 1}, "purchase.items[1].unit_price"),
        ({"qty": 1, "unit_price": 1}, "purchase.items[1].product_id"),
    ],
)
def test_wrong_items(item: Any, path: str) -> None:
    """Of many items, the wrong one is named."""
    rejected = refusal(golden(items=[line("1"), item]))
    assert (rejected.reason, rejected.detail.split()[0]) == ("BROKEN_CONTRACT", path)


def test_whole_numbers_may_have_a_point() -> None:
    """1.0 is the number 1: some writers of JSON have no other."""
    event = decode(golden(branch_id=Raw("1.0"), items=[line("71.25", qty=Raw("2.0"))]), UTC_ZONE)
    assert (event.branch_id, event.items) == (1, [Item(1001, 2, 14_250)])


@pytest.mark.parametrize("total", ["142.49", "142.51", "0", "9999999999999999"])
def test_total_that_is_not_the_sum(total: str) -> None:
    """An event whose total is not the sum of its lines, to the cent, is not believed."""
    rejected = refusal(golden(total_amount=Raw(total)))
    assert (rejected.reason, rejected.event_id) == ("TOTAL_MISMATCH", EVENT_ID)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"\xff\xfe",
        b"\xef\xbb\xbf" + GOLDEN,
        GOLDEN.decode().encode("utf-16"),
        GOLDEN[:-2],
        GOLDEN + b"x",
        b"null",
        b"[]",
        b"[" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        GOLDEN.replace(b"142.50", b"NaN"),
        GOLDEN.replace(b"142.50", b"Infinity"),
        GOLDEN.replace(b"142.50", b"-Infinity"),
        GOLDEN.replace(b"142.50", b"1" * 5_000),
        GOLDEN.replace(b"142.50", b"01.00"),
        GOLDEN.replace(b'"branch_id": 1,', b'"branch_id": 1, "branch_id": 2,'),
        GOLDEN.replace(b'"qty": 2,', b'"qty": 2, "qty": 2,'),
    ],
)
def test_bytes_that_are_no_event(body: bytes) -> None:
    """What is not one JSON object in UTF-8 that can be read in one way only is refused; the message names the event."""
    rejected = refusal(body, message_id=EVENT_ID.upper())
    assert (rejected.reason, rejected.event_id) == ("UNDECODABLE", EVENT_ID)


def test_body_that_is_too_large() -> None:
    """A body beyond every purchase is not even read."""
    assert refusal(GOLDEN + b" " * BODY_BYTES_MAX).reason == "TOO_LARGE"
    assert decode(GOLDEN + b" " * (BODY_BYTES_MAX - len(GOLDEN)), UTC_ZONE).cents == 14_250


def test_largest_event() -> None:
    """2,000 items with the largest values are read."""
    items = [line("4999999999999.99", qty=1, product_id=2**31 - 1 - n) for n in range(1_999)]
    items.append(line("0.01", qty=1_000_000))
    event = decode(golden(total_amount=Raw("9995000000009980.01"), items=items), UTC_ZONE)
    assert (len(event.items), event.cents) == (2_000, 999_500_000_000_998_001)


def test_unknown_fields_are_ignored() -> None:
    """What the contract does not name may say anything, be it a number that no amount could be."""
    more = {"x": [Raw("1e999999"), Raw("0.001"), None], "total": Raw("1e-9999999999999999999999")}
    event = json.loads(GOLDEN, parse_float=Raw) | more
    event["purchase"] |= more
    event["purchase"]["items"][0] |= more
    assert decode(dumps(event), UTC_ZONE) == decode(GOLDEN, UTC_ZONE)


@pytest.mark.parametrize("version", [None, 1, "1"])
@pytest.mark.parametrize("message_type", [None, "PurchaseCreated"])
def test_version_1(version: object, message_type: str | None) -> None:
    """Both marks may be missing: then it is version 1, of the type that the body says."""
    assert decode(GOLDEN, UTC_ZONE, schema_version=version, message_type=message_type).cents == 14_250


@pytest.mark.parametrize("version", [2, "2", 0, -1, "", "one", b"1", [1], {}, 1.5])
def test_other_versions(version: object) -> None:
    """Another version may mean another thing by the same fields: it waits for a consumer that knows."""
    rejected = refusal(GOLDEN, schema_version=version, message_id=EVENT_ID)
    assert (rejected.reason, rejected.event_id) == ("UNSUPPORTED_SCHEMA_VERSION", EVENT_ID)


def test_other_types() -> None:
    """Neither the message nor the body may say that it is something else."""
    assert refusal(GOLDEN, message_type="PurchaseCancelled").reason == "UNKNOWN_EVENT_TYPE"
    assert refusal(GOLDEN, message_type=b"\xff").reason == "UNKNOWN_EVENT_TYPE"
    rejected = refusal(golden(event_type="PurchaseCancelled"))
    assert (rejected.reason, rejected.event_id) == ("UNKNOWN_EVENT_TYPE", EVENT_ID)


@pytest.mark.parametrize("message_id", [None, EVENT_ID, EVENT_ID.upper(), OTHER_ID, "x", b"\xff", 7])
def test_the_body_has_the_events_id(message_id: object) -> None:
    """The message's own id does not matter where the body has one: tools that move messages give them new ones."""
    assert decode(GOLDEN, UTC_ZONE, message_id=message_id).event_id == EVENT_ID
    assert refusal(golden(branch_id=0), message_id=message_id).event_id == EVENT_ID


def test_null_customer_is_an_anonymous_sale() -> None:
    """Null for the one optional field is taken for absent, since it can mean nothing else."""
    assert decode(golden(customer_id=None), UTC_ZONE) == decode(GOLDEN, UTC_ZONE)


def test_ids_are_compared_in_one_spelling() -> None:
    """The same id in capitals is the same event and the same customer."""
    event = decode(golden(event_id=EVENT_ID.upper(), customer_id=OTHER_ID.upper()), UTC_ZONE)
    assert (event.event_id, event.customer_id) == (EVENT_ID, OTHER_ID)


@pytest.mark.parametrize(
    ("zone", "moment", "day"),
    [
        ("UTC", "2026-01-06T23:59:59.999999Z", date(2026, 1, 6)),
        ("UTC", "2026-01-07T00:00:00Z", date(2026, 1, 7)),
        ("UTC", "2026-01-07T00:30:00+01:00", date(2026, 1, 6)),
        ("Europe/Berlin", "2026-01-06T23:00:00Z", date(2026, 1, 7)),
        ("Europe/Berlin", "2026-07-06T21:59:59Z", date(2026, 7, 6)),
        ("Europe/Berlin", "2026-07-06T22:00:00Z", date(2026, 7, 7)),
        ("Pacific/Kiritimati", "2026-01-06T10:00:00Z", date(2026, 1, 7)),
        ("Pacific/Apia", "2011-12-30T09:59:59Z", date(2011, 12, 29)),  # the island skipped the 30th
        ("Pacific/Apia", "2011-12-30T10:00:00Z", date(2011, 12, 31)),
    ],
)
def test_business_day(zone: str, moment: str, day: date) -> None:
    """The day is the one that the chain's clocks showed."""
    assert decode(golden(purchase_time=moment), zones.load(zone)).day == day


@pytest.mark.parametrize("day", ["2026-01-05", "2026-01-06", "2026-01-07"])
def test_business_day_of_the_producer(day: str) -> None:
    """Where the event says the day, it decides, whatever we would make of the time."""
    assert decode(golden(business_day=day), UTC_ZONE).day == date.fromisoformat(day)


@pytest.mark.parametrize("day", ["2026-01-04", "2026-01-08", "2026-02-30", "2026-1-6", "20260106", 20260106, "", []])
def test_no_such_business_day(day: Any) -> None:
    """A day that is none, or that no clock can show at that time, breaks the contract."""
    refused = refusal(golden(business_day=day))
    assert (refused.reason, refused.detail.split()[0]) == ("BROKEN_CONTRACT", "purchase.business_day")


@pytest.mark.parametrize("zone", ["UTC", "Pacific/Kiritimati", "Etc/GMT+12"])
def test_times_that_no_purchase_has(zone: str) -> None:
    """The purchases service records from 2000 on, and nothing of next year: what walks over days later has an end."""
    now = datetime.now(UTC)
    ahead = [(now + timedelta(days=days)).isoformat(timespec="seconds") for days in (366, 368)]
    for moment in ("2000-01-01T00:00:00Z", "2000-01-01T01:00:00+01:00", ahead[0]):
        assert decode(golden(purchase_time=moment), zones.load(zone)).cents == 14_250
    for moment in ("0001-01-01T00:00:00Z", "1999-12-31T23:59:59.999999Z", ahead[1], "9999-12-31T23:00:00Z"):
        rejected = refusal(golden(purchase_time=moment))
        assert (rejected.reason, rejected.detail.split()[0]) == ("BROKEN_CONTRACT", "purchase.purchase_time")


def test_details_are_fit_for_every_log_and_database() -> None:
    """Whatever an event holds, its refusal is short printable text."""
    for value in ("\0" * 1_000, "\ud800", "x" * 10_000, "line\nbreak \x1b[31m", 10**4_000):
        for field in ("branch_id", "event_type", "purchase_time", "event_id"):
            detail = refusal(golden(**{field: value})).detail
            assert detail.isascii()
            assert detail.isprintable()
            assert len(detail) < 300


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.sampled_from(["8.9", "1e99", "1e-5", "-0.0", "9" * 40]).map(Raw),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
PATHS = [(name,) for name in json.loads(GOLDEN)] + [
    *(("purchase", name) for name in json.loads(GOLDEN)["purchase"]),
    *(("purchase", "items", 0, name) for name in ("product_id", "qty", "unit_price")),
    ("purchase", "items", 1),
]


@given(st.binary() | st.text().map(str.encode) | JSON.map(dumps))
def test_no_bytes_break_the_decoder(body: bytes) -> None:
    """Arbitrary bytes are refused with a reason; nothing else ever comes out of the decoder."""
    assert refusal(body).reason in {"UNDECODABLE", "BROKEN_CONTRACT", "UNKNOWN_EVENT_TYPE"}


@given(st.sampled_from(PATHS), JSON)
def test_no_value_breaks_the_decoder(path: tuple[Any, ...], value: Any) -> None:
    """Whatever stands in a field, the event counts or is refused."""
    event = json.loads(GOLDEN, parse_float=Raw)
    target = event
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    try:
        decode(dumps(event), UTC_ZONE)
    except Rejected as rejected:
        detail = rejected.detail
    else:
        detail = ""
    assert all(character.isprintable() for character in detail)


def test_time_of_our_ids() -> None:
    """An id of ours tells when the sale was recorded; others tell nothing."""
    assert uuid7_time("019B92CD-80A0-7c3e-8f5a-2b6d1c0e4f77") == 0x019B92CD80A0 / 1_000
    for other in ("4f7c2d1e-9b3a-4c58-8e6f-0a1b2c3d4e5f", "019b92cd", "", None, 7, b"x"):
        assert uuid7_time(other) is None
