"""What can be picked at the till: a small file of products. The chain itself has no catalogue."""

import csv
import io
from collections.abc import Mapping
from importlib import resources
from typing import NamedTuple

from chassis.wire import parse_cents

PRODUCT_ID_MAX = 99_999_999_999_999


class Product(NamedTuple):
    product_id: int
    name: str
    price_cents: int
    group: str


def sample() -> Mapping[int, Product]:
    return read(resources.files("pages_svc.till").joinpath("assortment.csv").read_text())


def read(text: str) -> Mapping[int, Product]:
    """Products by id, of comma-separated values with the columns product_id, name, price, group.

    Raises:
        ValueError: naming every line that is wrong.
    """
    products: dict[int, Product] = {}
    problems = []
    for number, row in enumerate(csv.DictReader(io.StringIO(text)), start=2):
        product_id, price_cents = parse_product_id(row.get("product_id") or ""), parse_cents(row.get("price") or "")
        if product_id is None or price_cents is None or not row.get("name"):
            problems.append(f"line {number}: must have a product_id, a name and a price, such as 2001,Rye bread,3.49")
        elif product_id in products:
            problems.append(f"line {number}: {product_id} is there twice")
        else:
            products[product_id] = Product(product_id, row["name"], price_cents, row.get("group") or "")
    if problems:
        raise ValueError("; ".join(problems))
    return products


def parse_product_id(said: str) -> int | None:
    """None when it is none: a number of up to 14 digits, such as a GTIN."""
    said = said.strip()
    if not (said.isascii() and said.isdigit() and len(said) <= 14):
        return None
    return int(said) or None
