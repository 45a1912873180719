"""What a file's columns mean, as its owner says in TOML. docs/import.md describes it."""

import codecs
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from chassis import zones
from pos.importing.forms import ORDERS

COLUMNS = (
    "receipt",
    "date",
    "time",
    "product",
    "quantity",
    "price",
    "amount",
    "tax",
    "branch",
    "till",
    "cashier",
    "customer",
    "kind",
)
REQUIRED = ("receipt", "date", "product")
SPREAD = ("branch", "cashier", "till")
CHOICES: Mapping[str, tuple[str, ...]] = {
    "quantity": ("refuse", "one", "line"),
    "returns": ("refuse", "leave_out"),
    "free": ("keep", "leave_out"),
    "repeated": ("refuse", "first", "sum"),
    "broken": ("refuse", "leave_out"),
    "taxes": ("included", "add"),
    "product_ids": ("numbers", "numbered", "hashed"),
    "receipts": ("unique", "daily"),
}
BUILT_IN = "maps"
ID_RULE = "must be a whole number above 0"


class BadMap(Exception):
    """The map cannot be used; the text names every problem."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Map:
    """What a file means. Defaults refuse whatever a map has not decided about."""

    name: str  # makes keys: the same file under the same name is the same sales
    columns: Mapping[str, str]
    # file
    delimiter: str = ""  # these are found out
    encoding: str = ""
    decimal: str = ""
    dates: str = ""
    # what columns do not say
    branch: int = 1
    till: str = "IMPORT"
    cashier: int = 1
    branches: Mapping[str, int] = field(default_factory=dict)  # of words
    cashiers: Mapping[str, int] = field(default_factory=dict)
    spread: Mapping[str, int] = field(default_factory=dict)  # by the receipt's number, for trying out
    # rules
    time_zone: str = "UTC"
    quantity: str = "refuse"  # above one, or a fraction
    returns: str = "refuse"
    free: str = "keep"
    repeated: str = "refuse"  # a product, in a receipt
    broken: str = "refuse"
    taxes: str = "included"
    product_ids: str = "numbers"
    receipts: str = "unique"  # or daily: numbers come again on another day
    sale_receipts: str = ""  # a regular expression: other receipts are no sales
    sale_kinds: tuple[str, ...] = ()  # in the column `kind`: others are no sales


def load(name: str) -> Map:
    """Of a file, or one that comes with this package, by its name.

    Raises:
        BadMap
    """
    path = Path(name)
    built_in = resources.files("pos.importing").joinpath(BUILT_IN, f"{name}.toml")
    try:
        if not path.exists() and "/" not in name and built_in.is_file():
            return parse(built_in.read_text(encoding="utf-8"), name)
        return parse(path.read_text(encoding="utf-8"), name)
    except OSError as error:
        raise BadMap(f"the map {name}: {error.strerror}; there are also {', '.join(built_ins())}") from None
    except UnicodeDecodeError:
        raise BadMap(f"the map {name}: is not UTF-8") from None


def built_ins() -> list[str]:
    directory = resources.files("pos.importing").joinpath(BUILT_IN)
    return sorted(file.name.removesuffix(".toml") for file in directory.iterdir() if file.name.endswith(".toml"))


def parse(text: str, name: str) -> Map:
    """Raises BadMap."""
    try:
        said = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadMap(f"the map {name}: is no TOML: {error}") from None
    problems: list[str] = []
    read = _Reader(said, problems)
    columns = {key: value for key, value in read.table("columns", COLUMNS).items() if read.text(f"columns.{key}")}
    problems += [f"columns.{key} is missing" for key in REQUIRED if key not in columns]
    if ("price" in columns) == ("amount" in columns):
        problems.append("columns needs either price, of one unit, or amount, of the line")
    read.table("file", ("delimiter", "encoding", "decimal", "dates"))
    fixed = read.table("fixed", ("branch", "till", "cashier"))
    rules = read.table("rules", (*CHOICES, "time_zone", "sale_receipts", "sale_kinds"))
    _check_rules(read, rules, columns, problems)
    read.check("fixed.branch", _is_id, ID_RULE)
    read.check("fixed.cashier", _is_id, ID_RULE)
    read.check("file.decimal", lambda sign: sign in (".", ","), 'must be "." or ","')
    read.check("file.dates", lambda order: order in ORDERS, f"must be one of {', '.join(ORDERS)}")
    read.check("file.delimiter", lambda sign: isinstance(sign, str) and len(sign) == 1, "must be one character")
    read.check("file.encoding", _is_encoding, "must be the name of an encoding, such as utf-8")
    read.check("fixed.till", lambda till: isinstance(till, str), "must be a text")
    spread = read.table("spread", SPREAD)
    for table in ("branches", "cashiers"):
        for key in read.table(table, None):
            read.check(f"{table}.{key}", _is_id, ID_RULE)
    for key in spread:
        read.check(f"spread.{key}", _is_id, ID_RULE)
    unknown = set(said) - {"name", "file", "columns", "fixed", "branches", "cashiers", "spread", "rules"}
    problems += [f"{key} is not known" for key in sorted(unknown)]
    own_name = read.text("name") or Path(name).stem
    if problems:
        raise BadMap(f"the map {name}:\n" + "\n".join(f"  {problem}" for problem in problems))
    return Map(
        name=own_name,
        columns=columns,
        **said.get("file", {}),
        **fixed,
        branches=said.get("branches", {}),
        cashiers=said.get("cashiers", {}),
        spread=spread,
        **(rules | {"sale_kinds": tuple(rules.get("sale_kinds", ()))}),
    )


def _check_rules(read: "_Reader", rules: Mapping[str, Any], columns: Mapping[str, Any], problems: list[str]) -> None:
    for key in rules:
        if key in CHOICES:
            read.one_of(f"rules.{key}", CHOICES[key])
    if rules.get("taxes") == "add" and "tax" not in columns:
        problems.append('rules.taxes = "add" needs columns.tax')
    if rules.get("sale_kinds") and "kind" not in columns:
        problems.append("rules.sale_kinds needs columns.kind")
    read.check("rules.time_zone", lambda zone: zone in zones.names(), "must be the IANA name of a time zone")
    read.check("rules.sale_receipts", _is_expression, "must be a regular expression")
    read.check("rules.sale_kinds", _is_list_of_texts, "must be a list of texts")


class _Reader:
    """Notes whatever is wrong."""

    def __init__(self, said: Mapping[str, Any], problems: list[str]) -> None:
        self._said, self._problems = said, problems

    def table(self, name: str, keys: tuple[str, ...] | None) -> dict[str, Any]:
        table = self._said.get(name, {})
        if not isinstance(table, dict):
            self._problems.append(f"{name} must be a table")
            return {}
        if keys is not None:
            self._problems += [f"{name}.{key} is not known" for key in table if key not in keys]
        return {key: value for key, value in table.items() if keys is None or key in keys}

    def value(self, name: str) -> Any:
        value: Any = self._said
        for key in name.split(".", 1):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def text(self, name: str) -> str:
        value = self.value(name)
        if value is not None and not isinstance(value, str):
            self._problems.append(f"{name} must be a text")
            return ""
        return value or ""

    def one_of(self, name: str, choices: tuple[str, ...]) -> None:
        if self.value(name) not in choices:
            self._problems.append(f"{name} must be one of {', '.join(choices)}")

    def check(self, name: str, holds: Callable[[Any], bool], rule: str) -> None:
        value = self.value(name)
        if value is not None and not holds(value):
            self._problems.append(f"{name} {rule}")


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_expression(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return True


def _is_encoding(value: Any) -> bool:
    try:
        codecs.lookup(value)
    except (LookupError, TypeError):
        return False
    return True
