"""The importer: what it finds out about a file, what its maps mean, and that every row and cent is accounted for."""

import datetime
import gzip
import json
from decimal import Decimal
from pathlib import Path
from zoneinfo import ZoneInfo

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pos.client import Sale
from pos.importing import forms, maps
from pos.importing.books import Books
from pos.importing.forms import Dates, Doubtful
from pos.importing.guess import guess
from pos.importing.maps import BadMap
from pos.importing.reading import Source, UnreadableFile

UTC = ZoneInfo("UTC")
PLAIN = """
[columns]
receipt = "Receipt"
date = "Date"
product = "Article"
quantity = "Quantity"
price = "Price"
"""
HEADER = "Receipt;Date;Article;Quantity;Price"


def books(path: Path, text: str, **options: str) -> Books:
    meaning = maps.parse(text, "test")
    return Books(Source(path, columns=list(meaning.columns.values()), **options), meaning)


def write(path: Path, *rows: str, header: str = HEADER, encoding: str = "utf-8") -> Path:
    path.write_bytes("\r\n".join([header, *rows, ""]).encode(encoding))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "books.csv"


def refused(path: Path, text: str) -> str:
    with pytest.raises(UnreadableFile) as caught:
        list(books(path, text).make())
    return str(caught.value)


@pytest.mark.parametrize(
    ("texts", "sign"),
    [
        ({"1", "2.50", "1,234.00"}, "."),
        ({"1", "2,50", "1.234,00"}, ","),
        ({"1.234.567"}, ","),
        ({"7", "12"}, "."),
        ({"$1,234", "$0.99"}, "."),
        ({"1,234", "2,5"}, ","),
        ({"2.55E+00"}, "."),
        ({""}, "."),
    ],
)
def test_decimal_sign(texts: set[str], sign: str) -> None:
    assert forms.decimal_sign(texts) == sign


@pytest.mark.parametrize("texts", [{"1,234"}, {"1.50", "2,50"}, {"12,345", "1"}])
def test_doubtful_decimals(texts: set[str]) -> None:
    with pytest.raises(Doubtful):
        forms.decimal_sign(texts)


@pytest.mark.parametrize(
    ("text", "sign", "value"),
    [
        ("2.55", ".", "2.55"),
        (" $1,234.50 ", ".", "1234.50"),
        ("1.234,50 €", ",", "1234.50"),
        ("1'234.50", ".", "1234.50"),
        ("1\u00a0234,50", ",", "1234.50"),
        ("EUR 3,00", ",", "3.00"),
        ("3.00 GBP", ".", "3.00"),
        ("(4.00)", ".", "-4.00"),
        ("4.00-", ".", "-4.00"),
        ("2.55E+00", ".", "2.55"),
        ("0.1", ".", "0.1"),
        ("", ".", None),
        ("nan", ".", None),
        ("Infinity", ".", None),
        ("1.2.3", ".", None),
        ("１", ".", None),
        ("9" * 31, ".", None),
    ],
)
def test_numbers_are_exact(text: str, sign: str, value: str | None) -> None:
    assert forms.number(text, sign) == (Decimal(value) if value else None)


@pytest.mark.parametrize(
    ("texts", "order"),
    [
        ({"2010-12-01 08:26:00"}, "YMD"),
        ({"13/1/2019", "1/2/2019"}, "DMY"),
        ({"1/13/2019 1:08:00 PM", "1/2/2019"}, "MDY"),
        ({"01.12.2010 08:26", "31.12.2010"}, "DMY"),
        ({"2010-12-01T08:26:00Z"}, "YMD"),
    ],
)
def test_date_order(texts: set[str], order: str) -> None:
    assert forms.date_order(texts).order == order


@pytest.mark.parametrize("texts", [{"1/2/2019"}, {"13/1/2019", "1/13/2019"}, {"2019-01-02", "31/1/2019"}])
def test_doubtful_dates(texts: set[str]) -> None:
    with pytest.raises(Doubtful):
        forms.date_order(texts)


@pytest.mark.parametrize(
    ("date", "time", "order", "zone", "expected"),
    [
        ("2010-12-01 08:26:00", "", "YMD", "UTC", "2010-12-01T08:26:00"),
        ("12/1/2010 8:26", "", "MDY", "UTC", "2010-12-01T08:26:00"),
        ("1/5/2019", "1:08:00 PM", "MDY", "UTC", "2019-01-05T13:08:00"),
        ("1/5/2019 12:30 AM", "", "MDY", "UTC", "2019-01-05T00:30:00"),
        ("1.7.10 08:26", "", "DMY", "Europe/Berlin", "2010-07-01T06:26:00"),
        ("2010-12-01T08:26:00.5+01:30", "", "YMD", "Europe/Berlin", "2010-12-01T06:56:00.500000"),
        ("2010-12-01", "", "YMD", "UTC", "2010-12-01T12:00:00"),
        ("2026-10-25 02:30", "", "YMD", "Europe/Berlin", "2026-10-25T00:30:00"),
        ("2010-02-30", "", "YMD", "UTC", None),
        ("2010-12-01 24:00", "", "YMD", "UTC", None),
        ("1/5/2019", "13:08 PM", "MDY", "UTC", None),
        ("yesterday", "", "YMD", "UTC", None),
    ],
)
def test_moments(date: str, time: str, order: str, zone: str, expected: str | None) -> None:
    moment = forms.moment(date, time, Dates(order, two_digit_years=False), ZoneInfo(zone))
    assert moment == (datetime.datetime.fromisoformat(expected).replace(tzinfo=UTC) if expected else None)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_delimiter_and_encoding_are_found(file: Path, delimiter: str, encoding: str) -> None:
    """And a file that is gzipped is none the less."""
    rows = ["1;2010-12-13 10:00;café, 1 £;1;2.50", "2;2010-12-13 10:00;two;1;3.50"]
    quoted = [row.replace("café, 1 £", '"café, 1 £"').replace(";", delimiter) for row in rows]
    write(file, *quoted, header=HEADER.replace(";", delimiter), encoding=encoding)
    file.write_bytes(gzip.compress(file.read_bytes()))
    read = books(file, PLAIN + '[rules]\nproduct_ids = "hashed"')
    assert read.source.found.delimiter == delimiter and read.source.found.header == HEADER.split(";")
    assert (read.sales, read.amount, read.balance) == (2, Decimal("6.00"), Decimal(0))
    assert "café, 1 £" in read._codes


def test_parquet_is_read_without_floats(tmp_path: Path) -> None:
    path = tmp_path / "books.parquet"
    duckdb.connect().sql(
        "SELECT 7 AS Receipt, TIMESTAMP '2010-12-01 08:26:00' AS Date, 4711 AS Article, 1 AS Quantity, x AS Price"
        " FROM (VALUES (0.1::double), (0.2::double)) t(x)"
    ).write_parquet(str(path))
    read = books(path, PLAIN + '[rules]\nrepeated = "sum"')
    (sale,) = read.make()
    assert read.source.found.kind == "Parquet" and sale.total_cents == 30 and read.balance == 0
    assert sale.purchase_time == datetime.datetime(2010, 12, 1, 8, 26, tzinfo=UTC)
    (tmp_path / "broken.parquet").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UnreadableFile):
        Source(tmp_path / "broken.parquet")


def test_what_a_map_has_not_decided_about_is_refused(file: Path) -> None:
    """Nothing is cut, summed or left out unless somebody says so; all such rows are named at once."""
    write(
        file,
        "1;2010-12-13;11;2;1.50",
        "2;2010-12-13;11;-1;1.50",
        "3;2010-12-13;11;1;1.50",
        "3;2010-12-13;11;1;1.50",
        "4;2010-12-13;11;0.345;1.50",
        "INV-5;2010-12-13;11;1;1.50",
    )
    text = refused(file, PLAIN)
    assert "line 2: quantity 2: the map's rules.quantity" in text
    assert "line 3: is a return: the map's rules.returns" in text
    assert "line 5: product '11' is in receipt 3 twice" in text
    assert "line 6: quantity 0.345" in text
    assert "line 7" not in text  # an invoice with letters is a sale


RULES = (
    '[rules]\nquantity = "line"\nreturns = "leave_out"\nrepeated = "sum"\nbroken = "leave_out"\nfree = "leave_out"\n'
)


def test_whatever_is_left_out_is_counted(file: Path) -> None:
    """By its reason, with its amount; half a receipt is none; the sums balance."""
    write(
        file,
        "1;2010-12-13;11;3;1.50",
        "1;2010-12-13;11;1;2.00",
        "2;2010-12-13;12;-2;1.50",
        "3;2010-12-13;12;0;1.50",
        "4;2010-12-13;12;1;0.00",
        "5;2010-12-13;12;1;7.00",
        "5;no date;12;1;8.00",
        "6;2010-12-13;12;x;8.00",
        "7;2010-12-13;12;1",
        "8;2010-12-13;12;1;0.3333",
    )
    read = books(file, PLAIN + RULES)
    sales = {sale.receipt_id: sale.total_cents for sale in read.make()}
    assert sales == {"1": 650, "8": 33}
    assert {reason: (note.rows, note.amount, note.amounts_unknown) for reason, note in read.left_out.items()} == {
        "a return: quantity or amount is negative": (1, Decimal("-3.00"), 0),
        "quantity is 0": (1, Decimal(0), 0),
        "free of charge, or less than half a cent": (1, Decimal(0), 0),
        "broken: date is no date": (1, Decimal(0), 1),
        "broken: quantity is no number": (1, Decimal(0), 1),
        "broken: another number of columns": (1, Decimal(0), 1),
        "other rows of a broken receipt": (1, Decimal("7.00"), 0),
    }
    assert {rule: note.amount for rule, note in read.taken_off.items()} == {"rounded to whole cents": Decimal("0.0033")}
    assert read.rows == 10 and read.balance == 0
    assert read.left_out["broken: date is no date"].examples[0].line == 8


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(["1", "2", "C3"]),
            st.sampled_from(["2010-12-13", "2010-12-14 10:00", "x"]),
            st.sampled_from(["11", "12", ""]),
            st.sampled_from(["1", "2", "0.345", "-1", "0", "y", "1.000"]),
            st.sampled_from(["1.50", "0.00", "-2.00", "0.3333", "1,234.56", "$9", ""]),
        ),
        min_size=1,
        max_size=30,
    ),
    quantity=st.sampled_from(["one", "line"]),
    repeated=st.sampled_from(["first", "sum"]),
    receipts=st.sampled_from(["unique", "daily"]),
    free=st.sampled_from(["keep", "leave_out"]),
)
def test_every_cent_is_accounted_for(
    rows: list[tuple[str, ...]],
    quantity: str,
    repeated: str,
    receipts: str,
    free: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Of any file by any rules: what is in it is sent, left out or taken off; and read again, it is the same."""
    path = write(tmp_path_factory.mktemp("books") / "books.csv", *map(";".join, rows))
    text = PLAIN + (
        f'[rules]\nquantity = "{quantity}"\nrepeated = "{repeated}"\nreceipts = "{receipts}"\nfree = "{free}"\n'
        'returns = "leave_out"\nbroken = "leave_out"\nsale_receipts = "[0-9]+"\n'
    )
    try:
        read, again = books(path, text), books(path, text)
    except UnreadableFile:  # such as one that holds no sale
        return
    sales = list(read.make())
    assert read.balance == 0 and read.rows == len(rows)
    assert sum(sale.total_cents for sale in sales) == read.sent_amount * 100
    assert sales == list(again.make())
    assert len({sale.idempotency_key for sale in sales}) == len(sales)


ONLINE_RETAIL = (
    "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country",
    "536365,85123A,HEART,6,12/1/2010 8:26,2.55,17850,United Kingdom",
    "536365,71053,LANTERN £,6,12/1/2010 8:26,3.39,17850,United Kingdom",
    "536365,71053,LANTERN,1,12/1/2010 8:26,3.39,17850,United Kingdom",
    "C536379,D,Discount,-1,12/1/2010 9:41,27.5,14527,United Kingdom",
    "A563185,B,Adjust,1,8/12/2011 14:50,11062.06,,United Kingdom",
    "536414,22139,,56,12/13/2010 11:52,0,,United Kingdom",
)
ONLINE_RETAIL_II = (
    "Invoice,StockCode,Description,Quantity,InvoiceDate,Price,Customer ID,Country",
    "489434,85048,LIGHTS,12,2009-12-01 07:45:00,6.95,13085.0,United Kingdom",
    "C489449,22087,BUNTING,-12,2009-12-01 10:33:00,2.95,16321.0,Australia",
)
SUPERMARKET = (
    "Invoice ID,Branch,City,Customer type,Gender,Product line,Unit price,Quantity,Tax 5%,Total,Date,Time,Payment,cogs",
    "750-67-8428,A,Yangon,Member,Female,Health and beauty,$74.69,7,26.1415,548.9715,1/5/2019,1:08:00 PM,Ewallet,522.83",
    "226-31-3081,C,Naypyitaw,Normal,Female,Accessories,$15.28,5,3.82,80.22,3/18/2019,10:29:00 AM,Cash,76.4",
)
LOYVERSE = (
    "Date,Receipt number,Receipt type,Category,SKU,Item,Variant,Quantity,Gross sales,Discounts,Net sales,POS,Store",
    "25/03/2026 10:11,1-1001,Sale,Fruit,10001,Apples,,0.345,1.38,0.00,1.38,POS-1,Main street",
    "25/03/2026 10:11,1-1001,Sale,Bread,10002,Roll,,3.000,1.50,0.15,1.35,POS-1,Main street",
    "25/03/2026 12:40,1-1002,Refund,Bread,10002,Roll,,1.000,0.50,0.05,0.45,POS-1,Main street",
)
GERMAN = tuple(
    line.replace(",", ";").replace("12/1/2010", "01.12.2010").replace("12/13/2010", "13.12.2010").replace(".", ",", 0)
    for line in (
        "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country",
        "536365,85123A,HEART,6,12/1/2010 8:26,2_55,17850,United Kingdom",
        "536366,71053,LANTERN,1,12/13/2010 8:26,1.003_39,17850,United Kingdom",
    )
)


def public(name: str, path: Path, more: str = "") -> Books:
    meaning = maps.load(name)
    if more:
        (path.parent / "map.toml").write_text((Path(maps.__file__).parent / "maps" / f"{name}.toml").read_text() + more)
        meaning = maps.load(str(path.parent / "map.toml"))
    return Books(Source(path, columns=list(meaning.columns.values())), meaning)


def totals(sales: list[Sale]) -> dict[str, int]:
    return {sale.receipt_id: sale.total_cents for sale in sales}


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "utf-16", "utf-8-sig"])
def test_online_retail_as_most_people_have_it(file: Path, encoding: str) -> None:
    """12/1/2010 8:26, £ in Latin-1: the amounts that were paid; with letters it is a sale, unless it is a return."""
    write(file, *ONLINE_RETAIL[1:], header=ONLINE_RETAIL[0], encoding=encoding)
    read = public("online_retail", file)
    sales = list(read.make())
    assert totals(sales) == {"536365": 1530 + 2034 + 339, "A563185": 1106206, "536414": 0}
    assert read.dates.order == "MDY" and read.balance == 0
    assert {reason: note.amount for reason, note in read.left_out.items()} == {
        "a return: quantity or amount is negative": Decimal("-27.5")
    }
    assert sales[0].purchase_time == datetime.datetime(2010, 12, 1, 8, 26, tzinfo=UTC)


def test_online_retail_with_semicolons_and_commas(file: Path) -> None:
    """The form in which German and Turkish copies circulate."""
    write(file, *(row.replace("_", ",") for row in GERMAN[1:]), header=GERMAN[0])
    read = public("online_retail", file)
    assert (read.source.found.delimiter, read.decimal, read.dates.order) == (";", ",", "DMY")
    assert totals(list(read.make())) == {"536365": 1530, "536366": 100339}


def test_online_retail_ii(file: Path) -> None:
    write(file, *ONLINE_RETAIL_II[1:], header=ONLINE_RETAIL_II[0])
    read = public("online_retail_ii", file)
    assert totals(list(read.make())) == {"489434": 8340}
    assert read.left_out["a return: quantity or amount is negative"].amount == Decimal("-35.40") and read.balance == 0


def test_supermarket_sales(file: Path) -> None:
    """Numbers with hyphens, dollars, a tax on top that is in the total, quantities of up to ten."""
    write(file, *SUPERMARKET[1:], header=SUPERMARKET[0])
    read = public("supermarket_sales", file)
    sales = list(read.make())
    assert totals(sales) == {"750-67-8428": 54897, "226-31-3081": 8022} and read.balance == 0
    assert [sale.branch_id for sale in sales] == [1, 3]
    assert sales[0].purchase_time == datetime.datetime(2019, 1, 5, 6, 38, tzinfo=UTC)  # 13:08 in Yangon


def test_loyverse(file: Path) -> None:
    """Weights, refunds, a byte order mark; a store that has no number yet is asked for."""
    write(file, *LOYVERSE[1:], header=LOYVERSE[0] + ",Customer name", encoding="utf-8-sig")
    path = write(
        file, *(f"{row}," for row in LOYVERSE[1:]), header=LOYVERSE[0] + ",Customer name", encoding="utf-8-sig"
    )
    with pytest.raises(
        UnreadableFile, match="branch 'Main street' is no number: the map's branches has to give it one"
    ):
        public("loyverse", path)
    read = public("loyverse", path, '\n[branches]\n"Main street" = 4\n')
    (sale,) = read.make()
    assert (sale.receipt_id, sale.branch_id, sale.pos_id, sale.total_cents) == ("1-1001", 4, "POS-1", 273)
    assert {reason: (note.rows, note.amount) for reason, note in read.left_out.items()} == {
        "Receipt type is 'Refund'": (1, Decimal("0.45"))
    }
    assert read.balance == 0


def test_taxes_on_top(file: Path) -> None:
    write(file, "1;2010-12-13;11;2;10.00;1.00", header=HEADER + ";VAT")
    rules = '[rules]\ntaxes = "add"\nquantity = "line"'
    read = books(file, PLAIN.replace("[columns]", '[columns]\ntax = "VAT"') + rules)
    assert [sale.total_cents for sale in read.make()] == [2100] and read.balance == 0


def test_numbers_that_come_again(file: Path) -> None:
    """On another day: another sale, if the map says so; otherwise one receipt, of which a product is there twice."""
    write(file, "765;2010-12-13;11;1;1.00", "765;2011-12-13;11;1;2.00")
    assert "twice" in refused(file, PLAIN)
    assert books(file, PLAIN + '[rules]\nreceipts = "daily"').sales == 2


def test_products_that_are_no_numbers(file: Path) -> None:
    write(file, "1;2010-12-13;85123A;1;1.00", "2;2010-12-13;4007381333938;1;2.00")
    assert "1 products are no numbers of 1 to 14 digits, such as '85123A'" in refused(file, PLAIN)
    hashed = [sale.items[0].product_id for sale in books(file, PLAIN + '[rules]\nproduct_ids = "hashed"').make()]
    assert len(set(hashed)) == 2
    numbered = [sale.items[0].product_id for sale in books(file, PLAIN + '[rules]\nproduct_ids = "numbered"').make()]
    assert numbered == [1002, 1001]


def test_a_map_is_told_all_that_is_wrong_with_it() -> None:
    with pytest.raises(BadMap) as caught:
        maps.parse(
            'colour = 1\n[columns]\nreceipt = "R"\nsmell = "S"\n[file]\ndecimal = "x"\n[fixed]\nbranch = 0\n'
            '[rules]\nquantity = "maybe"\ntime_zone = "Mars"\ntaxes = "add"\nsale_receipts = "("\n',
            "bad",
        )
    for problem in (
        "colour is not known",
        "columns.smell is not known",
        "columns.date is missing",
        "columns.product is missing",
        "either price, of one unit, or amount",
        'file.decimal must be "." or ","',
        "fixed.branch must be a whole number",
        "rules.quantity must be one of refuse, one, line",
        "rules.time_zone must be the IANA name",
        'rules.taxes = "add" needs columns.tax',
        "rules.sale_receipts must be a regular expression",
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize("name", maps.built_ins())
def test_maps_that_come_along_can_be_used(name: str) -> None:
    assert maps.load(name).columns


@pytest.mark.parametrize("rows", [ONLINE_RETAIL, ONLINE_RETAIL_II, SUPERMARKET, LOYVERSE])
def test_a_guessed_map_is_a_map(file: Path, rows: tuple[str, ...]) -> None:
    write(file, *rows[1:], header=rows[0])
    text = guess(Source(file))
    meaning = maps.parse(text, "guessed")
    assert {"receipt", "date", "product", "quantity"} <= set(meaning.columns)
    assert json.dumps(meaning.columns["receipt"]) in text
