"""Replays a real shop's books: the UCI "Online Retail" set, a CSV file of invoice lines, plain or gzipped.

The set knows no tills, branches and cashiers, so they are assigned by rule, and quantities are cut to one
unit: the revenue that results is not the firm's. The whole file is read and checked before any sale is sent,
since a product's number depends on all stock codes in the file, and half a file must not be sent.
"""

import csv
import datetime
import gzip
import io
import re
import uuid
import zlib
from collections.abc import Callable, Sequence
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import NamedTuple, TypeVar

from pos.client import Item, Sale

HEADER = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country"
COLUMNS = HEADER.split(",")
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://archive.ics.uci.edu/dataset/352/online+retail")
FIRST_PRODUCT_ID = 1001
BRANCHES, CASHIERS, TILLS = 3, 7, 4
ITEMS_MAX = 2_000  # what the purchases service takes in one sale
PROBLEMS_SHOWN_MAX = 20

_GZIP_MAGIC = b"\x1f\x8b"
_INVOICE_DIGITS_MAX = 64  # it becomes the receipt number, which has at most 64 characters
_QUANTITY = re.compile(r"-?[0-9]{1,12}")
_PRICE = re.compile(r"-?[0-9]{1,10}(\.[0-9]{1,12})?")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}")
_CUSTOMER = re.compile(r"([0-9]{1,18})(?:\.0+)?")  # the set's ids passed through a spreadsheet: 17850.0

T = TypeVar("T")


class Problem(NamedTuple):
    line: int  # counted from 1; 0 when the file as a whole is meant
    reason: str


class UnreadableFile(Exception):
    """The file is not what it should be; nothing of it was used."""

    def __init__(self, path: Path, problems: Sequence[Problem]) -> None:
        shown = [f"line {p.line}: {p.reason}" if p.line else p.reason for p in problems[:PROBLEMS_SHOWN_MAX]]
        if len(problems) > PROBLEMS_SHOWN_MAX:
            shown.append(f"and {len(problems) - PROBLEMS_SHOWN_MAX:,} more such lines")
        super().__init__(f"cannot read {path}:\n" + "\n".join(f"  {line}" for line in shown))
        self.problems = tuple(problems)


def read_sales(path: Path) -> list[Sale]:
    """The sales in the file, by first appearance of their invoices.

    Raises:
        UnreadableFile: naming every line that is broken.
    """
    invoices, stock_codes = _read_invoices(path, _read_text(path))
    product_ids = {code: FIRST_PRODUCT_ID + i for i, code in enumerate(sorted(stock_codes))}
    return [_sale(number, invoice, product_ids) for number, invoice in invoices.items()]


class _Invoice(NamedTuple):
    """What becomes one sale. Date and customer are those of the first line that is kept."""

    line: int
    moment: datetime.datetime
    customer_id: str | None
    prices_cents: dict[str, int]  # by stock code, in order; the first line kept of a product gives its price


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if data.startswith(_GZIP_MAGIC):
            data = gzip.decompress(data)
        elif path.suffix == ".gz":
            raise UnreadableFile(path, [Problem(0, "it is not gzipped, although its name says so")])
    except EOFError:
        raise UnreadableFile(path, [Problem(0, "it is cut off: the gzip stream has no end")]) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UnreadableFile(path, [Problem(0, f"its gzip stream is damaged: {error}")]) from None
    except OSError as error:
        raise UnreadableFile(path, [Problem(0, error.strerror or str(error))]) from None
    if not data:
        raise UnreadableFile(path, [Problem(0, "it is empty")])
    try:
        if b"\0" not in data:
            return data.decode("utf-8-sig")  # spreadsheets like to put a byte order mark first
    except UnicodeDecodeError:
        pass
    lines = enumerate(data.split(b"\n"), 1)
    raise UnreadableFile(path, [Problem(n, reason) for n, line in lines if (reason := _why_no_text(line))])


def _why_no_text(line: bytes) -> str:
    if b"\0" in line:
        return "holds a NUL byte"
    try:
        line.decode()
    except UnicodeDecodeError:
        return "is not UTF-8"
    return ""


def _read_invoices(path: Path, text: str) -> tuple[dict[str, _Invoice], set[str]]:
    """The invoices that are kept, by number, and the stock codes of all lines, kept or not."""
    # The same texts come again and again, so each one is checked and converted once.
    is_kept, quantity_of, cents_of = _Cache(_is_sale), _Cache(_quantity), _Cache(_price_cents)
    moment_of, customer_of = _Cache(_moment), _Cache(_customer_id)
    invoices: dict[str, _Invoice] = {}
    stock_codes: set[str] = set()
    problems: list[Problem] = []
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        _check_header(path, next(rows, []))
        for row in rows:
            if not row:
                continue  # an empty line
            try:
                if len(row) != len(COLUMNS):
                    raise ValueError(f"has {len(row)} columns instead of {len(COLUMNS)}")
                number, stock_code, _, quantity, date, price, customer, _ = row
                kept, units, cents = is_kept[number], quantity_of[quantity], cents_of[price]
                moment, customer_id = moment_of[date], customer_of[customer]
                if not stock_code:
                    raise ValueError("StockCode is empty")
            except ValueError as error:
                problems.append(Problem(rows.line_num, str(error)))
                continue
            stock_codes.add(stock_code)
            if kept and units > 0 and cents > 0:
                invoice = invoices.get(number)
                if invoice is None:
                    invoice = invoices[number] = _Invoice(rows.line_num, moment, customer_id, {})
                invoice.prices_cents.setdefault(stock_code, cents)
    except csv.Error as error:  # quotes that do not match: where the next row begins is anyone's guess
        problems.append(Problem(rows.line_num, f"is no CSV: {error}; what follows was not read"))
    for number, invoice in invoices.items():
        if len(invoice.prices_cents) > ITEMS_MAX:
            problems.append(Problem(invoice.line, f"invoice {number} has more than {ITEMS_MAX:,} different products"))
    if not problems and not invoices:
        problems.append(Problem(0, "it holds no sale"))
    if problems:
        raise UnreadableFile(path, problems)
    return invoices, stock_codes


def _check_header(path: Path, header: list[str]) -> None:
    if header == COLUMNS:
        return
    missing = [column for column in COLUMNS if column not in header]
    reason = f"lacks the column {', '.join(missing)}" if missing else "has other columns, or in another order"
    raise UnreadableFile(path, [Problem(1, f"the header {reason}; it must be {HEADER}")])


class _Cache(dict[str, T]):
    """Remembers what `parse` made of each text; what it raises is not remembered."""

    def __init__(self, parse: Callable[[str], T]) -> None:
        super().__init__()
        self._parse = parse

    def __missing__(self, text: str) -> T:
        value = self[text] = self._parse(text)
        return value


def _is_sale(number: str) -> bool:
    """Other invoices are cancellations (C…) and corrections (A…)."""
    if not number:
        raise ValueError("InvoiceNo is empty")
    if not (number.isascii() and number.isdigit()):
        return False
    if len(number) > _INVOICE_DIGITS_MAX:
        raise ValueError(f"InvoiceNo has more than {_INVOICE_DIGITS_MAX} digits")
    return True


def _quantity(text: str) -> int:
    if not _QUANTITY.fullmatch(text):
        raise ValueError(f"Quantity {_shown(text)} is not a whole number")
    return int(text)


def _price_cents(text: str) -> int:
    if not _PRICE.fullmatch(text):
        raise ValueError(f"UnitPrice {_shown(text)} is not a plain decimal number")
    return int(Decimal(text).scaleb(2).quantize(Decimal(1), ROUND_HALF_UP))


def _moment(text: str) -> datetime.datetime:
    if not _DATE.fullmatch(text):
        raise ValueError(f"InvoiceDate {_shown(text)} is not like 2010-12-01 08:26:00")
    try:
        return datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC)
    except ValueError:
        raise ValueError(f"InvoiceDate {_shown(text)} is not in the calendar") from None


def _customer_id(text: str) -> str | None:
    if not text:
        return None
    match = _CUSTOMER.fullmatch(text)
    if not match:
        raise ValueError(f"CustomerID {_shown(text)} is not a number")
    return _uuid5(f"customer/{int(match[1])}")


def _sale(number: str, invoice: _Invoice, product_ids: dict[str, int]) -> Sale:
    n = int(number)
    return Sale(
        idempotency_key=_uuid5(f"invoice/{number}"),
        receipt_id=number,
        branch_id=1 + n % BRANCHES,
        cashier_id=1 + n % CASHIERS,
        pos_id=f"POS-{1 + n % TILLS}",
        customer_id=invoice.customer_id,
        purchase_time=invoice.moment,
        items=tuple([Item(product_ids[code], cents) for code, cents in invoice.prices_cents.items()]),
    )


def _uuid5(name: str) -> str:
    return str(uuid.uuid5(NAMESPACE, name))


def _shown(text: str) -> str:
    """A text from the file in a message: quoted, and cut when it is long."""
    return repr(text if len(text) <= 40 else text[:40] + "…")
