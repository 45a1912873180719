"""`/`, and what belongs to it: its changes, and what it shows as files of comma-separated values."""

import csv
import datetime
import io
from collections.abc import Iterable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from pages_svc import charts, person, words
from pages_svc.live import Live, Parts
from pages_svc.owner import period
from pages_svc.owner.figures import Figures, Reader
from pages_svc.owner.period import RANGES, Selection
from pages_svc.upstream.sales import Audit, Products, Rows
from pages_svc.upstream.services import Problem
from pages_svc.upstream.watch import Watch
from pages_svc.web import Templates

PARTS = ("notice", "today", "period", "chart", "branches", "products", "customers", "days")
FRESH_S = 60.0  # numbers that go less far are shown as such
DAYS_LISTED_MAX, BRANCHES_LISTED_MAX = 400, 50  # in the tables; the files have all


class OwnerPage:
    """The routes of the page."""

    def __init__(self, reader: Reader, watch: Watch, templates: Templates) -> None:
        self._reader, self._watch, self._templates = reader, watch, templates
        self.live: Live[Selection] | None = None  # given by the wiring, as it renders by us

    def routes(self) -> list[Route]:
        return [
            Route("/", self.show),
            Route("/live", self.follow),
            Route("/{name:str}.csv", self.file),
        ]

    async def show(self, request: Request) -> Response:
        selection, wrong = period.read(request.query_params)
        who = person.current()
        if who and who.caller.branch_id and selection.branch_id is None:  # of a branch, and of no other
            return RedirectResponse(selection.address(branch_id=who.caller.branch_id), 303)
        try:
            figures = await self._reader.figures(selection)
        except Problem as problem:
            if problem.refused:
                return self._templates.problem(problem, "/", 403)
            return self._templates.page(
                "owner_problem.html", status=503, path="/", title="Sales", problem=problem, selection=selection
            )
        return self._templates.page(
            "owner.html",
            status=400 if wrong else 200,
            path="/",
            title="Sales",
            selection=selection,
            ranges=RANGES,
            wrong=wrong,
            figures=figures,
            parts=self._parts(figures),
            **self._fresh(figures),
        )

    async def follow(self, request: Request) -> Response:
        assert self.live is not None
        selection, _ = period.read(request.query_params)
        if self.live.full:
            return PlainTextResponse("Too many people follow the pages just now.\n", 503)
        return StreamingResponse(
            self.live.follow(selection),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )

    async def render(self, selection: Selection) -> Parts:
        """The parts for those who follow; while there are no figures, only what is wrong."""
        try:
            return self._parts(await self._reader.figures(selection))
        except Problem as problem:
            notice = self._templates.part("owner/notice.html", problem=problem, figures=None)
            return {"notice": notice, "fresh": self._templates.part("owner/fresh.html", fresh=None, **_NO_FRESHNESS)}

    def _parts(self, figures: Figures) -> dict[str, str]:
        values = self._values(figures)
        parts = {name: str(self._templates.part(f"owner/{name}.html", **values)) for name in PARTS}
        return parts | {"fresh": str(self._templates.part("owner/fresh.html", **self._fresh(figures)))}

    def _values(self, figures: Figures) -> dict[str, Any]:
        shown = figures.period
        # A single day alone is no chart: the week before it stands beside it.
        days = shown.days if len(shown.days) > 1 else [shown.first + n * period.DAY for n in range(-6, 1)]
        in_chart = figures.rows if len(shown.days) > 1 else self._around(figures, days)
        by_branch: dict[int, dict[datetime.date, int]] = {branch: {} for branch in figures.branches}
        by_day = dict.fromkeys(days, 0)
        for (day, branch), totals in in_chart.items():
            if day in by_day:
                by_branch.setdefault(branch, {})[day] = totals.revenue_cents
                by_day[day] += totals.revenue_cents
        return {
            "figures": figures,
            "problem": self._watch.problem,
            "chart": charts.columns(days, by_branch),
            "chart_days": days,
            "by_branch": by_branch,
            "by_day": by_day,
            "empty": not figures.totals.purchase_count,
            "listed_max": DAYS_LISTED_MAX,
            "branches_listed_max": BRANCHES_LISTED_MAX,
            "ranked": ranked(figures.products, figures.selection.by_units),
            "change": words.Change,
        }

    def _around(self, figures: Figures, days: Sequence[datetime.date]) -> Rows:
        return self._watch.between(days[0], days[-1], figures.selection.branch_id) or figures.rows

    def _fresh(self, figures: Figures) -> dict[str, Any]:
        marks, zone, today = figures.marks, figures.zone, figures.today
        through = marks.complete_through
        behind_s = (today.now - through).total_seconds() if through else None
        return {
            "fresh": behind_s is not None and behind_s < FRESH_S and self._watch.problem is None,
            "through": words.clock(through, zone, today.day) if through else "",
            "behind": words.span(behind_s) if behind_s is not None else "",
            "quarantined": marks.quarantined_count,
            "audit": figures.audit if isinstance(figures.audit, Audit) else None,
            "zone": zone.key,
        }

    async def file(self, request: Request) -> Response:
        """What is shown, for a spreadsheet."""
        selection, wrong = period.read(request.query_params)
        name = request.path_params["name"]
        if wrong:
            return PlainTextResponse("".join(f"{text}\n" for text in wrong.values()), 400)
        if name not in ("sales", "products", "customers"):
            return PlainTextResponse("There are sales.csv, products.csv and customers.csv.\n", 404)
        try:
            figures = await self._reader.figures(selection)
            heads, rows = _table(name, figures)
        except Problem as problem:
            return PlainTextResponse(f"{problem.text} {problem.advice}\n", 403 if problem.refused else 503)
        text = io.StringIO()
        csv.writer(text, lineterminator="\r\n").writerows([heads, *rows])
        whose = f"branch-{selection.branch_id}" if selection.branch_id else "chain"
        days = "" if name == "customers" else f"-{figures.period.first}-{figures.period.last}"
        return Response(
            text.getvalue(),
            media_type="text/csv; charset=utf-8",
            headers={
                "content-disposition": f'attachment; filename="{name}-{whose}{days}.csv"',
                "cache-control": "no-store",
            },
        )


_NO_FRESHNESS: dict[str, Any] = {"through": "", "behind": "", "quarantined": 0, "audit": None, "zone": ""}


def ranked(products: Products | Problem, by_units: bool) -> list[tuple[str, Any]]:
    """Each product with its rank; equal ones share it, and say so: 3 =."""
    if isinstance(products, Problem):
        return []
    measures = [it.quantity if by_units else it.revenue_cents for it in products.best]
    return [
        (f"{measures.index(measure) + 1}{' =' if measures.count(measure) > 1 else ''}", product)
        for measure, product in zip(measures, products.best, strict=True)
    ]


def _table(name: str, figures: Figures) -> tuple[Sequence[str], Iterable[Sequence[object]]]:
    """Raises Problem: it could not be read."""
    if name == "products":
        if isinstance(figures.products, Problem):
            raise figures.products
        best = figures.products.best
        return ("product_id", "units", "revenue"), [
            (it.product_id, it.quantity, words.plain(it.revenue_cents)) for it in best
        ]
    if name == "customers":
        if isinstance(figures.customers, Problem):
            raise figures.customers
        return ("customer_id", "purchases", "last_purchase"), [
            (it.customer_id, it.purchase_count, it.last_purchase.astimezone(figures.zone).isoformat(timespec="seconds"))
            for it in figures.customers.most_loyal
        ]
    return ("day", "branch", "revenue", "purchases", "items", "purchases_with_customer"), [
        (day, branch, words.plain(it.revenue_cents), it.purchase_count, it.item_count, it.with_customer_count)
        for (day, branch), it in sorted(figures.rows.items())
        if figures.period.first <= day <= figures.period.last
    ]
