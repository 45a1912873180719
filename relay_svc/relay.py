"""The loop: claim events, publish them, mark those that were confirmed."""

import asyncio
import time
import uuid
from collections import deque
from typing import NamedTuple

import structlog
from prometheus_client import Counter, Gauge

from chassis.lifecycle import Backoff, wait_set
from chassis.postgres import UNAVAILABLE, Pool
from relay_svc import outbox
from relay_svc.publisher import Publisher

# Empty claims would have to pass all the index entries of events that were sent since the last vacuum, so a claim
# starts at a floor. What commits late, or waits for another attempt, below the floor is found by a full scan.
FLOOR_MARGIN_S = 5.0
FULL_SCAN_EVERY_S = 30.0
RATE_OVER_S = 60.0

SENT = Counter("relay_events_sent_total", "Events that the broker confirmed.")
FAULTS = Counter("relay_event_faults_total", "Attempts that failed by the event's own fault.")
BREAKER_OPEN = Gauge("relay_breaker_open", "1 while the broker does not take events.")

log = structlog.get_logger()


class Step(NamedTuple):
    """What one round did."""

    claimed: int
    outage: str | None


class Rate:
    """How much happened per second over the last minute, or since the start when that is less long ago."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._counts: deque[tuple[float, int]] = deque()

    def add(self, count: int) -> None:
        self._counts.append((time.monotonic(), count))
        self._forget()

    def per_second(self) -> float:
        self._forget()
        seconds = min(time.monotonic() - self._started, RATE_OVER_S)
        return sum(count for _, count in self._counts) / max(seconds, 1.0)

    def _forget(self) -> None:
        while self._counts and self._counts[0][0] < time.monotonic() - RATE_OVER_S:
            self._counts.popleft()


class Relay:
    """Publishes what is in the outbox. A crash anywhere means that events are claimed again: repeated, never lost."""

    def __init__(
        self, pool: Pool, publisher: Publisher, *, window: int, attempts_max: int, poll_every_s: float
    ) -> None:
        self._pool, self._publisher = pool, publisher
        self._window, self._attempts_max, self._poll_every_s = window, attempts_max, poll_every_s
        self._floor = outbox.NIL
        self._full_scan_at = 0.0
        self._rate = Rate()
        self.breaker_reason: str | None = None

    def events_per_second(self) -> float:
        """Events confirmed per second over the last minute."""
        return self._rate.per_second()

    async def run(self, stop: asyncio.Event) -> None:
        """Rounds until `stop`. While the breaker is open, one event at a time is tried, with growing pauses: an outage
        costs no attempts, and the first success closes it."""
        backoff = Backoff(0.1, 5.0)
        while not stop.is_set():
            try:
                step = await self.run_once(limit=1 if self.breaker_reason else self._window)
            except UNAVAILABLE as error:
                log.warning("database trouble", error=str(error).strip())
                await wait_set(stop, backoff.next_s())
                continue
            self._set_breaker(step)
            if step.outage:
                await wait_set(stop, backoff.next_s())
            elif step.claimed == 0:
                await wait_set(stop, self._poll_every_s)
            if not step.outage:
                backoff.reset()

    async def run_once(self, limit: int) -> Step:
        """Claim, publish, mark, commit: one window. The transaction holds the claim, so it lasts until the confirms."""
        async with self._pool.connection() as connection, connection.transaction():
            # A mark that is lost in a crash means one more publication, which consumers ignore; no need to wait for it.
            await connection.execute("SET LOCAL synchronous_commit = off")
            events = await outbox.claim(connection, limit, self._next_floor())
            if not events:
                return Step(0, await self._publisher.connect())  # an outage shows before the first event does
            outcome = await self._publisher.publish(events)
            await outbox.mark_sent(connection, outcome.confirmed)
            await outbox.mark_faulty(connection, outcome.faulty, self._attempts_max)
        SENT.inc(len(outcome.confirmed))
        self._rate.add(len(outcome.confirmed))
        if outcome.faulty:
            FAULTS.inc(len(outcome.faulty))
            log.error("events cannot be published", faults=outcome.faulty)
        if outcome.outage is None:
            self._floor = _floor_below(events[-1].event_id)
        return Step(len(events), outcome.outage)

    def _next_floor(self) -> str:
        now = time.monotonic()
        if now < self._full_scan_at:
            return self._floor
        self._full_scan_at = now + FULL_SCAN_EVERY_S
        return outbox.NIL

    def _set_breaker(self, step: Step) -> None:
        if step.outage and not self.breaker_reason:
            log.warning("breaker open: the broker does not take events", reason=step.outage)
        if self.breaker_reason and not step.outage:
            log.info("breaker closed: the broker takes events again")
        self.breaker_reason = step.outage
        BREAKER_OPEN.set(1 if self.breaker_reason else 0)


def _floor_below(event_id: str) -> str:
    """The least id of a time a little before that of an event: ids are UUIDv7, with milliseconds first."""
    milliseconds = max((uuid.UUID(event_id).int >> 80) - int(FLOOR_MARGIN_S * 1000), 0)
    return str(uuid.UUID(int=milliseconds << 80))
