"""The picture of the pipeline: how fast its parts are, what a purchase costs, and how soon it is seen."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from tests.bench.figures import Figure, Flow, cpu, percentile
from tests.bench.pipeline.moving import APPLY, RELAY
from tests.bench.pipeline.whole import PGBENCH, PIPELINE
from tests.bench.svg import (
    AMBER,
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    ROSE,
    VIOLET,
    bar,
    heading,
    line,
    nice_step,
    picture,
    spread,
    text,
)

WIDTH, HEIGHT = 960, 720
LEFT, MIDDLE, RIGHT = 40, 500, 920  # the left column, and the edges of the right one
COLUMN = RIGHT - MIDDLE
ROW = 54  # from one bar to the next
VISIBLE_TOP, VISIBLE_BOTTOM = 470, 650

OURS = (RELAY, APPLY, PIPELINE)
# The way of a purchase; PostgreSQL's work is paler than the process it is done for.
SHARES = {
    "load client": (GREY, 1.0),
    "purchases": (BLUE, 1.0),
    "PostgreSQL, recording": (BLUE, 0.4),
    "relay": (GREEN, 1.0),
    "PostgreSQL, relaying": (GREEN, 0.4),
    "RabbitMQ": (AMBER, 1.0),
    "consumer": (VIOLET, 1.0),
    "PostgreSQL, counting": (VIOLET, 0.4),
    "analytics": (ROSE, 1.0),
    "PostgreSQL, the rest": (GREY, 0.4),
}


def plot(
    relayed: Mapping[str, Sequence[Flow]],
    applied: Mapping[str, Sequence[Flow]],
    steady: Mapping[str, Sequence[float]],
    pgbench: Figure,
    pipeline: Flow,
    visible_ms: Sequence[float],
) -> str:
    """`steady` are the purchases per second of pgbench and of the whole pipeline."""
    body = [
        *heading(
            LEFT, 44, "From the outbox to the queue", "events per second; dark: from the slowest to the fastest round"
        ),
        *_speeds({name: [flow.events_per_s for flow in flows] for name, flows in relayed.items()}, 96),
        *heading(LEFT, 288, "From the queue to the read models", "events per second"),
        *_speeds({name: [flow.events_per_s for flow in flows] for name, flows in applied.items()}, 340),
        *heading(LEFT, 478, "From the till to the read models", "purchases per second, at a steady rate"),
        *_speeds(steady, 530),
        *heading(MIDDLE, 44, "CPU time of a purchase", "microseconds, of all processes, at the highest steady rate"),
        *_costs(pgbench, pipeline),
        *_visibility(visible_ms),
    ]
    return picture(WIDTH, HEIGHT, body)


def _speeds(rounds: Mapping[str, Sequence[float]], top: float) -> Iterable[str]:
    """Ours in blue."""
    scale = (MIDDLE - 60 - LEFT) / max(max(speeds) for speeds in rounds.values())
    for number, (name, speeds) in enumerate(rounds.items()):
        y = top + number * ROW
        colour = BLUE if name in OURS else GREY
        yield text(LEFT, y, name, fill=colour, weight=600)
        yield text(MIDDLE - 60, y, f"{median(speeds):,.0f}", anchor="end", weight=600)
        yield bar(LEFT, y + 8, median(speeds) * scale, 16, fill=colour)
        if len(speeds) > 1:
            yield spread(LEFT + min(speeds) * scale, LEFT + max(speeds) * scale, y + 16, stroke=INK)


def _costs(pgbench: Figure, pipeline: Flow) -> Iterable[str]:
    total = sum(pipeline.cpu_us.values())
    scale = COLUMN / max(total, cpu(pgbench))
    yield text(MIDDLE, 96, f"{PGBENCH}, {pgbench.purchases_per_s:,.0f} purchases/s", fill=GREY, weight=600)
    yield text(RIGHT, 96, f"{cpu(pgbench):,.0f} µs", anchor="end", weight=600)
    yield bar(MIDDLE, 104, pgbench.front_cpu_us * scale, 20, fill=GREY)
    yield bar(MIDDLE + pgbench.front_cpu_us * scale, 104, pgbench.database_cpu_us * scale, 20, fill=GREY, opacity=0.4)
    yield text(MIDDLE, 160, f"{PIPELINE}, {pipeline.events_per_s:,.0f} purchases/s", fill=BLUE, weight=600)
    yield text(RIGHT, 160, f"{total:,.0f} µs", anchor="end", weight=600)
    x: float = MIDDLE
    for number, (name, (colour, opacity)) in enumerate(SHARES.items()):
        width = pipeline.cpu_us[name] * scale
        yield bar(x, 168, width, 20, fill=colour, opacity=opacity)
        x += width
        column, row = divmod(number, 5)
        at, y = MIDDLE + column * (COLUMN / 2 + 10), 222 + row * 24
        yield bar(at, y - 10, 12, 12, fill=colour, opacity=opacity)
        yield text(at + 20, y, name)
        yield text(at + COLUMN / 2 - 20, y, f"{pipeline.cpu_us[name]:,.0f}", anchor="end")


def _visibility(ascending: Sequence[float]) -> Iterable[str]:
    yield from heading(
        MIDDLE, 396, "How soon a sale is seen", "milliseconds from the answer to a sale to its being in ListDailySales"
    )
    if not ascending:
        return
    p50, p99 = percentile(ascending, 50), percentile(ascending, 99)
    step = nice_step(p99 * 1.15 / 5)
    right = (int(p99 * 1.15 / step) + 1) * step

    def x(ms: float) -> float:
        return MIDDLE + 34 + (COLUMN - 34) * ms / right

    def y(share: float) -> float:
        return VISIBLE_BOTTOM - (VISIBLE_BOTTOM - VISIBLE_TOP) * share

    for percent in (0, 25, 50, 75, 100):
        yield line(x(0), y(percent / 100), RIGHT, y(percent / 100))
        yield text(x(0) - 8, y(percent / 100) + 4, f"{percent} %", fill=FAINT, anchor="end")
    for ms in range(0, right + 1, step):
        yield text(x(ms), VISIBLE_BOTTOM + 20, f"{ms:,}", fill=FAINT, anchor="middle")
    shown = [ms for ms in ascending if ms <= right]
    points = " ".join(f"{x(ms):.1f},{y((n + 1) / len(ascending)):.1f}" for n, ms in enumerate(shown))
    yield f'<polyline points="{x(0):.1f},{y(0):.1f} {points}" fill="none" stroke="{BLUE}" stroke-width="2.5"/>'
    for at, share, name in ((p50, 0.5, "half"), (p99, 0.99, "99 %")):
        yield f'<circle cx="{x(at):.1f}" cy="{y(share):.1f}" r="4" fill="{BLUE}" stroke="#ffffff" stroke-width="1.5"/>'
        yield text(x(at) - 8, y(share) - 8, f"{name}: {at:,.0f} ms", weight=600, anchor="end")
