"""What the stack tells the person in front of it; plain lines when the output is no terminal."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, cast

from rich.console import Console
from rich.markup import escape


class _Unfailing:
    """Standard output until its reader is gone, nowhere from then on: there may still be something to stop."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)

    def write(self, text: str) -> int:
        try:
            return sys.stdout.write(text)
        except OSError:
            return self._give_up()

    def flush(self) -> None:
        try:
            sys.stdout.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> int:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        return os.dup2(nowhere, sys.stdout.fileno())


_console = Console(file=cast(IO[str], _Unfailing()), highlight=False)


def say(text: str) -> None:
    _print(escape(text))


def done(text: str) -> None:
    _print(f"[green]✓[/] {escape(text)}")


def warn(text: str) -> None:
    _print(f"[yellow]! {escape(text)}[/]")


def fail(text: str) -> None:
    """The first line is the message, the others (the end of a log, say) explain it."""
    first, _, rest = text.partition("\n")
    _print(f"[bold red]✗ {escape(first)}[/]")
    if rest:
        say(rest)


def table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("   ".join(map(str.ljust, row, widths)).rstrip())


@contextmanager
def step(name: str) -> Iterator[None]:
    """Show that something is going on, then that it is done and how long it took."""
    begin = time.monotonic()
    with _console.status(f"{escape(name)} …"):
        yield
    done(f"{name:<42} {time.monotonic() - begin:5.1f} s")


def _print(markup: str) -> None:
    _console.print(markup, soft_wrap=True)  # never broken up: people copy these lines
