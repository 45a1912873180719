"""What is measured, and how it is compared: always within a round, because the machine drifts from one to the next."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """What one contender did in one round."""

    purchases_per_s: float
    p50_ms: float  # of a transaction, a call or a message
    p99_ms: float
    front_cpu_us: float  # a purchase, of the process in front of the database: pgbench or the service
    database_cpu_us: float  # a purchase, of all of PostgreSQL's processes


class Flow(NamedTuple):
    """What one mover of events did in one round."""

    events_per_s: float
    cpu_us: dict[str, float]  # an event, by process


class Contender(NamedTuple):
    """A way to write purchases, and how many clients, calls or streams do so at once."""

    family: str
    at_once: int
    measure: Callable[[], Figure]

    @property
    def name(self) -> str:
        return f"{self.family} × {self.at_once}"


class Plan(NamedTuple):
    """How long to measure, with how much history, and under which attacks."""

    rounds: int
    measure_s: int
    rows: int
    history: int = 100
    attacks: Sequence[str] = ()  # none: all


@dataclass(frozen=True)
class Goal:
    """What a ratio should be."""

    meaning: str
    value: float
    more_is_better: bool

    def met_by(self, ratio: float) -> bool:
        return ratio >= self.value if self.more_is_better else ratio <= self.value

    def __str__(self) -> str:
        return f"{'≥' if self.more_is_better else '≤'} {self.value:g}"


class Score(NamedTuple):
    """A figure, and what it should be."""

    value: float
    goal: Goal

    @property
    def goodness(self) -> float:
        """1 where the goal is met exactly; 2 is twice as good."""
        if self.goal.more_is_better:
            return self.value / self.goal.value
        return self.goal.value / self.value if self.value else float("inf")


def scores(ratios: Mapping[str, float], goals: Mapping[str, Goal]) -> list[Score]:
    """Of those that have a goal."""
    return [Score(value, goals[key]) for key, value in ratios.items() if key in goals]


# The report's keys; some hold figures by name.
Value = float | Mapping[str, "Value"]
Values = dict[str, Value]


class Outcome(NamedTuple):
    """What a part of the benchmark hands back."""

    values: Values
    details: dict[str, Any]  # the raw figures
    plot: str | None = None  # an SVG
    scores: Sequence[Score] = ()  # for the picture of all parts


# By the contender's name. Equal places belong to the same round.
Rounds = Mapping[str, Sequence[Figure]]


def speed(figure: Figure) -> float:
    return figure.purchases_per_s


def cpu(figure: Figure) -> float:
    return figure.front_cpu_us + figure.database_cpu_us


def latency(figure: Figure) -> float:
    return figure.p50_ms


def middle(figures: Sequence[Figure]) -> Figure:
    """The medians, value by value."""
    return Figure(*map(median, zip(*figures, strict=True)))


def best(rounds: Rounds, family: Sequence[Contender]) -> Contender:
    return max(family, key=lambda contender: middle(rounds[contender.name]).purchases_per_s)


def versus(rounds: Rounds, ours: Contender, theirs: Contender, value: Callable[[Figure], float]) -> float:
    """The median of the rounds' ratios."""
    return median_ratio(map(value, rounds[ours.name]), map(value, rounds[theirs.name]))


def median_ratio(ours: Iterable[float], theirs: Iterable[float]) -> float:
    """The median of the ratios of each two at equal places, which were measured one after the other."""
    return median(one / other for one, other in zip(ours, theirs, strict=True))


def middle_flow(flows: Sequence[Flow]) -> Flow:
    """The medians, value by value."""
    cpu_us = {name: median(flow.cpu_us[name] for flow in flows) for name in flows[0].cpu_us}
    return Flow(median(flow.events_per_s for flow in flows), cpu_us)


def percentile(ascending: Sequence[float], percent: float) -> float:
    return ascending[min(int(len(ascending) * percent / 100), len(ascending) - 1)]


def raw(rounds: Rounds) -> dict[str, list[dict[str, float]]]:
    """All figures, for the report."""
    return {name: [figure._asdict() for figure in figures] for name, figures in rounds.items()}


def short(count: int) -> str:
    """10000000 → `10m`."""
    for size, unit in ((1_000_000, "m"), (1_000, "k")):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)
