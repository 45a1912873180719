"""The picture of the write path, drawn by hand as SVG: how fast, and at what cost."""

from collections.abc import Iterable, Sequence
from math import log2

from tests.bench.figures import Contender, Rounds, cpu, middle, speed
from tests.bench.svg import AMBER, BLUE, FAINT, GREEN, GREY, GRID, nice_step, picture, text

WIDTH, HEIGHT = 960, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 560, 92, 370  # of the curves
BARS_LEFT, BARS_RIGHT = 640, 920
AT_ONCE_MAX = 256
COLOURS = (GREY, BLUE, AMBER, GREEN)  # of the families, in their order


def plot(families: Sequence[Sequence[Contender]], rounds: Rounds, finalists: Sequence[Contender]) -> str:
    """Purchases per second against how many at once, and the CPU time of those who are compared."""
    return picture(WIDTH, HEIGHT, [*_curves(families, rounds), *_bars(finalists, rounds)])


def _curves(families: Sequence[Sequence[Contender]], rounds: Rounds) -> Iterable[str]:
    top = max(max(map(speed, figures)) for figures in rounds.values())
    step = nice_step(top / 5)
    top = (top // step + 1) * step

    def x(at_once: int) -> float:
        return LEFT + (RIGHT - LEFT) * log2(at_once) / log2(AT_ONCE_MAX)

    def y(per_s: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * per_s / top

    yield text(LEFT - 46, 38, "Purchases stored per second", size=17, weight=600)
    yield text(LEFT - 46, 60, "median of the rounds; the bars reach from the slowest to the fastest one", fill=FAINT)
    for number in range(int(top / step) + 1):
        per_s = number * step
        yield f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y(per_s):.1f}" y2="{y(per_s):.1f}" stroke="{GRID}"/>'
        yield text(LEFT - 10, y(per_s) + 4, f"{per_s:,.0f}", fill=FAINT, anchor="end")
    for at_once in sorted({contender.at_once for family in families for contender in family}):
        yield text(x(at_once), BOTTOM + 20, str(at_once), fill=FAINT, anchor="middle")
    where = "connections, calls, sales on one open stream, or streams of 500 sales a message, at once"
    yield text((LEFT + RIGHT) / 2, BOTTOM + 44, where, fill=FAINT, anchor="middle")

    for family, colour in zip(families, COLOURS, strict=True):
        points = [(x(c.at_once), y(middle(rounds[c.name]).purchases_per_s), rounds[c.name]) for c in family]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in points)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5" stroke-linejoin="round"/>'
        for px, py, figures in points:
            low, high = (y(end(map(speed, figures))) for end in (min, max))
            yield (
                f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}"'
                ' stroke-width="7" stroke-opacity="0.2" stroke-linecap="round"/>'
            )
            yield f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}" stroke="#ffffff" stroke-width="1.5"/>'
        last_x, last_y, _ = points[-1]
        yield text(min(last_x, RIGHT - 60), last_y - 14, family[0].family, fill=colour, anchor="middle", weight=600)


def _bars(finalists: Sequence[Contender], rounds: Rounds) -> Iterable[str]:
    """The pale part is PostgreSQL's."""
    medians = [middle(rounds[contender.name]) for contender in finalists]
    scale = (BARS_RIGHT - BARS_LEFT) / max(map(cpu, medians))
    yield text(BARS_LEFT, 38, "CPU time of a purchase", size=17, weight=600)
    yield text(BARS_LEFT, 60, "microseconds, each at its fastest", fill=FAINT)
    for number, (contender, median, colour) in enumerate(zip(finalists, medians, COLOURS, strict=True)):
        y = TOP + 14 + number * 74
        front, database = median.front_cpu_us * scale, median.database_cpu_us * scale
        yield text(BARS_LEFT, y, contender.name, fill=colour, weight=600)
        yield text(BARS_RIGHT, y, f"{cpu(median):,.0f} µs", anchor="end", weight=600)
        yield f'<rect x="{BARS_LEFT}" y="{y + 10}" width="{front:.1f}" height="20" fill="{colour}"/>'
        yield (
            f'<rect x="{BARS_LEFT + front:.1f}" y="{y + 10}" width="{database:.1f}" height="20"'
            f' fill="{colour}" fill-opacity="0.35"/>'
        )
        who = "itself" if number == 0 else "service"
        parts = f"{who} {median.front_cpu_us:,.0f} · PostgreSQL {median.database_cpu_us:,.0f}"
        yield text(BARS_LEFT, y + 48, parts, fill=FAINT)
