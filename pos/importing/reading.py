"""A file of rows: its encoding and its delimiter are found out, its values stay the text that they are."""

import codecs
import contextlib
import csv
import gzip
import importlib
import io
import itertools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
SAMPLE_ROWS = 200  # by which the delimiter is told
FIELD_CHARACTERS_MAX = 1 << 20
PARQUET_ROWS = 10_000  # read at a time

_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig", "UTF-8 with a byte order mark"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
)


class UnreadableFile(Exception):
    """The file is not what it should be; nothing of it was used."""


class Row(NamedTuple):
    """One row; `line` is where it ends, counted from 1."""

    line: int
    values: list[str]


class Found(NamedTuple):
    """What a file turned out to be."""

    kind: str  # for people: "CSV", "Parquet"
    encoding: str  # Python's name; empty for Parquet
    encoding_text: str
    delimiter: str
    header: list[str]


class Source:
    """Rows of a CSV, TSV or Parquet file, plain or gzipped. May be read any number of times."""

    def __init__(self, path: Path, *, encoding: str = "", delimiter: str = "", columns: Sequence[str] = ()) -> None:
        """What is given is not looked for. `columns` are names that its header should have.

        Raises:
            UnreadableFile
        """
        self.path = path
        csv.field_size_limit(FIELD_CHARACTERS_MAX)
        try:
            with path.open("rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise self._unreadable(error.strerror or str(error)) from None
        if not magic:
            raise self._unreadable("it is empty")
        self._gzipped = magic.startswith(_GZIP)
        if path.suffix == ".gz" and not self._gzipped:
            raise self._unreadable("it is not gzipped, although its name says so")
        if magic == _PARQUET:
            self.found = Found("Parquet", "", "", "", [name for name, *_ in self._parquet("LIMIT 0").description])
            return
        encoding, told = (encoding, encoding) if encoding else self._encoding()
        self._encoding_name = encoding
        try:
            delimiter = delimiter or self._delimiter(columns)
        except csv.Error as error:
            raise self._unreadable(f"line 1: is no CSV: {error}") from None
        self.found = Found("TSV" if delimiter == "\t" else "CSV", encoding, told, delimiter, [])
        header = next(self._text_rows(delimiter), None)
        if header is None:
            raise self._unreadable("it has no rows")
        self.found.header.extend(name.strip() for name in header.values)

    def rows(self) -> Iterator[Row]:
        """Those below the header.

        Raises:
            UnreadableFile: it ends in the middle, or is no CSV from some line on.
        """
        if self.found.kind == "Parquet":
            cursor = self._parquet("")
            number = itertools.count(1)
            while rows := cursor.fetchmany(PARQUET_ROWS):
                for row in rows:
                    yield Row(next(number), ["" if value is None else value for value in row])
            return
        rows_of_text = self._text_rows(self.found.delimiter)
        next(rows_of_text)
        yield from rows_of_text

    def _text_rows(self, delimiter: str) -> Iterator[Row]:
        with self._text() as text:
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            try:
                for values in reader:
                    if values:  # not an empty line
                        yield Row(reader.line_num, values)
            except csv.Error as error:  # quotes that do not match: where the next row begins is anyone's guess
                raise self._unreadable(f"line {reader.line_num}: is no CSV: {error}") from None
            except UnicodeError as error:
                raise self._unreadable(f"after line {reader.line_num}: is not {self._encoding_name}: {error}") from None
            except EOFError:
                raise self._unreadable("it is cut off: the gzip stream has no end") from None
            except (gzip.BadGzipFile, zlib.error) as error:
                raise self._unreadable(f"its gzip stream is damaged: {error}") from None

    def _bytes(self) -> IO[bytes]:
        return gzip.open(self.path) if self._gzipped else self.path.open("rb")  # type: ignore[return-value]

    def _text(self) -> IO[str]:
        return io.TextIOWrapper(self._bytes(), encoding=self._encoding_name, newline="")

    def _encoding(self) -> tuple[str, str]:
        """By its mark; else by what all of it can be."""
        try:
            with self._bytes() as file:
                first = file.read(1 << 16)
                for mark, name, told in _BOMS:
                    if first.startswith(mark):
                        return name, told
                if b"\0" in first:
                    even, odd = first[::2].count(0), first[1::2].count(0)
                    if max(even, odd) < len(first) // 5:
                        raise self._unreadable("it holds NUL bytes: it is no text")
                    name = "utf-16-be" if even > odd else "utf-16-le"
                    return name, "UTF-16 without a byte order mark"
                decoder = codecs.getincrementaldecoder("utf-8")()
                piece = first
                while piece:
                    decoder.decode(piece)
                    piece = file.read(1 << 20)
                decoder.decode(b"", final=True)
                return "utf-8", "UTF-8"
        except UnicodeDecodeError:
            return "cp1252", "Latin-1 (Windows-1252), as it is not UTF-8"
        except EOFError:
            raise self._unreadable("it is cut off: the gzip stream has no end") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise self._unreadable(f"its gzip stream is damaged: {error}") from None

    def _delimiter(self, columns: Sequence[str]) -> str:
        """By which the header has the columns, or else rows have the most columns, and all as many."""

        def merit(delimiter: str) -> tuple[int, float, int]:
            rows: list[list[str]] = []
            with contextlib.suppress(UnreadableFile):  # told when all of it is read
                rows += (row.values for row in itertools.islice(self._text_rows(delimiter), SAMPLE_ROWS))
            if not rows:
                return 0, 0.0, 0
            header = [name.strip() for name in rows[0]]
            known = sum(name in header for name in columns)
            return known, sum(len(row) == len(header) for row in rows) / len(rows) * (len(header) > 1), len(header)

        return max(DELIMITERS, key=merit)

    def _parquet(self, limit: str) -> Any:
        """A cursor over all columns as text: decimals, and the shortest text that a float has."""
        try:
            duckdb = importlib.import_module("duckdb")
        except ModuleNotFoundError:
            raise self._unreadable("Parquet wants pip install 'retail-backbone[import]'") from None
        try:
            return duckdb.connect().execute(
                f"SELECT COLUMNS(*)::VARCHAR FROM read_parquet(?) {limit}", [str(self.path)]
            )
        except duckdb.Error as error:
            raise self._unreadable(str(error).splitlines()[0]) from None

    def _unreadable(self, reason: str) -> UnreadableFile:
        return UnreadableFile(f"cannot read {self.path}: {reason}")
