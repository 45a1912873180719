"""The routes of the page: what is shown, and what is done after a question that says what will happen."""

import datetime
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import parse_qsl

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from pages_svc import words
from pages_svc.live import Live, Parts
from pages_svc.operations.state import StateReader
from pages_svc.upstream.insides import LISTED_MAX, Insides
from pages_svc.upstream.services import Problem
from pages_svc.web import Templates

PARTS = ("strip", "audit", "tills", "failed", "quarantine")
REFUSED_STATUS, FAILED_STATUS = 403, 502

log = structlog.get_logger()


class Action(NamedTuple):
    """What is asked before it is done: what it is about, and what will happen."""

    title: str
    happens: str
    button: str
    ids: Sequence[str]  # what it is done to: these, whatever comes meanwhile
    dangerous: bool = False
    day: datetime.date | None = None


class OperationsPage:
    """Shows and acts with the rights of whoever runs the pages; the services hold everybody to them."""

    def __init__(self, states: StateReader, insides: Insides, templates: Templates) -> None:
        self._states, self._insides, self._templates = states, insides, templates
        self.live: Live[str] | None = None  # given by the wiring, as it renders by us
        self._plans: Mapping[str, Callable[[Mapping[str, str]], Awaitable[Action]]] = {
            "requeue": self._plan_requeue,
            "redrive": self._plan_redrive,
            "discard": self._plan_discard,
            "rebuild": self._plan_rebuild,
        }

    def routes(self) -> list[Route]:
        return [
            Route("/operations", self.show),
            Route("/operations/live", self.follow),
            Route("/operations/{action:str}", self.ask),
            Route("/operations/{action:str}", self.act, methods=["POST"]),
        ]

    async def show(self, _: Request) -> Response:
        try:
            state = await self._states.state()
        except Problem as problem:
            return self._templates.page(
                "operations_problem.html", status=503, path="/operations", title="Operations", problem=problem
            )
        parts = await self.render("")
        return self._templates.page(
            "operations.html", path="/operations", title="Operations", parts=parts, state=state, listed_max=LISTED_MAX
        )

    async def follow(self, _: Request) -> Response:
        assert self.live is not None
        if self.live.full:
            return PlainTextResponse("Too many people follow the pages just now.\n", 503)
        return StreamingResponse(
            self.live.follow(""),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )

    async def render(self, _: str) -> Parts:
        try:
            state = await self._states.state()
        except Problem as problem:
            return {"notice": self._templates.part("operations/notice.html", problem=problem)}
        parts = {
            name: self._templates.part(f"operations/{name}.html", state=state, listed_max=LISTED_MAX) for name in PARTS
        }
        return {"notice": self._templates.part("operations/notice.html", problem=state.watch_problem), **parts}

    async def ask(self, request: Request) -> Response:
        """What will happen, and whether it shall."""
        name = request.path_params["action"]
        if name not in self._plans:
            raise HTTPException(404)
        try:
            action = await self._plans[name](request.query_params)
        except Problem as problem:
            return self._refuse(problem)
        return self._templates.page(
            "action.html", path="/operations", title=action.title, action=action, address=f"/operations/{name}"
        )

    async def act(self, request: Request) -> Response:
        """Do what was asked, to exactly what was named, and tell what has become of it."""
        pairs = parse_qsl((await request.body()).decode(errors="replace"), max_num_fields=LISTED_MAX + 10)
        ids = [value for name, value in pairs if name == "id"][:LISTED_MAX]
        name = request.path_params["action"]
        try:
            match name:
                case "requeue":
                    result = _said(await self._insides.requeue(ids), "published again", "No event had to be.")
                case "redrive":
                    result = _redriven(*await self._insides.redrive(ids))
                case "discard":
                    removed, gone = await self._insides.discard(ids)
                    result = _said(removed, "removed for good", "Nothing was there any more.") + _gone(gone)
                case "rebuild":
                    result = await self._rebuild(dict(pairs).get("day", ""))
                case _:
                    raise HTTPException(404)
        except Problem as problem:
            return self._refuse(problem)
        self._states.forget()
        log.info("done by the page", action=name, ids=len(ids))
        return self._templates.page("done.html", path="/operations", title="Done", result=result)

    async def _rebuild(self, said: str) -> str:
        reply = await self._insides.rebuild(_day(said))
        parts = [
            f"{words.counted(reply.purchase_count, 'purchase')} of that day",
            f"{words.counted(reply.repaired_row_count, 'wrong row')} put right",
            f"{words.counted(reply.added_purchase_count, 'purchase')} counted that had not been",
        ]
        if reply.foreign_event_count:
            parts.append(f"{words.number(reply.foreign_event_count)} taken out that nobody had recorded")
        proven = (
            "The day is right now, by the audit's own proof." if reply.agreed else "The day is not yet proven right."
        )
        return f"{', '.join(parts)}. {proven}"

    def _refuse(self, problem: Problem) -> Response:
        status = REFUSED_STATUS if problem.refused else FAILED_STATUS
        return self._templates.problem(problem, "/operations", status)

    async def _plan_requeue(self, query: Mapping[str, str]) -> Action:
        reason = query.get("reason", "")
        ids = _some([it.event_id for it in await self._insides.failed() if it.reason == reason])
        return Action(
            f"Publish {_events(len(ids))} again?",
            f"{_events(len(ids))} that the relay gave up (“{reason}”) will wait for the broker again, from the first "
            "attempt on. Each purchase counts once, however often its event is published.",
            f"Publish {_events(len(ids))} again",
            ids,
        )

    async def _plan_redrive(self, query: Mapping[str, str]) -> Action:
        reason, ids = await self._in_quarantine(query)
        return Action(
            f"Try {_events(len(ids))} again?",
            f"{_events(len(ids))} in quarantine ({reason}) will be tried again, one by one. What can be counted is "
            "counted and leaves the quarantine; what still fails stays, with its reason.",
            f"Try {_events(len(ids))} again",
            ids,
        )

    async def _plan_discard(self, query: Mapping[str, str]) -> Action:
        reason, ids = await self._in_quarantine(query)
        return Action(
            f"Remove {_events(len(ids))} for good?",
            f"{_events(len(ids))} in quarantine ({reason}) will be deleted, content and all, and nobody can bring that "
            "back. If one of them stands for a recorded purchase that is not counted, nothing is removed.",
            f"Remove {_events(len(ids))} for good",
            ids,
            dangerous=True,
        )

    async def _plan_rebuild(self, query: Mapping[str, str]) -> Action:
        day = _day(query.get("day", ""))
        return Action(
            f"Rebuild {words.day(day)}?",
            f"All that is summed up of {words.long_day(day)} is compared with the recorded purchases and made equal to "
            "them, while sales and questions go on. Purchases that were never counted are counted; what nobody has "
            "recorded is taken out. It may be repeated.",
            f"Rebuild {words.day(day)}",
            (),
            day=day,
        )

    async def _in_quarantine(self, query: Mapping[str, str]) -> tuple[str, Sequence[str]]:
        reason = query.get("reason", "")
        return reason, _some([it.quarantine_id for it in await self._insides.quarantined(reason)])


def _some(ids: Sequence[str]) -> Sequence[str]:
    if not ids:
        raise Problem("There are no such events any more.", "Somebody may have seen to them meanwhile.")
    return ids


def _day(said: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(said)
    except ValueError:
        raise Problem(f"“{said[:20]}” is no day.", "Write it as 2026-03-15.") from None


def _events(count: int) -> str:
    return words.counted(count, "event")


def _said(count: int, what: str, nothing: str) -> str:
    return f"{_events(count)} {'is' if count == 1 else 'are'} {what}." if count else nothing


def _redriven(counted: int, remaining: int, gone: int) -> str:
    result = _said(counted, "counted now", "None could be counted.")
    return (
        result
        + (f" {_events(remaining)} stay{'s' * (remaining == 1)} in quarantine." if remaining else "")
        + _gone(gone)
    )


def _gone(count: int) -> str:
    return f" {_events(count)} {'was' if count == 1 else 'were'} not there any more." if count else ""
