"""Protobuf's well-known values and our own: exact amounts, days, points in time, UUIDs, page tokens."""

import base64
import binascii
import datetime
import functools
import hashlib
import hmac
import json
import re
import unicodedata
from typing import Any

from google.protobuf import message, timestamp_pb2
from google.type import date_pb2, decimal_pb2

from chassis.errors import FieldReason, InvalidToken, Violation

# An amount on the wire. `[0-9]`, not `\d`: Unicode has other digits. fullmatch, not `$`: that allows a newline.
_AMOUNT = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,2}))?")
_AMOUNT_LENGTH_MAX = 15
AMOUNT_RULE = "must be a plain decimal of at most 12 digits before the point and 2 after it, such as 142.50"

# A chain has some thousand prices, and each is read and written with every sale; remembering them is ten times faster.
_PRICES_MAX = 16_384

EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)


def parse_cents(text: str) -> int | None:
    """`8.9` → 890; None when the text is no amount. Whole cents: exact, and faster than Decimal objects."""
    return _parse_cents(text) if len(text) <= _AMOUNT_LENGTH_MAX else None  # garbage is not remembered


@functools.lru_cache(_PRICES_MAX)
def _parse_cents(text: str) -> int | None:
    match = _AMOUNT.fullmatch(text)
    if match is None:
        return None
    whole, fraction = match.groups()
    if fraction is None:
        return int(whole) * 100
    return int(whole) * 100 + (int(fraction) if len(fraction) == 2 else int(fraction) * 10)


@functools.lru_cache(_PRICES_MAX)
def cents_text(cents: int) -> str:
    """890 → `8.90`."""
    return f"{cents // 100}.{cents % 100:02d}"


def decimal(text: str) -> decimal_pb2.Decimal:
    return decimal_pb2.Decimal(value=text)


def date(day: datetime.date) -> date_pb2.Date:
    return date_pb2.Date(year=day.year, month=day.month, day=day.day)


def set_date(value: date_pb2.Date, day: datetime.date) -> None:
    """In place, which costs half."""
    value.year, value.month, value.day = day.year, day.month, day.day


def parse_date(request: message.Message, field: str, violations: list[Violation]) -> datetime.date | None:
    """The day in a field; None when it is absent or broken. What is broken is added to `violations`."""
    if not request.HasField(field):
        return None
    value: date_pb2.Date = getattr(request, field)
    try:
        return datetime.date(value.year, value.month, value.day)
    except ValueError:
        violations.append(Violation(field, "must be a full calendar date", FieldReason.NOT_A_DATE))
        return None


def timestamp(moment: datetime.datetime) -> timestamp_pb2.Timestamp:
    stamp = timestamp_pb2.Timestamp()
    set_timestamp(stamp, moment)
    return stamp


def set_timestamp(stamp: timestamp_pb2.Timestamp, moment: datetime.datetime) -> None:
    """In place, which costs half."""
    since = moment - EPOCH
    stamp.seconds, stamp.nanos = since.days * 86_400 + since.seconds, since.microseconds * 1_000


def parse_timestamp(value: timestamp_pb2.Timestamp) -> datetime.datetime | None:
    """A point in time, cut to microseconds; None outside the years 1 to 9999 or with nanos out of range."""
    if not 0 <= value.nanos <= 999_999_999:
        return None
    try:
        return EPOCH + datetime.timedelta(0, value.seconds, value.nanos // 1_000)  # by name, it takes longer
    except OverflowError:
        return None


TIME_RULE = "must be a point in time of the years 1 to 9999"

_UUID = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}")
UUID_RULE = "must be a UUID such as 4f7c2d1e-9b3a-4c58-8e6f-0a1b2c3d4e5f"


def parse_uuid(text: str) -> str | None:
    """The canonical form of a UUID; None when it is none. Only the usual form: no braces, no bare digits."""
    return text.lower() if _UUID.fullmatch(text) else None


ID_MAX = 2**31 - 1


def check_id(field: str, number: int, violations: list[Violation], most: int = ID_MAX) -> None:
    """Ids are whole numbers from 1 to `most`."""
    if number <= 0:
        violations.append(Violation(field, "must be positive", FieldReason.NOT_POSITIVE))
    elif number > most:
        violations.append(Violation(field, f"must be at most {most:,}", FieldReason.TOO_LARGE))


# Control, format, private-use, surrogate; line and paragraph separators.
_UNSEEN = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}


def is_seen(text: str) -> bool:
    """Whether people who compare texts by eye see all of it."""
    return (text.isascii() and text.isprintable()) or not any(map(_is_unseen, text))


def _is_unseen(character: str) -> bool:
    code = ord(character)
    no_character = code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
    return no_character or unicodedata.category(character) in _UNSEEN


# As cards are embossed: sixteen digits in fours (nineteen have a rest), or those of the brands with fewer.
_GROUPED = r"[0-9]{4}([ -])(?:[0-9]{4}\1[0-9]{4}\1[0-9]{4}(?:\1[0-9]{1,3})?|[0-9]{6}\1[0-9]{4,5})"
_CARD = re.compile(rf"(?<![0-9A-Fa-f]){_GROUPED}(?![0-9A-Fa-f])|(?<![0-9])[0-9]{{13,19}}(?![0-9])")
_ISSUED = re.compile(r"[3-6]|22[2-9]|2[3-6]|27[01]|2720")  # how the numbers of payment cards begin
_HEX = re.compile(r"[0-9A-Fa-f]+")
_CARD_LENGTHS = range(13, 20)


def holds_card_number(text: str) -> bool:
    """Whether 13 to 19 digits in it are what a payment card may have: they begin as one, and pass Luhn's check.

    Digits within a hexadecimal word, such as a part of a UUID, are none: by chance, some would pass.
    """
    if len(text) < _CARD_LENGTHS.start:
        return False
    if not text.isascii():
        text = "".join(str(unicodedata.decimal(character, character)) for character in text)
    return any(_is_card(text, match) for match in _CARD.finditer(text))


def _is_card(text: str, match: re.Match[str]) -> bool:
    start, end = match.span()
    while start and text[start - 1].isalnum():
        start -= 1
    while end < len(text) and text[end].isalnum():
        end += 1
    word = text[start:end]
    if word != match[0] and _HEX.fullmatch(word):
        return False
    digits = re.sub("[ -]", "", match[0])
    return len(digits) in _CARD_LENGTHS and _ISSUED.match(digits) is not None and _passes_luhn(digits)


def _passes_luhn(digits: str) -> bool:
    doubled = (2 * int(digit) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(it - 9 if it > 9 else it for it in doubled)) % 10 == 0


def page_size(asked: int, default: int, most: int, violations: list[Violation]) -> int:
    """0 means the default and too much means the most, as AIP-158 has it; below 0 is an error."""
    if asked < 0:
        violations.append(Violation("page_size", "must not be negative", FieldReason.NEGATIVE))
    return min(asked, most) if asked > 0 else default


class PageTokens:
    """Makes and reads page tokens: a position in a listing, signed together with the listing's filters."""

    def __init__(self, key: bytes) -> None:
        """`key` is a secret that all servers of one database share."""
        self._key = key

    def issue(self, request: message.Message, position: list[Any]) -> str:
        """A token that continues after `position`; made of JSON values."""
        body = json.dumps(position, separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(self._sign(request, body) + body).rstrip(b"=").decode()

    def read(self, request: message.Message) -> list[Any] | None:
        """The position in the request's token; None on the first page.

        Raises:
            InvalidToken: it was not made by us, or not for these filters.
        """
        token: str = request.page_token  # type: ignore[attr-defined]
        if not token:
            return None
        try:
            raw = base64.urlsafe_b64decode(token.encode("ascii") + b"=" * (-len(token) % 4))
        except (UnicodeEncodeError, binascii.Error):
            raw = b""
        signature, body = raw[:_SIGNATURE_BYTES], raw[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._sign(request, body)):
            raise InvalidToken("page_token was not made by this service for these filters")
        position: list[Any] = json.loads(body)
        return position

    def _sign(self, request: message.Message, body: bytes) -> bytes:
        """Everything in the request but the paging itself, and the waiting before it, is a filter."""
        filters = type(request)()
        filters.CopyFrom(request)
        for field in ("page_size", "page_token", "consistency_token"):
            if field in request.DESCRIPTOR.fields_by_name:
                filters.ClearField(field)
        scope = request.DESCRIPTOR.full_name.encode() + b"\0" + filters.SerializeToString(deterministic=True)
        return hmac.digest(self._key, scope + b"\0" + body, hashlib.sha256)[:_SIGNATURE_BYTES]


_SIGNATURE_BYTES = 16
