"""The one picture of a run: each figure beside its goal, all on one scale, on which every goal is the same line."""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from tests.bench.figures import Score
from tests.bench.svg import AMBER, FAINT, GREEN, GRID, INK, ROSE, bar, heading, line, picture, text

WIDTH, LEFT, RIGHT = 1000, 40, 960
SCALE, GOAL = 500, 690  # where bars begin, and where every goal is
MOST = 2.0  # times as good as asked for: a bar grows no longer
ROW, GAP, TOP = 26, 34, 110
NEARLY = 0.9


# By the name of a part.
Scores = Mapping[str, Sequence[Score]]


def draw(scores: Scores, machine: Mapping[str, Any], command: str) -> str:
    """`machine` as `machine.description` tells it."""
    height = TOP + sum(GAP + ROW * len(each) for each in scores.values() if each) + 30
    met = sum(score.goal.met_by(score.value) for each in scores.values() for score in each)
    total = sum(map(len, scores.values()))
    where = (
        f"{command} · {datetime.datetime.now(datetime.UTC):%d %B %Y} · {machine['cores']} cores"
        f" of {machine['processor']}, {machine['memory_gib']} GiB · load before: {machine['load_before']:.1f}"
    )
    body = [*heading(LEFT, 44, f"{met} of {total} goals are met", escape(where))]
    body.append(text(GOAL, 92, "goal", fill=FAINT, anchor="middle"))
    body.append(text(SCALE + MOST * (GOAL - SCALE), 92, "twice as good", fill=FAINT, anchor="middle"))
    body.extend(_rows(scores))
    body.append(line(GOAL, 100, GOAL, height - 30, stroke=INK, width=1.5))
    return picture(WIDTH, height, body)


def _rows(scores: Scores) -> Iterable[str]:
    y = float(TOP)
    for part, each in scores.items():
        if not each:
            continue
        y += GAP
        yield text(LEFT, y - 10, part, size=14, weight=600)
        for score in each:
            met = score.goal.met_by(score.value)
            colour = GREEN if met else AMBER if score.goodness >= NEARLY else ROSE
            length = min(max(score.goodness, 0.0), MOST) * (GOAL - SCALE)
            yield line(SCALE, y + ROW / 2, RIGHT, y + ROW / 2, stroke=GRID)
            yield bar(SCALE, y + 5, length, ROW - 10, fill=colour)
            yield text(LEFT, y + 17, escape(score.goal.meaning))
            yield text(SCALE - 12, y + 17, f"{score.value:,.3g}", weight=600, fill=colour, anchor="end")
            yield text(RIGHT, y + 17, escape(f"{'✓' if met else '✗'} {score.goal}"), fill=colour, anchor="end")
            y += ROW
