"""The arithmetic of the benchmark."""

import datetime
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from deploy.local.machine import StackError
from tests.bench import scoreboard
from tests.bench.analytics import part as analytics
from tests.bench.analytics.asking import Asked
from tests.bench.analytics.questions import questions
from tests.bench.analytics.summaries import ECHO, Load
from tests.bench.figures import Figure, Flow, Goal, Score, median_ratio, middle_flow, percentile
from tests.bench.pipeline.whole import Trial, highest, search
from tests.bench.show import Show
from tests.bench.svg import nice_step

PGBENCH = Figure(1_000.0, 1.0, 2.0, 100.0, 300.0)


def trial(ratio: float, capacity: float) -> Trial:
    """A pipeline that takes in everything, and counts so much of it a second."""
    asked = ratio * PGBENCH.purchases_per_s
    return Trial(PGBENCH, asked, asked, min(asked, capacity), {})


@pytest.mark.parametrize("capacity", [130.0, 600.0, 1_234.0, 1_599.0])
def test_search_finds_the_highest_rate_at_which_the_backlog_does_not_grow(capacity: float) -> None:
    trials = search(0.0, 1.6, 8, lambda ratio: trial(ratio, capacity))
    found = highest(trials)
    assert found.sustained
    assert found.recorded_per_s == pytest.approx(capacity, rel=0.021, abs=1_600 / 2**8)


def test_rate_is_not_sustained_when_sales_are_not_taken_in_or_not_counted() -> None:
    even = trial(0.5, 10_000)
    assert even.sustained
    assert not even._replace(recorded_per_s=0.97 * even.asked_per_s).sustained
    assert not even._replace(counted_per_s=0.97 * even.asked_per_s).sustained


def test_search_without_any_sustained_rate_says_so() -> None:
    with pytest.raises(StackError, match="keeps up with none"):
        highest(search(0.0, 1.6, 4, lambda ratio: trial(ratio, 0.0)))


def test_ratios_are_made_within_rounds() -> None:
    # The second round was ten times as fast for both: the ratio of the medians would be far from either round's.
    assert median_ratio([50, 500, 60], [100, 1_000, 100]) == 0.5


def test_medians_of_flows() -> None:
    flows = [Flow(float(per_s), {"relay": cpu}) for per_s, cpu in ((1, 30.0), (3, 10.0), (2, 20.0))]
    assert middle_flow(flows) == Flow(2.0, {"relay": 20.0})


def test_percentiles() -> None:
    hundred = list(range(100))
    assert [percentile(hundred, percent) for percent in (0, 50, 99, 100)] == [0, 50, 99, 99]


@pytest.mark.parametrize(("rough", "step"), [(0.3, 1), (1, 1), (1.1, 2), (3, 5), (41, 50), (60, 100)])
def test_steps_of_axes(rough: float, step: int) -> None:
    assert nice_step(rough) == step


def test_analytics_tables_have_one_line_for_each_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a narrow terminal, with large figures."""
    monkeypatch.setenv("COLUMNS", "80")
    histories: Any = [SimpleNamespace(times=times) for times in (1, 10, 100)]
    asked = questions(datetime.date(2026, 1, 1), ["customer"])
    ratios = {question.name: 123.45 for question in asked}
    savings = {question.oltp_name: 12_345.67 for question in asked}
    answers = {question.name: [[Asked(1.0, 123.0)] * 3] for question in asked}
    tables = [
        analytics._table_of_answers(histories, answers, {question.name: [123_456.0] for question in asked}),
        analytics._table_of_loads({ECHO: [Load(12_345.0, 1.0, 123.0)]}, 12_345.0),
    ]
    verdicts = analytics._verdicts(ratios, savings, 0.7)
    show = Show()
    for table in tables:
        show.table(*table)
    show.verdicts(verdicts)
    printed = capsys.readouterr().out.splitlines()
    figures = sum(len(lines) for _, _, lines in tables) + len(verdicts)
    assert (
        len([line for line in printed if line.strip()]) == figures + 3 * 3
    )  # a title, headings, and a line below them


def test_progress_expects_more(capsys: pytest.CaptureFixture[str]) -> None:
    """What turns out to be more work than was said does not count past the end."""
    with Show().progress("trials", 2) as on:
        on(2)
        on.expect(3)
        on(3)
        assert (on.bar.tasks[on.task].completed, on.bar.tasks[on.task].total) == (5, 5)
    capsys.readouterr()


def test_goodness_is_the_same_whichever_way_is_better() -> None:
    more, less = Goal("sales/s", 2.0, more_is_better=True), Goal("ms", 10.0, more_is_better=False)
    assert [Score(value, more).goodness for value in (1.0, 2.0, 4.0)] == [0.5, 1.0, 2.0]
    assert [Score(value, less).goodness for value in (20.0, 10.0, 5.0)] == [0.5, 1.0, 2.0]
    assert Score(0.0, less).goodness > 1


def test_the_picture_tells_what_is_met() -> None:
    scores = {"write": [Score(3.0, Goal("sales < s", 2.0, more_is_better=True))], "size": []}
    scores["pipeline"] = [Score(20.0, Goal("ms", 10.0, more_is_better=False)), Score(0.0, Goal("cost", 1.0, False))]
    machine = {"cores": 2, "processor": "<any>", "memory_gib": 4, "load_before": 0.25}
    drawn = scoreboard.draw(scores, machine, "make bench")
    tree = ElementTree.fromstring(drawn)
    told = [text.text for text in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert told[0] == "2 of 3 goals are met"
    assert {"sales < s", "✓ ≥ 2", "✗ ≤ 10", "write", "pipeline"} <= set(told)
    assert "<any>" in str(told[1])
    assert "size" not in told
