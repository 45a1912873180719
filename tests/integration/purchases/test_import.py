"""`retail-pos import` against a real service: what it sends, what it says, twice, and with sales that are refused."""

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest

from chassis import cli
from pos.importing import command
from pos.settings import Settings

HEADER = "Receipt,Date,Article,Quantity,Price,Customer,Store"
MAP = """
name = "test"
[columns]
receipt = "Receipt"
date = "Date"
product = "Article"
quantity = "Quantity"
price = "Price"
customer = "Customer"
branch = "Store"
[rules]
time_zone = "Europe/Berlin"
returns = "leave_out"
"""


class Import:
    """A file, its map, and the command."""

    def __init__(self, directory: Path, address: str) -> None:
        self.file, self.map, self.report = (directory / name for name in ("books.csv", "map.toml", "report.json"))
        self._settings = Settings(purchases_target=address)
        self.map.write_text(MAP)

    def write(self, *rows: str) -> None:
        self.file.write_text("\n".join([HEADER, *rows]) + "\n")

    async def run(self, *, dry_run: bool = False) -> tuple[int, dict[str, Any]]:
        with self.report.open("w") as report:
            code = await asyncio.to_thread(
                command.run, self.file, str(self.map), self._settings, cli.console(), dry_run=dry_run, report=report
            )
        text = self.report.read_text()
        return code, json.loads(text) if text else {}


@pytest.fixture
def importing(tmp_path: Path, purchases_address: str, purchases_channel: grpc.aio.Channel) -> Import:
    return Import(tmp_path, purchases_address)


def recorded(database: str) -> tuple[int, str]:
    with psycopg.connect(database) as connection:
        row = connection.execute("SELECT count(*), coalesce(sum(total_amount), 0)::text FROM purchases").fetchone()
    assert row is not None
    return row


ROWS = [
    f"{receipt},2026-03-{1 + receipt % 28:02} 10:{receipt % 60:02},{product},1,{receipt % 90}.{product},{receipt % 7},"
    f"{1 + receipt % 3}"
    for receipt in range(1, 301)
    for product in (11, 12)
]  # fmt: skip


async def test_a_file_comes_in_once(importing: Import, purchases_db: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Sums of the file, of what was sent and of what is stored agree; again, in part or whole, nothing changes."""
    importing.write(*ROWS, "999,2026-03-01,11,-1,5.00,,1")
    code, dry = await importing.run(dry_run=True)
    assert code == 0 and "sent" not in dry and recorded(purchases_db) == (0, "0")
    code, told = await importing.run()
    assert code == 0 and told["agrees"] and told["balance"] == "0.00"
    assert told["left_out"][0]["amount"] == "-5.00" and told["left_out"][0]["examples"][0]["line"] == len(ROWS) + 2
    assert (told["sent"], told["stored"] | {"before": 0}) == (told["to_send"], told["to_send"] | {"before": 0})
    assert recorded(purchases_db) == (300, told["stored"]["amount"])
    assert "All agree." in capsys.readouterr().out
    code, again = await importing.run()
    assert code == 0 and again["stored"]["before"] == 300 and recorded(purchases_db) == (300, told["stored"]["amount"])
    importing.write(*ROWS, "1000,2026-03-01,11,1,5.00,,1")
    code, more = await importing.run()
    assert code == 0 and more["stored"]["before"] == 300 and recorded(purchases_db)[0] == 301


async def test_what_the_service_refuses_is_told(
    importing: Import, purchases_db: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its reason and its receipts; the others are stored, and the exit code says that the sums differ."""
    importing.write("1,2026-03-01,11,1,5.00,,1", "2,1999-03-01,11,1,6.00,,1", "3,2026-03-01,99999999999999,1,7.00,,1")
    code, told = await importing.run()
    assert code == 1 and not told["agrees"]
    assert [(each["reason"], each["sales"], each["amount"]) for each in told["refused"]] == [
        ("PURCHASE_TIME_OUT_OF_RANGE", 1, "6.00")
    ]
    assert recorded(purchases_db) == (2, "12.00")
    assert "receipt 2 of 1999-03-01" in capsys.readouterr().out


async def test_a_file_or_a_map_that_cannot_be_used_sends_nothing(
    importing: Import, purchases_db: str, capsys: pytest.CaptureFixture[str]
) -> None:
    importing.write("1,2026-03-01,11,1,5.00,,1", "2,2026-03-01,11,2,5.00,,1")
    assert (await importing.run())[0] == 2
    assert "line 3: quantity 2: the map's rules.quantity has to say one or line" in capsys.readouterr().err
    importing.map.write_text("colour = 1")
    assert (await importing.run())[0] == 2
    assert "nothing was sent" in capsys.readouterr().err
    assert recorded(purchases_db) == (0, "0")
