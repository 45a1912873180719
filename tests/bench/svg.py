"""The pencils of the pictures, which are drawn by hand as SVG."""

from collections.abc import Iterable

INK, FAINT, GRID = "#0f172a", "#64748b", "#e2e8f0"
GREY, BLUE, GREEN, AMBER, ROSE, VIOLET = "#64748b", "#2563eb", "#059669", "#d97706", "#e11d48", "#7c3aed"


def picture(width: int, height: int, body: Iterable[str]) -> str:
    drawn = "\n".join(body)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"
 font-family="Inter, 'Helvetica Neue', Helvetica, Arial, sans-serif" font-size="12" fill="{INK}">
<rect width="{width}" height="{height}" rx="12" fill="#ffffff" stroke="{GRID}"/>
{drawn}
</svg>
"""


def heading(x: float, y: float, title: str, explanation: str) -> Iterable[str]:
    yield text(x, y, title, size=17, weight=600)
    yield text(x, y + 22, explanation, fill=FAINT)


def line(x1: float, y1: float, x2: float, y2: float, *, stroke: str = GRID, width: float = 1) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}" stroke-width="{width}"/>'


def bar(x: float, y: float, width: float, height: float, *, fill: str, opacity: float = 1) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"'
        f' fill-opacity="{opacity}"/>'
    )


def spread(x1: float, x2: float, y: float, *, stroke: str) -> str:
    """From the slowest to the fastest round."""
    return (
        f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{stroke}" stroke-width="7"'
        ' stroke-opacity="0.35" stroke-linecap="round"/>'
    )


def text(
    x: float, y: float, content: str, *, size: int = 12, weight: int = 400, fill: str = INK, anchor: str = "start"
) -> str:
    style = f'font-size="{size}" font-weight="{weight}" fill="{fill}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{content}</text>'


def nice_step(rough: float) -> int:
    """The least of 1, 2, 5, 10, 20, 50 … that is not below."""
    scale = 1
    while True:
        for step in (1, 2, 5):
            if step * scale >= rough:
                return step * scale
        scale *= 10
