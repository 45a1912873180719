"""Replays a real shop's books: the UCI "Online Retail" set, by the importer and a map of its own.

The set knows no tills, branches and cashiers, so they are assigned by rule, and quantities are cut to one unit: the
revenue that results is not the firm's. The whole file is read and checked before any sale is sent, since a product's
number depends on all stock codes in the file, and half a file must not be sent.
"""

from pathlib import Path

from pos.client import Sale
from pos.importing import maps
from pos.importing.books import Books
from pos.importing.reading import Source

MAP = "online_retail_demo"


def read_sales(path: Path) -> list[Sale]:
    """The sales in the file, by first appearance of their invoices.

    Raises:
        UnreadableFile: naming the lines that are broken.
    """
    meaning = maps.load(MAP)
    return list(Books(Source(path, columns=list(meaning.columns.values())), meaning).make())
