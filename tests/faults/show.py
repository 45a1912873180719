"""What a person sees of a run: each fault as it ends, and a table of everything."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from tests.faults.run import Result, Run

console = Console(highlight=False)


def say(text: str) -> None:
    console.print(escape(text), soft_wrap=True)


def fail(text: str) -> None:
    console.print(f"[bold red]✗[/] {escape(text)}", soft_wrap=True)


def fault(run: Run, number: int, kind: str, hit: bool, seconds: float) -> None:
    mark = "[green]✓[/]" if hit else "[yellow]·[/]"
    missed = "" if hit else "   did not happen"
    console.print(
        f"{mark} {run.result.hits.total():4}  {kind:28} {seconds:5.1f} s   {run.ledger.acknowledged:8,} sales"
        f" acknowledged{missed}",
        soft_wrap=True,
    )


class _Status:
    def __init__(self, run: Run) -> None:
        self._run = run

    def __rich__(self) -> Text:
        kinds = sorted(self._run.under_way.copy().values())
        under_way = ", ".join(kinds) or "all mended: waiting for silence, counting"
        return Text(f"  … {under_way}", style="dim", overflow="ellipsis", no_wrap=True)


@contextmanager
def progress(run: Run) -> Iterator[None]:
    if not console.is_terminal:
        yield
        return
    with Live(_Status(run), console=console, refresh_per_second=4, transient=True):
        yield


def table(result: Result) -> None:
    kinds = Table("fault", *(Column(name, justify="right") for name in ("happened", "did not", "seconds")))
    for kind in sorted(result.hits.keys() | result.misses.keys()):
        missed = str(result.misses[kind]) if result.misses[kind] else ""
        kinds.add_row(kind, str(result.hits[kind]), missed, f"{result.seconds_broken[kind]:,}")
    kinds.add_section()
    kinds.add_row("all", str(result.hits.total()), str(result.misses.total() or ""), "")
    console.print(kinds)

    report = result.report()
    facts = Table(show_header=False)
    facts.add_column()
    facts.add_column(justify="right")
    for name, value in (
        ("seed", str(result.seed)),
        ("took", f"{result.seconds:,.0f} s"),
        ("sales sent", f"{result.sent:,}"),
        ("  acknowledged", f"{result.acknowledged:,}"),
        ("  refused, with good reason", f"{result.refused:,}"),
        ("  attempts without an answer", f"{result.unknown:,}"),
        ("processes started again", f"{result.restarts:,}"),
        ("published again, as the broker had lost them", f"{result.rescued:,}"),
        ("looks at the running system", f"{result.samples:,}"),
        ("  that claimed to be complete", f"{result.claims:,}"),
    ):
        facts.add_row(name, value)
    facts.add_section()
    for name in ("lost", "doubled", "falsely_sent", "parked_good"):
        facts.add_row(name, f"[{'red' if report[name] else 'green'}]{report[name]}[/]")
    for name, count in report["other_findings"].items():
        facts.add_row(name, f"[red]{count}[/]")
    console.print(facts)
    for line in result.findings.lines():
        console.print(f"[red]{escape(line)}[/]", soft_wrap=True)
    if result.unchecked:
        console.print(
            f"[yellow]Not checked, as this checker does not know them: {', '.join(sorted(result.unchecked))}[/]"
        )
