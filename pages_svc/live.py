"""What many people look at, rendered once: the parts of a page are sent to each viewer as they change.

Server-sent events: `parts` has, by its place in the page, the HTML of each part that changed since this viewer was last
sent something; a new viewer gets all. Nobody has a queue: who reads slowly gets the latest, less often.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import structlog
from prometheus_client import Counter, Gauge

from pages_svc.person import Person, current, scope, set_current
from pages_svc.upstream.bell import Bell

UPDATE_EVERY_S = 0.5  # twice a second at most
LOOK_EVERY_S = 2.0  # also when no sale comes: times pass, and audits end
HEARTBEAT_S = 15.0  # so that what is between us and the browser keeps the connection, and we notice who is gone
READING_AT_ONCE = 8
RETRY_MS = 1_000  # after which a browser that has lost us comes again

VIEWERS = Gauge("pages_viewers", "Browsers that follow a page.")
UPDATES = Counter("pages_updates_total", "Pages rendered anew for those who follow them.")

log = structlog.get_logger()

Parts = Mapping[str, str]  # HTML by the id of its place
What = TypeVar("What", bound=Hashable)  # names what somebody looks at


@dataclass
class _Page:
    """What some look at, for all who look at it."""

    viewers: int = 0
    person: Person | None = None  # in whose name it is rendered: of those who follow it, whose token lasts longest
    update: int = 0
    parts: dict[str, tuple[int, str]] = field(default_factory=dict)  # with the update that changed each
    bell: Bell = field(default_factory=Bell)

    def put(self, parts: Parts) -> None:
        changed = {name: html for name, html in parts.items() if self.parts.get(name, (0, None))[1] != html}
        if changed:
            self.update += 1
            self.parts |= {name: (self.update, html) for name, html in changed.items()}
            self.bell.ring()

    def since(self, update: int) -> dict[str, str]:
        return {name: html for name, (changed, html) in self.parts.items() if changed > update}


class Live(Generic[What]):
    """Renders what is looked at, when something has changed, and sends it to whoever looks."""

    def __init__(
        self, render: Callable[[What], Awaitable[Parts]], changes: Bell, version: str, *, viewers_max: int
    ) -> None:
        """`version` of the files in the browser: a page with others loads itself anew."""
        self._render, self._changes, self._version, self._viewers_max = render, changes, version, viewers_max
        self._pages: dict[tuple[What, tuple[object, ...]], _Page] = {}
        self._viewers = 0
        self._draining = False

    async def run(self) -> None:
        seen = 0
        reading = asyncio.Semaphore(READING_AT_ONCE)

        async def refresh(what: What, page: _Page) -> None:
            async with reading:
                set_current(page.person)
                try:
                    page.put(await self._render(what))
                    UPDATES.inc()
                except Exception as error:  # one page must not keep the others from going on
                    log.exception("a page cannot be rendered", error=error)

        while True:
            begun = time.monotonic()
            await asyncio.gather(*(refresh(what, page) for (what, _), page in list(self._pages.items())))
            await asyncio.sleep(max(UPDATE_EVERY_S - (time.monotonic() - begun), 0.05))
            try:
                async with asyncio.timeout(LOOK_EVERY_S):
                    seen = await self._changes.wait_beyond(seen)
            except TimeoutError:
                pass

    def drain(self) -> None:
        """The process ends: every viewer is told to come again, which finds the next process."""
        self._draining = True
        for page in self._pages.values():
            page.bell.ring()

    @property
    def full(self) -> bool:
        return self._viewers >= self._viewers_max

    async def follow(self, what: What) -> AsyncIterator[bytes]:
        """The events for one viewer."""
        who = current()
        key = (what, scope())
        page = self._pages.setdefault(key, _Page())
        page.person = max(filter(None, (page.person, who)), key=_lasts, default=None)
        page.viewers += 1
        self._viewers += 1
        VIEWERS.inc()
        try:
            if not page.parts:
                page.put(await self._render(what))
            yield f"retry: {RETRY_MS}\nevent: version\ndata: {self._version}\n\n".encode()
            sent, rung = 0, page.bell.count
            while not self._draining:
                if who and _lasts(who) <= time.time():  # it loads itself anew, and is asked to sign in
                    yield b"event: version\ndata: signed out\n\n"
                    return
                if parts := page.since(sent):
                    sent = page.update
                    yield f"event: parts\ndata: {json.dumps(parts)}\n\n".encode()
                try:
                    async with asyncio.timeout(HEARTBEAT_S):
                        rung = await page.bell.wait_beyond(rung)
                except TimeoutError:
                    yield b": still here\n\n"
        finally:
            page.viewers -= 1
            self._viewers -= 1
            VIEWERS.dec()
            if not page.viewers and self._pages.get(key) is page:
                del self._pages[key]


def _lasts(person: Person) -> float:
    return person.caller.until if person.caller.until is not None else float("inf")
