"""The replay of the UCI "Online Retail" file: its rules, one by one, and every way in which a file can be broken."""

import datetime
import gzip
import os
import uuid
from collections import Counter
from pathlib import Path

import pytest

from pos.client import Item, Sale
from pos.importing.books import BrokenRows
from pos.importing.reading import UnreadableFile
from pos.replay import read_sales

HEADER = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country"
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://archive.ics.uci.edu/dataset/352/online+retail")

GOOD = "536365,85123A,HEART,6,2010-12-01 08:26:00,2.55,17850.0,United Kingdom"


def write(path: Path, *rows: str, header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "sales.csv"


def read(file: Path, *rows: str) -> list[Sale]:
    return read_sales(write(file, *rows))


def problem(file: Path) -> str:
    """What is wrong with the file."""
    with pytest.raises(UnreadableFile) as caught:
        read_sales(file)
    text = str(caught.value)
    assert text.startswith(f"cannot read {file}:")
    return text.removeprefix(f"cannot read {file}:").strip()


def test_an_invoice_becomes_a_sale(file: Path) -> None:
    """Branch, cashier and till follow from the invoice number; keys are UUIDv5 in the set's namespace."""
    (sale,) = read(file, GOOD)
    assert sale == Sale(
        idempotency_key=str(uuid.uuid5(NAMESPACE, "invoice/536365")),
        receipt_id="536365",
        branch_id=1 + 536365 % 3,
        cashier_id=1 + 536365 % 7,
        pos_id=f"POS-{1 + 536365 % 4}",
        customer_id=str(uuid.uuid5(NAMESPACE, "customer/17850")),
        purchase_time=datetime.datetime(2010, 12, 1, 8, 26, tzinfo=datetime.UTC),
        items=(Item(1001, 255),),
    )


@pytest.mark.parametrize(
    "number",
    ["C536365", "A536365", "536365A", "-536365", "536 365", "５３６３６５", "53636\u00b2"],
    ids=["cancellation", "correction", "suffix", "sign", "space", "full-width digits", "superscript"],
)
def test_only_invoices_of_ascii_digits_are_kept(file: Path, number: str) -> None:
    """Cancellations, corrections and whatever else is not all digits are left out."""
    sales = read(file, GOOD, GOOD.replace("536365", number, 1))
    assert [sale.receipt_id for sale in sales] == ["536365"]


@pytest.mark.parametrize("quantity", ["0", "-6"])
def test_lines_without_a_positive_quantity_are_left_out(file: Path, quantity: str) -> None:
    """A line that takes back or sells nothing is no item."""
    (sale,) = read(file, f"1,A,,{quantity},2010-12-01 08:00:00,1.00,,UK", "1,B,,1,2010-12-01 08:01:00,2.00,,UK")
    assert sale.items == (Item(1002, 200),)
    assert sale.purchase_time.minute == 1


@pytest.mark.parametrize(
    ("price", "cents"),
    [
        ("2.55", 255),
        ("2.5", 250),
        ("2", 200),
        ("0.005", 1),
        ("0.0049999", None),
        ("0.004", None),
        ("0.0", None),
        ("-11062.06", None),
        ("1.005", 101),
        ("1.115", 112),
        ("2.675", 268),
        ("1.00499", 100),
        ("38970.0", 3897000),
    ],
)
def test_prices_are_rounded_half_up_to_cents(file: Path, price: str, cents: int | None) -> None:
    """Rounding is exact, half a cent goes up, and what rounds to less than a cent is left out."""
    (sale,) = read(file, f"1,A,,1,2010-12-01 08:00:00,{price},,UK", "1,B,,1,2010-12-01 08:00:00,1.00,,UK")
    assert sale.items == ((Item(1001, cents), Item(1002, 100)) if cents else (Item(1002, 100),))


def test_a_product_is_sold_once_at_the_price_of_its_first_kept_line(file: Path) -> None:
    """Later lines of a product add nothing; lines that are left out do not count as the first."""
    (sale,) = read(
        file,
        "1,A,,-1,2010-12-01 08:00:00,9.00,,UK",
        "1,B,,5,2010-12-01 08:00:00,2.00,,UK",
        "1,A,,2,2010-12-01 08:00:00,3.00,,UK",
        "1,A,,1,2010-12-01 08:00:00,4.00,,UK",
    )
    assert sale.items == (Item(1002, 200), Item(1001, 300))
    assert sale.total_cents == 500


def test_sales_come_in_the_order_of_first_appearance_among_kept_lines(file: Path) -> None:
    """Neither numbers nor dates sort the sales, and an invoice's lines need not stand together."""
    sales = read(
        file,
        "9,A,,0,2010-12-01 08:00:00,1.00,,UK",
        "5,A,,1,2010-12-01 09:00:00,1.00,,UK",
        "9,A,,1,2010-12-01 10:00:00,1.00,,UK",
        "3,A,,1,2010-12-01 07:00:00,1.00,,UK",
        "5,B,,1,2010-12-01 11:00:00,1.00,,UK",
    )
    assert [(sale.receipt_id, sale.purchase_time.hour, len(sale.items)) for sale in sales] == [
        ("5", 9, 2),
        ("9", 10, 1),
        ("3", 7, 1),
    ]


def test_products_are_numbered_by_all_stock_codes_of_the_file(file: Path) -> None:
    """Codes are sorted as plain strings, capitals first; codes of lines that are left out count, too."""
    (sale,) = read(
        file,
        "1,b,,1,2010-12-01 08:00:00,1.00,,UK",
        "1,B,,1,2010-12-01 08:00:00,1.00,,UK",
        "C2,10,,-1,2010-12-01 08:00:00,1.00,,UK",
        "1,9,,1,2010-12-01 08:00:00,1.00,,UK",
        "A3,ZZ,,1,2010-12-01 08:00:00,-5.00,,UK",
    )
    assert [item.product_id for item in sale.items] == [1005, 1003, 1002]  # 10 < 9 < B < ZZ < b


@pytest.mark.parametrize(("text", "number"), [("17850.0", 17850), ("17850", 17850), ("017850.00", 17850), ("", None)])
def test_a_customer_is_a_number_that_a_spreadsheet_may_have_touched(file: Path, text: str, number: int | None) -> None:
    """`17850.0` is customer 17850; an empty field is an anonymous sale."""
    (sale,) = read(file, f"1,A,,1,2010-12-01 08:00:00,1.00,{text},UK")
    assert sale.customer_id == (number and str(uuid.uuid5(NAMESPACE, f"customer/{number}")))


def test_a_receipt_keeps_the_zeros_of_its_invoice(file: Path) -> None:
    """The invoice number is a text; only the assignment of branch and till reads it as a number."""
    (sale,) = read(file, "0007,A,,1,2010-12-01 08:00:00,1.00,,UK")
    assert (sale.receipt_id, sale.branch_id, sale.pos_id) == ("0007", 2, "POS-4")


def test_descriptions_may_hold_anything_that_csv_can_quote(file: Path) -> None:
    """Commas, quotes, line breaks and pound signs in a description do not disturb."""
    (sale,) = read(file, '1,A,"SET OF 3, ""RETRO"" £5\nCARD",1,2010-12-01 08:00:00,1.00,,UK')
    assert sale.items == (Item(1001, 100),)


def test_plain_and_gzipped_files_read_the_same(file: Path, tmp_path: Path) -> None:
    """Compression is seen from the content; carriage returns, a byte order mark and empty lines do no harm."""
    expected = read(file, GOOD)
    zipped = tmp_path / "sales.csv.gz"
    zipped.write_bytes(gzip.compress(file.read_bytes()))
    unusual = tmp_path / "unusual.csv"
    unusual.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert read_sales(zipped) == read_sales(unusual) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (GOOD.replace(",6,", ",six,"), "Quantity 'six' is no number"),
        (GOOD.replace(",6,", ",,"), "Quantity '' is no number"),
        (GOOD.replace(",6,", ",٦,"), "Quantity '٦' is no number"),
        (GOOD.replace("2.55", "2,55"), "has 9 columns instead of 8"),
        (GOOD.replace("2.55", "nan"), "UnitPrice 'nan' is no number"),
        (GOOD.replace("2.55", "1" * 40), "UnitPrice '1111111111111111111111111111111111111111' is no number"),
        (GOOD.replace("2.55", ""), "UnitPrice '' is no number"),
        (GOOD.replace("2010-12-01", "2010-02-30"), "'2010-02-30 08:26:00' is no date"),
        (GOOD.replace("08:26", "24:26"), "'2010-12-01 24:26:00' is no date"),
        (GOOD.replace("2010-12-01", "２０１０-12-01"), "'２０１０-12-01 08:26:00' is no date"),
        (GOOD.replace("536365", ""), "InvoiceNo is empty"),
        (GOOD.replace("85123A", ""), "StockCode is empty"),
        (GOOD.removesuffix(",United Kingdom"), "has 7 columns instead of 8"),
        ("C1,A,,x,2010-12-01 08:00:00,1.00,,UK", "Quantity 'x' is no number"),
    ],
)
def test_a_broken_line_is_named(file: Path, row: str, reason: str) -> None:
    """A line that breaks the format, kept or not, makes the file unreadable; the message names it and why."""
    write(file, GOOD, row, GOOD)
    assert problem(file).startswith(f"line 3: {reason}")


def test_all_broken_lines_are_named_up_to_twenty(file: Path) -> None:
    """The message lists the first twenty broken lines and counts the others; good ones are not named."""
    write(file, GOOD, *[GOOD.replace(",6,", ",x,")] * 25)
    with pytest.raises(BrokenRows) as caught:
        read_sales(file)
    text = str(caught.value)
    assert "line 3: " in text and "line 22: " in text
    assert "line 2: " not in text and "line 23: " not in text
    assert text.endswith("and 5 more such lines")


def test_line_numbers_count_the_lines_of_the_file(file: Path) -> None:
    """A quoted line break before a broken line does not shift its number."""
    write(file, '1,A,"two\nlines",1,2010-12-01 08:00:00,1.00,,UK', GOOD.replace(",6,", ",x,"))
    assert problem(file).startswith("line 4: ")


def test_another_header_is_refused(file: Path) -> None:
    """A missing or a doubled column is told before any line is read; one that is moved or more is none."""
    expected = read(file, GOOD)
    write(file, GOOD, header=HEADER.replace("Quantity", "Amount"))
    assert problem(file).startswith("line 1: the header lacks what the map names: quantity = 'Quantity'; it has")
    write(file, GOOD, header=HEADER.replace("Country", "Quantity"))
    assert problem(file) == "line 1: the header has Quantity twice"
    write(file, f"x,{GOOD}", header=f"Extra,{HEADER}")
    assert read_sales(file) == expected


def test_a_file_that_is_no_text_is_refused(file: Path) -> None:
    file.write_bytes(bytes(range(256)) * 40)
    assert "it is no text" in problem(file)


def test_an_open_quote_is_refused(file: Path) -> None:
    """A quote without its end would swallow the rest of the file."""
    write(file, GOOD, GOOD.replace("HEART", '"HEART'), GOOD)
    assert "is no CSV" in problem(file)


def test_an_invoice_too_big_for_a_sale_is_refused(file: Path) -> None:
    """More products than the service takes in one sale are told before anything is sent."""
    write(file, GOOD, *[f"7,{i},,1,2010-12-01 08:00:00,1.00,,UK" for i in range(2_001)])
    assert problem(file) == "line 3: receipt 7 has more than 2,000 different products"


def test_damaged_and_pretended_gzip_is_refused(tmp_path: Path) -> None:
    """Cut off, damaged, or no gzip at all despite the name: none of it is used."""
    file = tmp_path / "sales.csv.gz"
    whole = gzip.compress("\n".join([HEADER, *[GOOD] * 1000]).encode())
    for content, reason in (
        (whole[:-20], "cut off"),
        (whole[:30], "cut off"),
        (whole[:40] + b"\xff\xff\xff\xff" + whole[44:], "damaged"),
        (whole + b"something else", "damaged"),
        (HEADER.encode(), "not gzipped"),
        (b"", "it is empty"),
    ):
        file.write_bytes(content)
        assert reason in problem(file)


def test_files_without_a_sale_are_refused(file: Path) -> None:
    """An empty file, a header alone and cancellations alone hold nothing to replay."""
    file.write_bytes(b"")
    assert problem(file) == "it is empty"
    write(file)
    assert problem(file) == "it holds no sale"
    write(file, "C" + GOOD)
    assert problem(file) == "it holds no sale"


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    """A wrong path and a directory are told as what they are."""
    assert problem(tmp_path / "none.csv") == "No such file or directory"
    assert problem(tmp_path) == "Is a directory"


def test_the_real_file_gives_its_known_figures() -> None:
    """The whole UCI file maps to the figures that anybody can compute from it by the rules."""
    path = os.environ.get("ONLINE_RETAIL_FILE")
    if not path:
        pytest.skip("ONLINE_RETAIL_FILE is not set: the UCI file is not part of the project")
    sales = read_sales(Path(path))
    visits = Counter(sale.customer_id for sale in sales)
    revenue_cents: Counter[int] = Counter()
    units: Counter[int] = Counter()
    for sale in sales:
        revenue_cents[sale.branch_id] += sale.total_cents
        units.update(item.product_id for item in sale.items)

    assert len(sales) == 19_959
    assert units.total() == 519_598
    assert len(units) == 3_920
    assert revenue_cents == {1: 69646507, 2: 63604421, 3: 69468615}
    assert visits.pop(None) == 1_427
    assert len(visits) == 4_338
    assert sum(count >= 3 for count in visits.values()) == 2_010
    assert len({sale.purchase_time.date() for sale in sales}) == 305
    assert len({(sale.purchase_time.date(), sale.branch_id) for sale in sales}) == 915
    assert units.most_common(5) == [(4537, 2198), (4516, 2089), (2349, 1988), (3734, 1685), (1181, 1565)]
    assert max(len(sale.items) for sale in sales) == 1_110
