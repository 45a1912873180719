"""The loop: claim events, publish them, mark those that were confirmed."""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import psycopg
import structlog
from prometheus_client import Counter, Gauge, Histogram
from psycopg_pool import PoolTimeout

from chassis import traces
from chassis.lifecycle import Backoff, wait_set
from chassis.postgres import Connection, Pool
from chassis.signs_of_life import kept_alive
from chassis.standby import make_durable
from relay_svc import days, outbox
from relay_svc.days import Day, Found
from relay_svc.outbox import OutboxEvent, Position
from relay_svc.publisher import Outcome, Publisher
from relay_svc.topology import EXCHANGE, ROUTING_KEY

LANES = 2  # windows on their way: while the broker confirms one, the next is claimed and sent, and the last is marked
# How long the relay waits before it looks again. After a window that was not full, the longer the more was in it: a few
# events are soon in the queue, many share a commit. After nothing, a twentieth of the time for which nothing has come.
LOOK_AGAIN_S = 0.005
GATHER_S, GATHER_EACH_S = 0.01, 0.002
SILENCE_SHARE = 0.05
FLOWING_S = 0.03  # so long after an event, the next look claims at once, whether or not it will find something
BROKER_EVERY_S = 1.0  # that an idle relay makes sure of the broker: trouble shows before the first event does
RETRIES_EVERY_S = 1.0  # or ten times that often, while there are many; new events go in between
# Events that another relay had claimed and gave up are found by a sweep.
SWEEP_EVERY_S = 30.0
SWEEP_TIMEOUT_S = 300.0  # the first one after a start may pass a long day's events, if vacuum could not clean up
RATE_OVER_S = 60.0
WITNESSES = 3  # events that tell by going through whether a refused one is at fault, or the broker
DURABLE_TIMEOUT_S = 10.0

DESTINATION = f"{EXCHANGE}:{ROUTING_KEY}"  # as traces name it

SENT = Counter("relay_events_sent_total", "Events that the broker confirmed.")
FAULTS = Counter("relay_event_faults_total", "Attempts that failed by the event's own fault.")
BREAKER_OPEN = Gauge("relay_breaker_open", "1 while the broker does not take events.")
CONFIRM_SECONDS = Histogram(
    "relay_confirm_seconds",
    "Time from sending a window to the broker's last word on it.",
    buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)

log = structlog.get_logger()


class Step(NamedTuple):
    """What one round did."""

    claimed: int
    outage: str | None


class Window(NamedTuple):
    """Events that are claimed, the days that they are among, and whether they are to be made durable first."""

    events: Sequence[OutboxEvent]
    days: Sequence[Day]
    waits_for_standby: bool


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
        self, pool: Pool, publisher: Publisher, *, window: int, attempts_max: int, look_every_s: float
    ) -> None:
        """`pool` has a connection for each lane, and two more. A mark that is lost in a crash means one more
        publication, which consumers ignore: its connections need not wait for the disk. An idle relay looks for events
        every `look_every_s`."""
        self._pool, self._publisher, self._look_every_s = pool, publisher, look_every_s
        self._window, self._attempts_max = window, attempts_max
        self._claiming = asyncio.Lock()
        self._rate = Rate()
        self._forget_place()
        self._last_event_at = self._look_at = self._broker_at = self._retries_at = 0.0
        self.breaker_reason: str | None = None
        self.sent = 0  # events confirmed since the start

    def _forget_place(self) -> None:
        """The next connection may be to another server: after a failover, transactions have other numbers."""
        self._position: Position = outbox.START
        self._low_water: Position | None = None  # not known yet
        self._found: Found | None = None  # the days that are open
        self._sweep_at = 0.0  # before any claim: it may take long to get past what was sent

    def events_per_second(self) -> float:
        """Events confirmed per second over the last minute."""
        return self._rate.per_second()

    async def run(self, stop: asyncio.Event) -> None:
        """Publish until `stop`. While the broker takes no events the breaker is open: nothing is claimed but one event
        at a time, with growing pauses. An outage costs no attempts. Only such a probe closes the breaker: what another
        lane had sent before the outage may well be confirmed after it, and says nothing of how the broker is now."""
        backoff = Backoff(0.1, 5.0)
        while not stop.is_set():
            try:
                if self.breaker_reason is None:
                    async with asyncio.TaskGroup() as lanes:
                        for _ in range(LANES):
                            lanes.create_task(self._lane(stop, backoff))
                else:
                    probe = await self.run_once(limit=1)
                    if probe.outage is None:
                        self._close_breaker()
            except* (psycopg.Error, PoolTimeout) as errors:  # a server that went read-only in a failover, too
                log.warning("database trouble", error=errors.exceptions[0])
                self._forget_place()
                await wait_set(stop, backoff.next_s())
            else:
                if self.breaker_reason:
                    await wait_set(stop, backoff.next_s())

    async def _lane(self, stop: asyncio.Event, backoff: Backoff) -> None:
        """Window after window on one connection, until the breaker opens."""
        async with self._pool.connection() as connection:
            while not (stop.is_set() or self.breaker_reason):
                if (await self._run_window(connection, self._window)).outage is None:
                    backoff.reset()

    async def run_once(self, limit: int) -> Step:
        """One window, of so many events at most."""
        async with self._pool.connection() as connection:
            return await self._run_window(connection, limit)

    async def _run_window(self, connection: Connection, limit: int) -> Step:
        """Claim, publish, mark, commit. The transaction holds the claim, so it lasts until the confirms; whoever lends
        the connection ends it when this fails."""
        await self._sweep_when_due()
        window = await self._claim(connection, limit)
        if not window.events:
            await connection.rollback()
            outage = await self._ask_broker()
            self._open_breaker(outage)
            return Step(0, outage)
        async with kept_alive(connection):
            if window.waits_for_standby:
                await self._make_durable()
            outcome = await self._publish_traced(connection, window)
        async with connection.pipeline():
            await outbox.mark_sent(connection, outcome.confirmed, window.days)
            await outbox.mark_faulty(connection, outcome.faulty, self._attempts_max)
            await connection.execute("COMMIT")
        SENT.inc(len(outcome.confirmed))
        self.sent += len(outcome.confirmed)
        self._rate.add(len(outcome.confirmed))
        if outcome.faulty:
            FAULTS.inc(len(outcome.faulty))
            log.error("events cannot be published", faults=outcome.faulty)
        if len(outcome.confirmed) + len(outcome.faulty) < len(window.events):
            async with self._claiming:
                self._position = self._low_water or outbox.START  # the rest still waits
        self._open_breaker(outcome.outage)
        return Step(len(window.events), outcome.outage)

    async def _publish_traced(self, connection: Connection, window: Window) -> Outcome:
        """Publish, with a span for each event that is traced; the message tells of it, so that the trace goes on."""
        began, events = time.perf_counter(), window.events
        with traces.together(
            f"publish {DESTINATION}",
            "PRODUCER",
            (event.traceparent for event in events),
            {
                "messaging.system": "rabbitmq",
                "messaging.operation.name": "publish",
                "messaging.operation.type": "send",
                "messaging.destination.name": DESTINATION,
                "messaging.rabbitmq.destination.routing_key": ROUTING_KEY,
                "messaging.batch.message_count": len(events),
            },
            lambda place: {"messaging.message.id": events[place].event_id},
        ) as spans:
            if traceparents := spans.traceparents:
                events = [
                    event._replace(traceparent=traceparents.get(place, event.traceparent))
                    for place, event in enumerate(events)
                ]
            outcome = await self._publish(connection, window._replace(events=events))
            if outcome.outage:
                spans.fail("outage")
        CONFIRM_SECONDS.observe(time.perf_counter() - began, spans.exemplar)
        return outcome

    async def _ask_broker(self) -> str | None:
        """Why the broker takes no events, as far as it was asked: now and then, and whenever it took none before."""
        if self.breaker_reason is None and time.monotonic() < self._broker_at:
            return None
        self._broker_at = time.monotonic() + BROKER_EVERY_S
        return await self._publisher.connect()

    async def _publish(self, connection: Connection, window: Window) -> Outcome:
        """Publish; what is refused alone is at fault only if the broker takes another event now.

        When none of these went through, the newest others are published too: once more, perhaps, which does no harm.
        """
        outcome = await self._publisher.publish(window.events)
        if outcome.outage or not outcome.refused:
            return outcome
        these = [event.event_id for event in window.events]
        witnesses = await outbox.newest(connection, WITNESSES, window.days, these)
        if (await self._publisher.publish(witnesses)).confirmed:
            return outcome._replace(faulty={**outcome.faulty, **outcome.refused})
        reason = next(iter(outcome.refused.values()))
        return outcome._replace(outage=f"the broker refuses every message: {reason}")

    async def _make_durable(self) -> None:
        """What the server may lose in a failover is not published: the till would sell it again, with another event."""
        try:
            async with asyncio.timeout(DURABLE_TIMEOUT_S), self._pool.connection() as connection:
                await make_durable(connection)
        except TimeoutError:
            raise psycopg.OperationalError("no standby takes what is to be published") from None

    async def _claim(self, connection: Connection, limit: int) -> Window:
        """The next window. One lane looks at a time, from where the last ended, when it is time to. While events come
        one after the other it goes on, in one transaction."""
        async with self._claiming:
            while True:
                await asyncio.sleep(max(self._look_at - time.monotonic(), 0))
                window, more = await self._look(connection, limit)
                now = time.monotonic()
                if window.events:
                    self._last_event_at = now
                    pause_s = min(max(len(window.events) * GATHER_EACH_S, LOOK_AGAIN_S), GATHER_S)
                else:
                    pause_s = max((now - self._last_event_at) * SILENCE_SHARE, LOOK_AGAIN_S)
                self._look_at = now if more else now + min(pause_s, self._look_every_s)
                if window.events or not self._flowing():
                    return window

    def _flowing(self) -> bool:
        """Whether events come one after the other: then many a look finds one."""
        return time.monotonic() - self._last_event_at < FLOWING_S

    async def _look(self, connection: Connection, limit: int) -> tuple[Window, bool]:
        """What waits, and whether there is more. Retries now and then; new events go in between."""
        if self._found is None:
            self._found = await days.open_days(connection)
        found = self._found
        if time.monotonic() >= self._retries_at:
            retries = await outbox.claim_retries(connection, limit, found.days)
            pause_s = RETRIES_EVERY_S if len(retries) < limit else RETRIES_EVERY_S / 10
            self._retries_at = time.monotonic() + pause_s
            if retries:
                return Window(retries, found.days, True), len(retries) >= limit
        elif not self._flowing() and not await outbox.waits(connection, self._position, found):
            return Window((), found.days, False), False
        claim = await outbox.claim(connection, limit, self._position, found)
        self._position = claim.position
        if claim.days_changed:
            self._found = None
        more = claim.days_changed or len(claim.events) >= limit
        return Window(claim.events, found.days, claim.waits_for_standby), more

    async def _sweep_when_due(self) -> None:
        if time.monotonic() < self._sweep_at:
            return
        self._sweep_at = time.monotonic() + SWEEP_EVERY_S
        async with self._claiming, self._pool.connection() as connection, connection.transaction():
            await connection.execute(f"SET LOCAL statement_timeout = {int(SWEEP_TIMEOUT_S * 1000)}")
            low_water = self._low_water or await outbox.begin(connection)
            self._position = self._low_water = await outbox.sweep(connection, low_water)

    def _open_breaker(self, outage: str | None) -> None:
        if outage is None:
            return
        if self.breaker_reason is None:
            log.warning("breaker open: the broker does not take events", reason=outage)
        self.breaker_reason = outage
        BREAKER_OPEN.set(1)

    def _close_breaker(self) -> None:
        log.info("breaker closed: the broker takes events again")
        self.breaker_reason = None
        BREAKER_OPEN.set(0)
