"""`python -m tests.bench`: run the parts, show the figures, write the report. Knobs are variables; see README.md."""

import json
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from chassis.settings import SettingsError, integer, load, setting
from deploy.local.machine import StackError
from tests.bench import machine, scoreboard
from tests.bench.analytics import part as analytics
from tests.bench.cells import part as cells
from tests.bench.figures import Outcome, Plan, Score, Value, Values
from tests.bench.isolation import part as isolation
from tests.bench.isolation.attacks import ATTACKS
from tests.bench.pipeline import part as pipeline
from tests.bench.show import Show
from tests.bench.size import part as size
from tests.bench.write import part as write

# Each part by its name in ONLY, in the order in which they run.
PARTS: dict[str, Callable[[Plan, Show], Outcome]] = {
    "write": write.run,
    "pipeline": pipeline.run,
    "analytics": analytics.run,
    "isolation": isolation.run,
    "size": size.run,
    "cells": cells.run,
}

PICTURE = Path(".local", "bench.svg")  # of the last run

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 130  # what a shell reports for a process ended by Ctrl-C


class Interrupted(BaseException):
    """Somebody wants us to end; like KeyboardInterrupt, nothing that `except Exception` should catch."""


def part(name: str) -> str:
    if name not in PARTS:
        raise ValueError(f"must be one of {', '.join(PARTS)}")
    return name


def attacks(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= ATTACKS.keys():
        raise ValueError(f"must be some of {', '.join(ATTACKS)}, with commas between them")
    return names


def new_file(name: str) -> Path:
    path = Path(name)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError("must be a file in a directory that exists")
    return path


@dataclass(frozen=True)
class Settings:
    only: str | None = setting("ONLY", part, "part", "only this", default=None)
    report: Path | None = setting("REPORT", new_file, "file", "the figures as JSON", default=None)
    rounds: int = setting("ROUNDS", integer(1, 1_000), "rounds", "whose median counts", default=5)
    measure_s: int = setting("MEASURE_S", integer(1, 600), "s", "of each measurement", default=3)
    rows: int = setting("ROWS", integer(0, 100_000_000), "purchases", "that are there already", default=1_000_000)
    history: int = setting("HISTORY", integer(1, 1_000), "times", "as many days as the short history", default=100)
    attacks: tuple[str, ...] = setting("ATTACKS", attacks, "names", "of the isolation part; all by default", default=())


def main() -> int:
    show = Show()
    for number in SIGNALS:
        signal.signal(number, interrupt)
    try:
        run(load(Settings), show)
    except SettingsError as error:
        for problem in error.problems:
            show.fail(problem)
        return 2
    except StackError as error:
        show.fail(str(error))
        return 1
    except Interrupted:
        show.say("Interrupted; everything is stopped and removed.")
        return INTERRUPTED
    return 0


def interrupt(number: int, _: FrameType | None) -> None:
    """The first signal ends the benchmark; none after it may end the cleaning up, which is bounded anyway."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(number)


def run(settings: Settings, show: Show) -> None:
    plan = Plan(settings.rounds, settings.measure_s, settings.rows, settings.history, settings.attacks)
    values: Values = {}
    details: dict[str, Any] = {"machine": machine.description(), "plan": plan._asdict()}
    names = [settings.only] if settings.only else list(PARTS)
    scores: dict[str, Sequence[Score]] = {}
    for name in names:
        outcome = PARTS[name](plan, show)
        values |= outcome.values
        scores[name] = outcome.scores
        details[name] = outcome.details
        if settings.report and outcome.plot:
            drawing = settings.report.with_suffix(".svg" if len(names) == 1 else f".{name}.svg")
            drawing.write_text(outcome.plot)
            show.say(f"The picture: {drawing}")
    show.scores(scores)
    picture = settings.report.with_suffix(".goals.svg") if settings.report else PICTURE
    picture.write_text(scoreboard.draw(scores, details["machine"], command(settings)))
    show.say(f"All of it at a glance: {picture}")
    if settings.report:
        rounded = {key: rounded_value(value) for key, value in values.items()}
        settings.report.write_text(json.dumps({**rounded, "details": details}, indent=2) + "\n")
        show.say(f"The report: {settings.report}")


def command(settings: Settings) -> str:
    """What was called, as far as it decides about the figures."""
    only = f" ONLY={settings.only}" if settings.only else ""
    return f"make bench{only} ROUNDS={settings.rounds} MEASURE_S={settings.measure_s} ROWS={settings.rows}"


def rounded_value(value: Value) -> Value:
    if isinstance(value, Mapping):
        return {name: rounded_value(each) for name, each in value.items()}
    return round(value, 4)


if __name__ == "__main__":
    sys.exit(main())
