"""`python -m analytics_svc report`, beside the owner's own books, on terminals of any width."""

import asyncio
import io
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import pytest
from rich.console import Console

from analytics_svc.__main__ import commands
from analytics_svc.commands import figures, report_page
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub
from tests.integration.conftest import free_address
from tests.integration.owners_books import Books
from tests.integration.purchase_events import query
from tests.integration.serve.test_owners_questions import chain_with_night_shifts, serving

ZONE, DAYS = "Europe/Berlin", 30


@pytest.fixture
def books() -> Books:
    return chain_with_night_shifts(ZONE, sales=500, seed=71)


@asynccontextmanager
async def target(url: str, books: Books) -> AsyncIterator[str]:
    """The address of a running server that has counted the sales."""
    address = free_address()
    async with serving(url, ZONE, books, address):
        yield address


@pytest.fixture
def berlin_db(analytics_db: str) -> str:
    query(analytics_db, f"UPDATE analytics_settings SET time_zone = '{ZONE}'")
    return analytics_db


async def run(address: str, *arguments: str) -> int:
    with mock.patch.dict(os.environ, {"ANALYTICS_TARGET": address}):
        return await asyncio.to_thread(commands.carry_out, ["report", *arguments])


async def test_json_has_the_figures(berlin_db: str, books: Books, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the latest days with sales, all time, and the days before."""
    async with target(berlin_db, books) as address:
        printed = []
        for arguments in (["--days", str(DAYS)], ["--days", str(DAYS), "--branch", "2"], ["--branch", "99"]):
            capsys.readouterr()
            assert await run(address, "--json", *arguments) == 0
            printed.append(json.loads(capsys.readouterr().out))
    chain, branch, nothing = printed
    for found, chosen in ((chain, books), (branch, books.of(None, None, 2))):
        last = max(entry.day for entry in chosen.entries)
        first = last - timedelta(days=DAYS - 1)
        assert (found["days"][0], found["days"][-1], len(found["days"])) == (str(first), str(last), DAYS)
        of_days = chosen.of(first, last)
        assert sums(found["all_time"]) == chosen.summary()
        assert sums(found["period"]) == of_days.summary()
        assert (
            sums(found["period_before"]) == chosen.of(first - timedelta(days=DAYS), first - timedelta(days=1)).summary()
        )
        assert [
            (product["product_id"], product["quantity"], product["revenue"]) for product in found["top_products"]
        ] == of_days.top_products(figures.TOP, by_revenue=True, ties=False)
        assert [(who["customer_id"], who["purchases"]) for who in found["loyal_customers"]] == [
            (who, purchases) for who, purchases, _ in chosen.loyal_customers(3)[: figures.TOP]
        ]
        daily = {(day, who): revenue for day, who, revenue, *_ in of_days.daily_sales()}
        assert found["revenue"] == {
            str(who): [daily.get((date.fromisoformat(day), who), "0.00") for day in found["days"]]
            for who in sorted({who for _, who in daily})
        }
    assert (nothing["days"], nothing["revenue"], nothing["all_time"]["purchases"]) == ([], {}, 0)


def sums(found: dict[str, Any]) -> tuple[str, int, int]:
    return found["revenue"], found["items"], found["purchases"]


async def test_page_fits_any_terminal(berlin_db: str, books: Books) -> None:
    """From 40 columns on, with a day or a year; nothing is cut off, and nothing is wider than the terminal."""
    async with target(berlin_db, books) as address:
        for days in (1, 30, 366):
            found = await asyncio.to_thread(gather, address, days)
            for width in (40, 66, 80, 100, 200):
                lines = page(found, width)
                assert max(map(len, lines)) <= width
                text = "\n".join(lines)
                assert f"{found.all_time.revenue:,}" in text
                assert "completeness not known" in re.sub(r"\s+", " ", text)
                assert not any("…" in line for line in lines if "branch" in line)


async def test_page_before_the_first_sale(berlin_db: str) -> None:
    async with target(berlin_db, Books([])) as address:
        found = await asyncio.to_thread(gather, address, 28)
    assert "No sale has been counted yet." in "\n".join(page(found, 80))


async def test_page_names_the_cell_that_holds_back(berlin_db: str, books: Books) -> None:
    """Only once the numbers are old: one of several cells is always a moment behind the others."""
    async with target(berlin_db, books) as address:
        found = await asyncio.to_thread(gather, address, 28)
    now = datetime.now(UTC)
    for age_s, told in ((1, False), (600, True)):
        old = found._replace(complete_through=now - timedelta(seconds=age_s), furthest_behind="south")
        assert ("held back by cell south" in " ".join("\n".join(page(old, 120)).split())) is told


def gather(address: str, days: int) -> figures.Report:
    with grpc.insecure_channel(address) as channel:
        return figures.gather(AnalyticsServiceStub(channel), days, None)


def page(found: figures.Report, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    report_page.show(found, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


async def test_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    address = free_address()
    assert await run(address) == 1
    assert f"{address}: UNAVAILABLE" in capsys.readouterr().err


async def test_picture_without_matplotlib(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is said what is missing, and how to get it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "analytics_svc.commands.report_plots", raising=False)
    assert await run(free_address(), "--png", str(tmp_path / "page.png")) == 1
    assert "requirements-plots.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [("--days", "0"), ("--days", "367"), ("--branch", "x"), ("--png", "/no/such/x.png")]
)
async def test_wrong_arguments(arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert await run(free_address(), *arguments) == 2
    assert f"Invalid value for '{arguments[0]}'" in capsys.readouterr().err


def test_sparkline() -> None:
    """The best day is full, the least still shows, and a day without sales is a dot."""
    assert report_page.sparkline([Decimal(n) for n in (0, 1, 50, 100)]) == "·▁▄█"
    assert report_page.sparkline([Decimal(0)]) == "·"
