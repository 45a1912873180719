"""From rows to sales, by a map: what becomes one, what does not and why, and where every cent went."""

import datetime
import decimal
import hashlib
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from decimal import ROUND_HALF_UP, Decimal
from typing import NamedTuple, TypeVar

from chassis import zones
from pos.client import Item, Sale
from pos.importing import forms
from pos.importing.forms import Dates, Doubtful
from pos.importing.maps import Map
from pos.importing.reading import Row, Source, UnreadableFile

FIRST_NUMBERED_ID = 1001
PRODUCT_ID_MAX = 10**14 - 1  # what the purchases service takes
ITEMS_MAX = 2_000  # in one sale
HASHED_IDS = 10**13
DISTINCT_MAX = 200_000  # values by which the form of numbers and dates is told
EXAMPLES = 5  # of each reason
PROBLEMS_TOLD = 20
PRECISION = 60  # digits: no sum or product of what a file may hold is rounded

_CENT = Decimal("0.01")
_ZERO = Decimal(0)

K = TypeVar("K")
V = TypeVar("V")


class Example(NamedTuple):
    line: int
    text: str


class Reason:
    """Why some of the file did not become a part of a sale."""

    def __init__(self) -> None:
        self.rows, self.amount, self.amounts_unknown = 0, _ZERO, 0
        self.examples: list[Example] = []

    def note(self, line: int, text: str, amount: Decimal | None, rows: int = 1) -> None:
        self.rows += rows
        if amount is None:
            self.amounts_unknown += rows
        else:
            self.amount += amount
        if len(self.examples) < EXAMPLES:
            self.examples.append(Example(line, text))


class BrokenRows(UnreadableFile):
    """Rows that the map has not decided about; nothing is sent."""


class _Receipt:
    """What becomes one sale. Its time, customer and till are those of the first row that is kept."""

    __slots__ = ("branch", "cashier", "cents", "customer", "key", "line", "moment", "number", "rows", "till")

    def __init__(self, number: str, key: str, line: int, moment: datetime.datetime, customer: str) -> None:
        self.number, self.key, self.line, self.moment, self.customer = number, key, line, moment, customer
        self.branch, self.till, self.cashier = 0, "", 0
        self.cents: dict[str, int] = {}  # by product
        self.rows = 0


class Broken(ValueError):
    """A row that cannot be read, or that the map does not allow."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Books:
    """A file, read by a map. Read twice: once for how it writes numbers and dates, once for what they say."""

    def __init__(self, source: Source, meaning: Map) -> None:
        """
        Raises:
            UnreadableFile: columns are missing, forms are doubtful, or rows are broken and the map refuses such.
        """
        self.source, self.map = source, meaning
        header = source.found.header
        missing = [f"{key} = {name!r}" for key, name in meaning.columns.items() if name not in header]
        if missing:
            raise UnreadableFile(
                f"cannot read {source.path}: line 1: the header lacks what the map names: {', '.join(missing)};"
                f" it has {', '.join(map(repr, header))}"
            )
        if twice := sorted({name for name in meaning.columns.values() if header.count(name) > 1}):
            raise UnreadableFile(f"cannot read {source.path}: line 1: the header has {', '.join(twice)} twice")
        self._places = {key: header.index(name) for key, name in meaning.columns.items()}
        self._zone = zones.load(meaning.time_zone)
        self._is_sale = re.compile(meaning.sale_receipts)
        self._namespace = uuid.uuid5(uuid.NAMESPACE_URL, meaning.name)
        self.rows, self.amount = 0, _ZERO  # of the file, as far as amounts can be read
        self.left_out: dict[str, Reason] = {}  # rows
        self.taken_off: dict[str, Reason] = {}  # parts of the amount of rows that are kept
        self.decimal, self.dates = self._forms()
        self._receipts: dict[str, _Receipt] = {}
        self._codes: set[str] = set()
        self._amount: Decimal | None = None  # of the row at hand, once it is known
        with decimal.localcontext(prec=PRECISION):
            self._read()

    @property
    def sales(self) -> int:
        return len(self._receipts)

    @property
    def sent_amount(self) -> Decimal:
        return Decimal(sum(sum(receipt.cents.values()) for receipt in self._receipts.values())).scaleb(-2)

    @property
    def balance(self) -> Decimal:
        """What is in the file and neither sent, nor left out, nor taken off by a rule: 0, or this is wrong."""
        with decimal.localcontext(prec=PRECISION):
            gone = sum((each.amount for each in (*self.left_out.values(), *self.taken_off.values())), _ZERO)
            return self.amount - gone - self.sent_amount

    def make(self) -> Iterator[Sale]:
        """The sales, in the order of their first rows."""
        ids = self._product_ids()
        for receipt in self._receipts.values():
            yield Sale(
                idempotency_key=self._uuid(f"invoice/{receipt.key}"),
                receipt_id=receipt.number,
                branch_id=receipt.branch,
                cashier_id=receipt.cashier,
                pos_id=receipt.till,
                customer_id=self._customer_id(receipt.customer) if receipt.customer else None,
                purchase_time=receipt.moment,
                items=tuple([Item(ids[code], cents) for code, cents in receipt.cents.items()]),
            )

    # --- how ---

    def _value(self, row: Row, key: str) -> str:
        place = self._places.get(key)
        return row.values[place].strip() if place is not None else ""

    def _forms(self) -> tuple[str, Dates]:
        """Of all distinct values, so that the last line may decide."""
        numbers: set[str] = set()
        dates: set[str] = set()
        number_places = [self._places[key] for key in ("quantity", "price", "amount", "tax") if key in self._places]
        date_place, width = self._places["date"], len(self.source.found.header)
        for row in self.source.rows():
            if len(row.values) == width:
                if len(numbers) < DISTINCT_MAX:
                    numbers.update([row.values[place] for place in number_places])
                if len(dates) < DISTINCT_MAX:
                    dates.add(row.values[date_place])
        try:
            return (
                self.map.decimal or forms.decimal_sign(numbers),
                Dates(self.map.dates, two_digit_years=False) if self.map.dates else forms.date_order(dates),
            )
        except Doubtful as doubt:
            raise UnreadableFile(f"cannot read {self.source.path}: {doubt}") from None

    def _read(self) -> None:
        width = len(self.source.found.header)
        broken: dict[str, str] = {}  # receipts that a row of breaks, and why
        problems = []
        self._moment_of = _Cache(self._moment)
        self._number_of = _Cache(self._parsed)
        for row in self.source.rows():
            self.rows += 1
            self._amount = None
            try:
                if len(row.values) != width:
                    raise Broken("another number of columns", f"has {len(row.values)} columns instead of {width}")
                self._take(row)
            except Broken as error:
                self._leave_out(f"broken: {error.reason}", row, str(error))
                problems.append(f"line {row.line}: {error}")
                if len(row.values) == width:
                    broken.setdefault(self._key_of(row), str(error))
            self.amount += self._amount or _ZERO
        for receipt in self._receipts.values():
            if len(receipt.cents) > ITEMS_MAX:
                text = f"receipt {receipt.number} has more than {ITEMS_MAX:,} different products"
                broken.setdefault(receipt.key, text)
                problems.append(f"line {receipt.line}: {text}")
        if problems and self.map.broken == "refuse":
            raise BrokenRows(_told(self.source, problems))
        for key, why in broken.items():  # half a receipt is none
            if key in self._receipts:
                receipt = self._receipts.pop(key)
                amount = Decimal(sum(receipt.cents.values())).scaleb(-2)
                reason = self.left_out.setdefault("other rows of a broken receipt", Reason())
                reason.note(receipt.line, why, amount, receipt.rows)
        if not self._receipts:
            raise UnreadableFile(f"cannot read {self.source.path}: it holds no sale")

    def _take(self, row: Row) -> None:
        """Raises Broken."""
        number, code = self._value(row, "receipt"), self._value(row, "product")
        if not number:
            raise Broken("no receipt number", f"{self.map.columns['receipt']} is empty")
        if not code:
            raise Broken("no product", f"{self.map.columns['product']} is empty")
        moment = self._moment_of[self._value(row, "date"), self._value(row, "time")]
        quantity = self._number(row, "quantity") if "quantity" in self._places else Decimal(1)
        amount, price = self._amounts(row, quantity)
        self._amount = amount
        customer = self._customer(row)
        self._codes.add(code)
        kind = self._value(row, "kind")
        if self.map.sale_kinds and kind not in self.map.sale_kinds:
            return self._leave_out(f"{self.map.columns['kind']} is {kind!r}", row)
        if self.map.sale_receipts and not self._is_sale.fullmatch(number):
            return self._leave_out("the receipt's number is none of a sale", row)
        if quantity < 0 or amount < 0 or price < 0:
            if self.map.returns == "refuse":
                raise Broken("a return", "is a return: the map's rules.returns has to say leave_out")
            return self._leave_out("a return: quantity or amount is negative", row)
        if quantity == 0:
            return self._leave_out("quantity is 0", row)
        kept = self._one_unit(quantity, amount, price)
        cents = int(kept.quantize(_CENT, ROUND_HALF_UP).scaleb(2))
        if cents == 0 and self.map.free == "leave_out":
            return self._leave_out("free of charge, or less than half a cent", row)
        receipt = self._receipt(row, number, moment, customer)
        if code in receipt.cents and self.map.repeated == "refuse":
            text = f"product {code!r} is in receipt {number} twice: the map's rules.repeated has to say first or sum"
            raise Broken("a product twice in a receipt", text)
        if code in receipt.cents and self.map.repeated == "first":
            return self._leave_out("a product twice in a receipt: the first is kept", row)
        self._take_off("quantity above one, cut to one", row, amount - kept)
        self._take_off("rounded to whole cents", row, kept - Decimal(cents).scaleb(-2))
        receipt.cents[code] = receipt.cents.get(code, 0) + cents
        receipt.rows += 1
        return None

    def _one_unit(self, quantity: Decimal, amount: Decimal, price: Decimal) -> Decimal:
        """What the one unit that a sale may have costs."""
        if quantity == 1:
            return amount
        match self.map.quantity:
            case "one":
                return price
            case "line":
                return amount
            case _:
                text = f"quantity {quantity.normalize():f}: the map's rules.quantity has to say one or line"
                raise Broken("a quantity that is not one", text)

    def _amounts(self, row: Row, quantity: Decimal) -> tuple[Decimal, Decimal]:
        """Of the line, and of one unit, both with the tax."""
        tax = self._number(row, "tax") if self.map.taxes == "add" else _ZERO
        if "amount" in self._places:
            amount = self._number(row, "amount") + tax
            return amount, (amount / quantity).quantize(_CENT, ROUND_HALF_UP) if quantity else amount
        price = self._number(row, "price")
        tax_of_one = (tax / quantity).quantize(_CENT, ROUND_HALF_UP) if tax and quantity else tax
        return price * quantity + tax, price + tax_of_one

    def _number(self, row: Row, key: str) -> Decimal:
        text = self._value(row, key)
        value = self._number_of[text]
        if value is None:
            raise Broken(f"{key} is no number", f"{self.map.columns[key]} {_quoted(text)} is no number")
        return value

    def _parsed(self, text: str) -> Decimal | None:
        return forms.number(text, self.decimal)

    def _moment(self, texts: tuple[str, str]) -> datetime.datetime:
        moment = forms.moment(*texts, self.dates, self._zone)
        if moment is None:
            text = " ".join(filter(None, texts))
            raise Broken("date is no date", f"{_quoted(text)} is no date ({self.dates}), or not in the calendar")
        return moment

    def _receipt(self, row: Row, number: str, moment: datetime.datetime, customer: str) -> _Receipt:
        key = self._key_of(row)
        receipt = self._receipts.get(key)
        if receipt is None:
            receipt = _Receipt(number, key, row.line, moment, customer)
            receipt.branch = self._id(row, "branch", self.map.branches, self.map.branch)
            receipt.cashier = self._id(row, "cashier", self.map.cashiers, self.map.cashier)
            receipt.till = self._value(row, "till") or self.map.till
            if self.map.spread:
                self._spread(receipt)
            self._receipts[key] = receipt
        return receipt

    def _key_of(self, row: Row) -> str:
        """What a receipt is known by, in this file and in any other of its kind."""
        parts = [self._value(row, key) for key in ("branch", "till") if key in self._places]
        if self.map.receipts == "daily":
            moment = forms.moment(self._value(row, "date"), self._value(row, "time"), self.dates, self._zone)
            parts.append(moment.astimezone(self._zone).date().isoformat() if moment else "")
        return "/".join([*parts, self._value(row, "receipt")])

    def _spread(self, receipt: _Receipt) -> None:
        digits = re.sub(r"\D", "", receipt.number)
        number = int(digits) if digits else int.from_bytes(hashlib.sha256(receipt.number.encode()).digest()[:8])
        if "branch" in self.map.spread:
            receipt.branch = 1 + number % self.map.spread["branch"]
        if "cashier" in self.map.spread:
            receipt.cashier = 1 + number % self.map.spread["cashier"]
        if "till" in self.map.spread:
            receipt.till = f"{self.map.till}-{1 + number % self.map.spread['till']}"

    def _id(self, row: Row, key: str, words: Mapping[str, int], fixed: int) -> int:
        text = self._value(row, key)
        if not text:
            return fixed
        if text in words:
            return int(words[text])
        if text.isascii() and text.isdigit() and 0 < int(text) < 1 << 31:
            return int(text)
        table = {"branch": "branches", "cashier": "cashiers"}[key]
        raise Broken(f"{key} is not known", f"{key} {_quoted(text)} is no number: the map's {table} has to give it one")

    def _customer(self, row: Row) -> str:
        text = self._value(row, "customer")
        number = re.fullmatch(r"([0-9]{1,18})(?:\.0+)?", text)  # an id that went through a spreadsheet: 17850.0
        return str(int(number[1])) if number else text

    def _customer_id(self, text: str) -> str:
        try:
            return str(uuid.UUID(text))
        except ValueError:
            return self._uuid(f"customer/{text}")

    def _product_ids(self) -> dict[str, int]:
        if self.map.product_ids == "numbered":
            return {code: FIRST_NUMBERED_ID + n for n, code in enumerate(sorted(self._codes))}
        of = _hashed if self.map.product_ids == "hashed" else _as_number
        ids = {code: of(code) for code in self._codes}
        if wrong := sorted(code for code, number in ids.items() if not 0 < number <= PRODUCT_ID_MAX):
            raise UnreadableFile(
                f"cannot read {self.source.path}: {len(wrong):,} products are no numbers of 1 to 14 digits, such as"
                f" {', '.join(map(repr, wrong[:3]))}: the map's rules.product_ids has to say hashed or numbered"
            )
        if len(set(ids.values())) < len(ids):
            raise UnreadableFile(f"cannot read {self.source.path}: two products would have one number")
        return ids

    def _uuid(self, name: str) -> str:
        return str(uuid.uuid5(self._namespace, name))

    def _leave_out(self, reason: str, row: Row, text: str = "") -> None:
        self.left_out.setdefault(reason, Reason()).note(row.line, text or _shown(row), self._amount)

    def _take_off(self, rule: str, row: Row, amount: Decimal) -> None:
        if amount:
            self.taken_off.setdefault(rule, Reason()).note(row.line, _shown(row), amount)


class _Cache(dict[K, V]):
    """Remembers what was made of each text, as the same ones come again and again; what is raised is not remembered."""

    def __init__(self, parse: Callable[[K], V]) -> None:
        super().__init__()
        self._parse = parse

    def __missing__(self, text: K) -> V:
        value = self[text] = self._parse(text)
        return value


def _as_number(code: str) -> int:
    return int(code) if code.isascii() and code.isdigit() and len(code) <= 14 else 0


def _hashed(code: str) -> int:
    return 1 + int.from_bytes(hashlib.sha256(code.encode()).digest()[:8]) % HASHED_IDS


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _shown(row: Row) -> str:
    text = " | ".join(row.values)
    return text if len(text) <= 120 else text[:120] + "…"


def _told(source: Source, problems: list[str]) -> str:
    told = [f"cannot read {source.path}:", *(f"  {problem}" for problem in problems[:PROBLEMS_TOLD])]
    if len(problems) > PROBLEMS_TOLD:
        told.append(f"  and {len(problems) - PROBLEMS_TOLD:,} more such lines")
    return "\n".join(told)
