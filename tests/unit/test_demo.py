"""The demo's own parts: the comparison of control totals, the report, the command line."""

import datetime
import hashlib
import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from chassis import cli
from pos import report
from pos.__main__ import commands
from pos.analytics import Summary, TopProduct
from pos.audit import Audited
from pos.client import DayTotals
from pos.control_totals import POLL_S, STALL_S, Comparison, compare, wait_until_equal
from pos.report import Answers, Sent

MONDAY = datetime.date(2026, 3, 2)
TUESDAY = datetime.date(2026, 3, 3)


def row(day: datetime.date, branch_id: int, purchases: int = 4, *, cents: int = 1234) -> DayTotals:
    return DayTotals(day, branch_id, purchases, 3, 9, cents)


def test_equal_totals_agree_in_any_order() -> None:
    """Both sides agree when every day and branch has the same figures."""
    comparison = compare([row(MONDAY, 1), row(MONDAY, 2)], [row(MONDAY, 2), row(MONDAY, 1)])
    assert comparison.agrees
    assert (comparison.rows, comparison.purchases, comparison.arrived) == (2, 8, 8)


@pytest.mark.parametrize("field", ["purchase_count", "purchase_with_customer_count", "item_count", "revenue_cents"])
def test_each_figure_is_compared(field: str) -> None:
    """A difference of one in a single figure is a difference, and the message says which and by how much."""
    good = row(MONDAY, 1)
    bad = good._replace(**{field: getattr(good, field) - 1})
    comparison = compare([good], [bad])
    assert not comparison.agrees
    assert str(comparison.lags[0]).startswith("2026-03-02, branch 1: -1 ")


def test_missing_and_surplus_rows_differ() -> None:
    """A branch that only one side knows on a day of business differs, whichever side it is."""
    comparison = compare([row(MONDAY, 1)], [row(MONDAY, 2, 5)])
    assert [str(lag).partition(" purchases")[0] for lag in comparison.lags] == [
        "2026-03-02, branch 1: -4",
        "2026-03-02, branch 2: +5",
    ]


def test_days_without_any_recorded_purchase_are_foreign() -> None:
    """A day that only the read models know is named and kept apart; it neither agrees nor differs."""
    comparison = compare([row(MONDAY, 1)], [row(MONDAY, 1), row(TUESDAY, 1), row(TUESDAY, 2)])
    assert comparison.agrees
    assert comparison.foreign_days == [TUESDAY]
    assert comparison.rows == 1


def wait(recorded: Iterator[list[DayTotals]], counted: Iterator[list[DayTotals]]) -> tuple[Comparison, float]:
    """The outcome of waiting for what the iterators give, read by read, and the seconds it asked to pause."""
    pauses: list[float] = []
    outcome = wait_until_equal(lambda: next(recorded), lambda: next(counted), lambda _: None, pauses.append)
    return outcome, sum(pauses)


def test_waiting_ends_with_equality() -> None:
    """The read models are read again and again until they have everything; what was recorded is read once."""
    counted = iter([[], [row(MONDAY, 1, 2)], [row(MONDAY, 1)]])
    comparison, waited_s = wait(iter([[row(MONDAY, 1)]]), counted)
    assert comparison.agrees
    assert waited_s == 2 * POLL_S


def test_waiting_ends_when_nothing_moves_any_more() -> None:
    """Without any change the wait ends after the stall time, with the difference; each change grants it anew."""

    def stuck() -> Iterator[list[DayTotals]]:
        yield []
        yield []
        while True:
            yield [row(MONDAY, 1, 1)]

    comparison, waited_s = wait(iter([[row(MONDAY, 1)]]), stuck())
    assert not comparison.agrees
    assert len(comparison.lags) == 1
    assert waited_s == 2 * POLL_S + STALL_S


def test_sales_made_meanwhile_by_others_are_waited_for_too() -> None:
    """When the read models are ahead, what is recorded is read again, on known days and on new ones."""
    before, after = [row(MONDAY, 1, 4)], [row(MONDAY, 1, 5), row(TUESDAY, 1)]
    comparison, _ = wait(iter([before, after]), iter([after, after]))
    assert comparison.agrees
    assert comparison.foreign_days == []


DAILY = [row(TUESDAY, 1, cents=5), row(MONDAY, 10, cents=100), row(MONDAY, 2, cents=123450)]


def test_daily_sales_have_the_published_fingerprint() -> None:
    """The hash is over plain lines by day, then branch as a number, with two decimals."""
    lines = "2026-03-02,2,1234.50,9\n2026-03-02,10,1.00,9\n2026-03-03,1,0.05,9\n"
    assert report.daily_sales_sha256(DAILY) == hashlib.sha256(lines.encode()).hexdigest()


def some_answers() -> Answers:
    products = [TopProduct(i, 100 - i, 1) for i in range(1, 8)]
    return Answers(Summary(202719540, 519598, 19959, 4338, None, 3), DAILY, 2010, products)


@pytest.mark.parametrize("counted", [[row(MONDAY, 1)], [row(MONDAY, 1, 3)]], ids=["equal", "different"])
def test_page_is_plain_text(counted: list[DayTotals], capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever reads it from a pipe finds neither colours nor the names of colours in it."""
    comparison = compare([row(MONDAY, 1)], counted)
    comparison = comparison._replace(audited=Audited(False, 3, ["day 1: [red] herring"], 0))
    report.print_all(some_answers(), comparison, Sent(100, 0, 5, 8.0), cli.console())
    said = capsys.readouterr().out
    assert "day 1: [red] herring" in said
    assert said.count("[") == 1


def test_report_has_the_keys_programs_rely_on() -> None:
    """The report is one JSON object; revenue is a number with exactly two decimals that no float has touched."""
    answers = some_answers()
    text = report.as_json(answers, compare([], []), Sent(100, 0, 5, 8.0))
    loaded = json.loads(text, parse_float=Decimal)
    assert list(loaded)[:10] == [
        "purchases",
        "items",
        "revenue",
        "unique_customers",
        "loyal_customers",
        "top_products",
        "daily_sales_sha256",
        "control_totals_agree",
        "duplicates_sent",
        "seconds",
    ]
    assert '"revenue": 2027195.40,' in text
    assert loaded["purchases"] == 19959
    assert loaded["top_products"] == [{"product_id": i, "quantity": 100 - i} for i in range(1, 6)]
    assert loaded["control_totals_agree"] is True
    assert loaded["duplicates_sent"] == 5
    assert loaded["purchases_per_second"] == Decimal("12.5")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--limit", "0"],
        ["--limit", "many"],
        ["--seed", "x"],
        ["--report", "/nowhere/report.json"],
        ["--unknown"],
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong argument is told before anything is sent."""
    assert commands.carry_out(["demo", *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err


def test_unreadable_input_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A broken file is told with its name, and nothing is sent."""
    file = tmp_path / "broken.csv"
    file.write_text("not,the,header\n")
    assert commands.carry_out(["demo", "--file", str(file)]) == 2
    said = capsys.readouterr().err
    assert str(file) in said
    assert "nothing was sent" in said


def test_wrong_settings_end_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An address that is none is told with the variable's name."""
    monkeypatch.setenv("PURCHASES_TARGET", "nowhere")
    assert commands.carry_out(["demo"]) == 2
    assert "PURCHASES_TARGET" in capsys.readouterr().err
