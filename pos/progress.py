"""What a person sees while sales are on their way."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pos.errors import PosError


def work_progress(console: Console) -> Progress:
    """Bars with a rate and a note; tasks are added with `note=""`."""
    return Progress(
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("[yellow]{task.fields[note]}"),
        console=console,
    )


def waiting_for(trouble: PosError | None) -> str:
    return f"waits for the service ({trouble.status.reason or trouble.status.code.name})" if trouble else ""


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed else "")
