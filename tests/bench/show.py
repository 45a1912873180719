"""What the person who waits for the figures gets to see."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.bench.figures import Figure, Flow, Goal, Rounds, Score, cpu, middle

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Advance:
    """Moves a progress bar on."""

    bar: Progress
    task: TaskID

    def __call__(self, count: int) -> None:
        self.bar.advance(self.task, count)

    def expect(self, more: int) -> None:
        """There is more to do than was said."""
        self.bar.update(self.task, total=(self.bar.tasks[self.task].total or 0) + more)


class Show:
    """Lines, progress and tables on the terminal."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def fail(self, text: str) -> None:
        self._console.print(f"✗ {text}", style="red", markup=False)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator["Advance"]:
        columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console) as bar:
            task = bar.add_task(title, total=total)
            yield Advance(bar, task)

    def in_turn(
        self, contenders: Mapping[str, Callable[[], Measured]], rounds: int, title: str
    ) -> dict[str, list[Measured]]:
        """Each contender once a round, after a round that does not count: caches are warm from then on."""
        figures: dict[str, list[Measured]] = {name: [] for name in contenders}
        with self.progress(title, (1 + rounds) * len(contenders)) as advance:
            for number in range(1 + rounds):
                for name, measure in contenders.items():
                    figure = measure()
                    if number:
                        figures[name].append(figure)
                    advance(1)
        return figures

    def figures(self, title: str, rounds: Rounds) -> None:
        """The medians of the rounds; CPU time of a purchase, and where it is spent."""
        table = _table(title)
        table.add_column("", no_wrap=True)
        for heading in ("purchases/s", "p50 ms", "p99 ms", "CPU µs", "in front", "database"):
            table.add_column(heading, justify="right")
        for name, figures in rounds.items():
            median = middle(figures)
            table.add_row(
                name,
                f"{median.purchases_per_s:,.0f}",
                f"{median.p50_ms:.2f}",
                f"{median.p99_ms:.2f}",
                f"{cpu(median):,.0f}",
                f"{median.front_cpu_us:,.0f}",
                f"{median.database_cpu_us:,.0f}",
            )
        self._console.print(table)

    def flows(self, title: str, flows: Mapping[str, Flow]) -> None:
        """Events per second, and the CPU time of an event by process."""
        table = _table(title)
        table.add_column("", no_wrap=True)
        processes = list(next(iter(flows.values())).cpu_us)
        for heading in ("events/s", "CPU µs", *processes):
            table.add_column(heading, justify="right")
        for name, flow in flows.items():
            each = (f"{flow.cpu_us[process]:,.0f}" for process in processes)
            table.add_row(name, f"{flow.events_per_s:,.0f}", f"{sum(flow.cpu_us.values()):,.0f}", *each)
        self._console.print(table)

    def whole(self, pgbench: Figure, pipeline: Flow) -> None:
        """The highest steady rate, and where the CPU time of a purchase goes."""
        table = _table("The whole pipeline at its highest steady rate")
        table.add_column("", no_wrap=True)
        for heading in ("purchases/s", "CPU µs"):
            table.add_column(heading, justify="right")
        table.add_row("pgbench alone", f"{pgbench.purchases_per_s:,.0f}", f"{cpu(pgbench):,.0f}")
        table.add_row("whole pipeline", f"{pipeline.events_per_s:,.0f}", f"{sum(pipeline.cpu_us.values()):,.0f}")
        for process, cpu_us in pipeline.cpu_us.items():
            table.add_row(f"  {process}", "", f"{cpu_us:,.0f}")
        self._console.print(table)

    def ratios(self, title: str, ratios: Mapping[str, float], goals: Mapping[str, Goal]) -> None:
        table = _table(title)
        for heading in ("", "in the report", "ratio", "goal"):
            table.add_column(heading, no_wrap=True, justify="right" if heading in ("ratio", "goal") else "left")
        for key, ratio in ratios.items():
            goal = goals.get(key)
            verdict = "" if goal is None else "[green]✓[/]" if goal.met_by(ratio) else "[red]✗[/]"
            meaning = goal.meaning if goal else "… and how it keeps up with history"
            table.add_row(meaning, key, f"{ratio:.2f} {verdict or ' '}", str(goal or ""))
        self._console.print(table)

    def table(self, title: str, headings: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
        """The first column is a name, the others are figures."""
        table = _table(title)
        for number, heading in enumerate(headings):
            table.add_column(heading, justify="right" if number else "left", no_wrap=not number)
        for line in lines:
            table.add_row(*line)
        self._console.print(table)

    def scores(self, scores: Mapping[str, Sequence[Score]]) -> None:
        """All figures that have a goal, part by part."""
        table = _table("What came out, beside what should")
        for heading in ("", "", "figure", "goal"):
            table.add_column(heading, justify="right" if heading in ("figure", "goal") else "left")
        for part, each in scores.items():
            for number, (value, goal) in enumerate(each):
                mark = "[green]✓[/]" if goal.met_by(value) else "[red]✗[/]"
                table.add_row("" if number else part, goal.meaning, f"{value:,.3g} {mark}", str(goal))
        self._console.print(table)

    def verdicts(self, verdicts: Sequence[tuple[str, float, Goal | None]]) -> None:
        """What each figure means, the figure, and whether it is good enough."""
        table = _table("What came out")
        for heading in ("", "ratio", "goal"):
            table.add_column(heading, justify="right" if heading else "left")
        for meaning, value, goal in verdicts:
            mark = " " if goal is None else "[green]✓[/]" if goal.met_by(value) else "[red]✗[/]"
            table.add_row(meaning, f"{value:,.2f} {mark}", str(goal or ""))
        self._console.print(table)


def _table(title: str) -> Table:
    """Narrow enough for 80 columns."""
    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
