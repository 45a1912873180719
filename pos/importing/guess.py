"""A first map for a file, by the names of its columns; whoever knows the file reads it and corrects it."""

import json
import re
from collections.abc import Mapping

from pos.importing.reading import Source

# What columns are called, without blanks and signs, in the order in which they are believed.
NAMES: Mapping[str, tuple[str, ...]] = {
    "receipt": ("receiptnumber", "receiptno", "receiptid", "receipt", "invoiceno", "invoiceid", "invoicenumber",
                "invoice", "orderid", "ordernumber", "transactionid", "transaction", "billno",
                "belegnummer", "bonnr", "bon"),
    "date": ("invoicedate", "purchasetime", "datetime", "timestamp", "date", "orderdate", "saledate", "datum"),
    "time": ("time", "saletime", "uhrzeit"),
    "product": ("sku", "productid", "stockcode", "productcode", "itemid", "article", "articleno",
                "articlenumber", "barcode", "ean", "gtin", "product", "productline", "item",
                "artikelnummer", "artikel"),
    "quantity": ("quantity", "qty", "units", "menge", "anzahl"),
    "amount": ("linetotal", "netsales", "total", "amount", "grosssales", "betrag", "summe"),
    "price": ("unitprice", "price", "preis", "einzelpreis"),
    "tax": ("tax", "tax5", "vat", "mwst"),
    "branch": ("branchid", "branch", "storeid", "store", "shop", "location", "filiale"),
    "till": ("posid", "pos", "till", "register", "terminal", "kasse"),
    "cashier": ("cashierid", "cashier", "employee", "kassierer"),
    "customer": ("customerid", "customer", "customername", "kundennummer", "kunde"),
    "kind": ("receipttype", "type", "transactiontype"),
}  # fmt: skip

_RULES = """
[fixed] # for what no column says
# branch = 1
# till = "IMPORT"
# cashier = 1

[rules] # what the map does not decide is refused, and named
# time_zone = "Europe/London"   # of times without an offset; UTC
# quantity = "line"             # above one, or a fraction: the line's amount as one unit; or "one": cut to one unit
# returns = "leave_out"         # negative quantities and amounts, counted
# repeated = "sum"              # a product twice in a receipt; or "first"
# free = "leave_out"            # lines of 0.00
# broken = "leave_out"          # rows that cannot be read, with their whole receipt
# product_ids = "hashed"        # codes that are no numbers; or "numbered", in the order of all codes of the file
# receipts = "daily"            # numbers that come again on another day
# sale_receipts = "[0-9]+"      # which receipt numbers are sales
# sale_kinds = ["Sale"]         # which values of the column kind are sales
"""


def guess(source: Source) -> str:
    """The map, as TOML. What no column is called is left for its reader."""
    by_name = {re.sub(r"[\W_]", "", name.lower()): name for name in reversed(source.found.header)}
    columns = {key: next((by_name[name] for name in names if name in by_name), None) for key, names in NAMES.items()}
    if columns["amount"] and columns["price"]:
        columns["amount"] = None  # one of the two; the price, as amounts are often those of a whole receipt
    lines = [
        f"# A first map for {source.path.name}: read it, and correct it.",
        f"# The file's columns are {', '.join(source.found.header)}.",
        f"name = {json.dumps(source.path.name.partition('.')[0], ensure_ascii=False)}",
        "# makes the keys: the same rows under the same name are the same sales",
        "",
        "[columns]",
    ]
    for key, name in columns.items():
        if name is not None:
            lines.append(f"{key} = {json.dumps(name, ensure_ascii=False)}")
        elif key == "price" and columns["amount"] is None:
            lines.append(f'# {key} = "…" # of one unit, or amount, of the line')
        elif key not in ("amount", "price"):
            lines.append(f'# {key} = "…"')
    return "\n".join(lines) + "\n" + _RULES
