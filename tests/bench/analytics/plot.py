"""The picture of the query server, drawn by hand as SVG: cost by history, beside SQL, and under load."""

from collections.abc import Iterable, Mapping, Sequence
from math import log10
from statistics import median

from tests.bench.analytics.asking import Asked, History
from tests.bench.analytics.questions import RANGE_DAYS
from tests.bench.analytics.summaries import ECHO, IN_FLIGHT, Load
from tests.bench.svg import AMBER, BLUE, FAINT, GREEN, GREY, ROSE, VIOLET, bar, heading, line, picture, text

WIDTH, HEIGHT = 960, 580
TOP, BOTTOM = 92, 508
LEFT, RIGHT, LABELS = 70, 330, 342  # of the curves, and of their names
BARS_LEFT, BARS_RIGHT = 640, 868
COLOURS = (BLUE, GREEN, AMBER, ROSE, VIOLET, "#0891b2", "#4f46e5", "#65a30d")
LABEL_GAP = 16

Answers = Mapping[str, Sequence[Sequence[Asked]]]


def plot(
    histories: Sequence[History],
    answers: Answers,
    purchases_ms: Mapping[str, Sequence[float]],
    loads: Mapping[str, Sequence[Load]],
) -> str:
    """Median times of the answers by history, and beside the same question in SQL; both on logarithmic scales."""
    return picture(WIDTH, HEIGHT, [*_curves(histories, answers), *_bars(answers, purchases_ms), *_load(loads)])


def _curves(histories: Sequence[History], answers: Answers) -> Iterable[str]:
    medians = {
        name: [median(asked.p50_ms for asked in each) for each in zip(*rounds, strict=True)]
        for name, rounds in answers.items()
    }
    every = [ms for each in medians.values() for ms in each]
    low, high = _decade(min(every)), _decade(max(every)) + 1
    most = max(log10(histories[-1].times), 1)

    def x(times: int) -> float:
        return LEFT + (RIGHT - LEFT) * log10(times) / most

    def y(ms: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (log10(ms) - low) / (high - low)

    yield from heading(LEFT - 46, 38, "Time of an answer", "median, milliseconds, one call at a time")
    for power in range(low, high + 1):
        ms = 10**power
        yield line(LEFT, y(ms), RIGHT, y(ms))
        yield text(LEFT - 10, y(ms) + 4, f"{ms:g}", fill=FAINT, anchor="end")
    for history in histories:
        days = history.times * RANGE_DAYS
        yield text(x(history.times), BOTTOM + 20, f"{days:,}", fill=FAINT, anchor="middle")
    yield text((LEFT + RIGHT) / 2, BOTTOM + 44, "days of history", fill=FAINT, anchor="middle")

    places = _apart({name: y(each[-1]) + 4 for name, each in medians.items()})
    for (name, each), colour in zip(medians.items(), COLOURS, strict=False):
        points = [(x(history.times), y(ms)) for history, ms in zip(histories, each, strict=True)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5" stroke-linejoin="round"/>'
        for px, py in points:
            yield f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}" stroke="#ffffff" stroke-width="1.5"/>'
        yield text(LABELS, places[name], f"{_title(name)}  {each[-1]:.1f}", fill=colour, weight=600)


def _bars(answers: Answers, purchases_ms: Mapping[str, Sequence[float]]) -> Iterable[str]:
    yield from heading(BARS_LEFT, 38, "… beside SQL on the purchases", "milliseconds, the longest history; logarithmic")
    pairs = {
        name: (median(each[-1].p50_ms for each in rounds), median(purchases_ms[name]))
        for name, rounds in answers.items()
    }
    every = [ms for pair in pairs.values() for ms in pair]
    low, high = _decade(min(every)), log10(max(every))
    step = (BOTTOM - 66 - TOP) / len(pairs)
    for number, (name, (ours, theirs)) in enumerate(pairs.items()):
        y = TOP + number * step
        yield text(BARS_LEFT, y + 4, _title(name), weight=600)
        for row, (ms, colour) in enumerate(((ours, BLUE), (theirs, GREY))):
            width = max((BARS_RIGHT - BARS_LEFT) * (log10(ms) - low) / (high - low), 2)
            top = y + 10 + row * 11
            yield bar(BARS_LEFT, top, width, 9, fill=colour)
            yield text(BARS_LEFT + width + 6, top + 8, f"{ms:,.1f}" if ms < 100 else f"{ms:,.0f}", size=10, fill=FAINT)


def _load(loads: Mapping[str, Sequence[Load]]) -> Iterable[str]:
    y = BOTTOM - 30
    yield text(BARS_LEFT, y, f"{IN_FLIGHT} calls at once, calls a second", weight=600)
    for number, (name, rounds) in enumerate(loads.items()):
        rate = median(load.calls_per_s for load in rounds)
        yield text(BARS_LEFT, y + 20 + 18 * number, f"{name}  {rate:,.0f}", fill=GREY if name == ECHO else BLUE)


def _title(name: str) -> str:
    return name.replace("_all_time", ", all time")


def _decade(ms: float) -> int:
    return int(log10(ms) // 1)


def _apart(places: Mapping[str, float]) -> dict[str, float]:
    """Names move down as far as they must, so as not to lie on one another."""
    moved: dict[str, float] = {}
    lowest = float("-inf")
    for name, place in sorted(places.items(), key=lambda each: each[1]):
        lowest = moved[name] = max(place, lowest + LABEL_GAP)
    return moved
