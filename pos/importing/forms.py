"""How a file writes numbers and dates: found out from all of its values, never guessed where they leave a doubt."""

import datetime
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import NamedTuple, TypeVar
from zoneinfo import ZoneInfo

_DIGITS_MAX = 30
# What stands around a number and says nothing: currencies, blanks, thousands' apostrophes.
_AROUND = re.compile(r"[\s\u00a0\u202f'’$£€¥₹]")
_CURRENCY = re.compile(r"^[A-Z]{3}(?=[\d(-])|(?<=[\d)-])[A-Z]{3}$")
_PLAIN = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d{1,2})?")
_GROUPS = {",": re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?"), ".": re.compile(r"-?\d{1,3}(\.\d{3})+(,\d+)?")}
_COMMA = re.compile(r"-?\d+,\d+")
_DATE = re.compile(
    r"(?P<one>\d{1,4})(?P<sign>[./-])(?P<two>\d{1,2})(?P=sign)(?P<three>\d{1,4})"
    r"(?:[ T,]+(?P<time>\d{1,2}:\d{2}(?::\d{2})?)(?:\.(?P<fraction>\d{1,9}))?\s*(?P<half>[AaPp]\.?[Mm]\.?)?)?"
    r"\s*(?P<offset>Z|[+-]\d{2}(?::?\d{2})?)?",
    re.ASCII,
)
_TIME = re.compile(r"(?P<time>\d{1,2}:\d{2}(?::\d{2})?)(?:\.\d+)?\s*(?P<half>[AaPp]\.?[Mm]\.?)?", re.ASCII)

ORDERS = {"YMD": "year, month, day", "DMY": "day, month, year", "MDY": "month, day, year"}

T = TypeVar("T")


class Doubtful(Exception):
    """The file's values allow several readings, or none; the text says what the map has to tell."""


def decimal_sign(texts: Iterable[str]) -> str:
    """ "." or ","; the point, where no number has a fraction.

    Raises:
        Doubtful: such as only 1,234: a thousand, or one and a bit.
    """
    point, comma, doubt = "", "", ""
    for raw in texts:
        text = _bare(raw)
        if not text or text.lstrip("-").isdigit():
            continue
        if "." in text and "," in text:
            if text.rindex(".") > text.rindex(","):
                point = point or raw
            else:
                comma = comma or raw
        elif "," in text:
            if _GROUPS[","].fullmatch(text):
                doubt = doubt or raw
            elif _COMMA.fullmatch(text):
                comma = comma or raw
        elif "." in text:
            if text.count(".") > 1:
                comma = comma or raw  # 1.234.567: thousands
            elif not _GROUPS["."].fullmatch(text):
                point = point or raw
    if point and comma:
        raise Doubtful(f"some numbers have a decimal point, such as {point!r}, and some a comma, such as {comma!r}")
    if doubt and not point and not comma:
        raise Doubtful(f"{doubt!r} may be thousands, or have a decimal comma: the map's file.decimal has to say")
    return "," if comma else "."


def number(text: str, sign: str) -> Decimal | None:
    """Exact; None when it is no number. (1.00) is negative."""
    bare = _bare(text)
    if bare.startswith("(") and bare.endswith(")"):
        bare = "-" + bare[1:-1]
    if len(bare) > _DIGITS_MAX or not bare.isascii():
        return None
    other = "," if sign == "." else "."
    if _GROUPS[other].fullmatch(bare):
        bare = bare.replace(other, "")
    bare = bare.replace(",", ".") if sign == "," and "." not in bare else bare
    return Decimal(bare) if _PLAIN.fullmatch(bare) else None


def _bare(text: str) -> str:
    text = text.strip()
    if text.isascii() and text.isdigit():
        return text
    bare = _CURRENCY.sub("", _AROUND.sub("", text))
    return "-" + bare[:-1] if bare.endswith("-") and len(bare) > 1 else bare


class Dates(NamedTuple):
    """How dates are written."""

    order: str  # a key of ORDERS
    two_digit_years: bool

    def __str__(self) -> str:
        return ORDERS[self.order] + (" with two-digit years, taken as 20yy" if self.two_digit_years else "")


def date_order(texts: Iterable[str]) -> Dates:
    """By all of them: a part above 12 is no month.

    Raises:
        Doubtful: no part of any date is above 12; or they are not all written alike.
    """
    first_above: str = ""
    second_above: str = ""
    year_first: str = ""
    year_last: str = ""
    short = False
    for text in texts:
        match = _DATE.fullmatch(text.strip())
        if not match:
            continue  # told where it is read
        one, two, three = (match[name] for name in ("one", "two", "three"))
        if len(one) > 2:
            year_first = year_first or text
            continue
        year_last = year_last or text
        short = short or len(three) <= 2
        if int(one) > 12:
            first_above = first_above or text
        if int(two) > 12:
            second_above = second_above or text
    if year_first and year_last:
        raise Doubtful(
            f"some dates begin with the year, such as {year_first!r}, and some do not, such as {year_last!r}"
        )
    if year_first or not year_last:
        return Dates("YMD", False)
    if first_above and second_above:
        raise Doubtful(f"dates are not all written alike: {first_above!r}, {second_above!r}")
    if not first_above and not second_above:
        raise Doubtful(f"{year_last!r} may be either: the map's file.dates has to say DMY or MDY")
    return Dates("DMY" if first_above else "MDY", short)


def moment(date_text: str, time_text: str, dates: Dates, zone: ZoneInfo) -> datetime.datetime | None:
    """None when it is no date, or not in the calendar. Without a time of day, it is noon; without an offset, `zone`'s
    time, and the first of two where clocks are set back.
    """
    match = _DATE.fullmatch(date_text.strip())
    if not match:
        return None
    one, two, three = (match[name] for name in ("one", "two", "three"))
    year, month, day = {"YMD": (one, two, three), "DMY": (three, two, one), "MDY": (three, one, two)}[dates.order]
    time_of_day, half, fraction = match["time"], match["half"], match["fraction"] or ""
    if time_text.strip():
        other = _TIME.fullmatch(time_text.strip())
        if not other:
            return None
        time_of_day, half = other["time"], other["half"]
    hour, minute, second = (*map(int, (time_of_day or "12:00").split(":")), 0)[:3]
    if half:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + (12 if half[0] in "pP" else 0)
    offset = _offset(match["offset"]) if match["offset"] else zone
    try:
        whole_year = int(year) + (2000 if len(year) <= 2 else 0)
        micros = int(fraction.ljust(6, "0")[:6]) if fraction else 0
        return datetime.datetime(
            whole_year, int(month), int(day), hour, minute, second, micros, tzinfo=offset
        ).astimezone(datetime.UTC)
    except (ValueError, OverflowError):
        return None


def _offset(text: str) -> datetime.tzinfo:
    if text == "Z":
        return datetime.UTC
    digits = text[1:].replace(":", "").ljust(4, "0")
    minutes = int(digits[:2]) * 60 + int(digits[2:])
    return datetime.timezone(datetime.timedelta(minutes=-minutes if text[0] == "-" else minutes))
