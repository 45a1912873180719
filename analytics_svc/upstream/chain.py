"""All cells of the chain: each is asked by itself, and their answers are put together.

Of a branch that has moved, two cells may tell: for an hour, the one that it has left goes on to tell what it has. At
any moment one cell has all sales of a branch, and what another one tells is part of that, whatever any file says. So of
sums the larger ones count, and of purchases each is told once. A cell that does not answer is an outage: nothing is
said of all without it.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, date, datetime
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import grpc
import structlog

from analytics_svc.purchase import PurchaseCreated
from analytics_svc.upstream import SERVICE_CONFIG
from analytics_svc.upstream.outbox import Outbox
from analytics_svc.upstream.source import CellSource, Recorded, RecordedDays, Totals
from chassis import cells, grpc_client
from chassis.cells import Cell, Cells, CellsSettings
from chassis.followed import Followed
from chassis.tls import Credentials
from chassis.zones import business_day

log = structlog.get_logger()


class Asked(NamedTuple):
    """A cell's processes, as seen from here."""

    cell: Cell
    source: CellSource
    outbox: Outbox
    channels: tuple[grpc.aio.Channel, grpc.aio.Channel]


async def _nothing(_: Asked) -> None:
    pass


class Chain:
    """A `Source` over all cells, whose list may change meanwhile."""

    def __init__(
        self, said: Followed[Cells] | None, only: Cells, zone: ZoneInfo, credentials: Credentials | None
    ) -> None:
        """`only` is what there is without a file that says it."""
        self._said, self._only, self._zone, self._credentials = said, only, zone, credentials
        self._asked: dict[Cell, Asked] = {}

    @property
    def cells(self) -> Cells:
        return self._said.value if self._said else self._only

    async def follow(self, work: Callable[[Asked], Coroutine[Any, Any, None]] = _nothing) -> None:
        """Follow the file, and do `work` on each cell while it is listed; until cancelled."""
        changed = asyncio.Event()
        working: dict[Cell, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            if self._said:
                group.create_task(self._said.follow(changed.set))
            while True:
                listed = {each.cell: each for each in self.asked()}
                for cell in working.keys() - listed.keys():
                    log.warning("a cell has changed, or is not listed any more", cell=cell.name)
                    working.pop(cell).cancel()
                for cell in listed.keys() - working.keys():
                    working[cell] = group.create_task(work(listed[cell]))
                await changed.wait()
                changed.clear()

    def asked(self) -> list[Asked]:
        return [self._asked.get(cell) or self._open(cell) for cell in self.cells.by_name.values()]

    def _open(self, cell: Cell) -> Asked:
        purchases, relay = (
            grpc_client.connect(target, SERVICE_CONFIG, self._credentials) for target in (cell.purchases, cell.relay)
        )
        asked = Asked(cell, CellSource(purchases, self._zone), Outbox(relay), (purchases, relay))
        self._asked[cell] = asked
        return asked

    async def close(self) -> None:
        """Not before the end, also of cells that are not listed any more: it cancels whoever asks them just now."""
        for asked in self._asked.values():
            for channel in asked.channels:
                await channel.close()

    def today(self) -> date:
        return self.day_of(datetime.now(UTC))

    def day_of(self, moment: datetime) -> date:
        return business_day(moment, self._zone)

    async def control_totals(self, first: date, last: date) -> Recorded:
        asked = self.asked()
        answers = await asyncio.gather(*(each.source.control_totals(first, last) for each in asked))
        totals: dict[tuple[date, int], Totals] = {}
        for answer in answers:
            for key, row in answer.totals.items():
                if self.cells.of_branch(key[1]) and row.purchases > totals.get(key, Totals()).purchases:
                    totals[key] = row
        return Recorded(
            totals,
            # Each cell has read by its own clock. What is complete through the latest is so in all of them.
            max(answer.read_at for answer in answers),
            min((answer.earliest for answer in answers if answer.earliest), default=None),
            max((answer.latest for answer in answers if answer.latest), default=None),
            max((answer.complete_from for answer in answers if answer.complete_from), default=None),
        )

    async def recorded_days(self, after: str) -> RecordedDays:
        """Its position has those of all cells; of a cell that is new, all days are listed."""
        asked, positions = self.asked(), _positions(after)
        questions = (each.source.recorded_days(positions.get(each.cell.name, "")) for each in asked)
        answers = await asyncio.gather(*questions)
        position = {each.cell.name: answer.position for each, answer in zip(asked, answers, strict=True)}
        return RecordedDays(
            sorted({day for answer in answers for day in answer.days}),
            json.dumps(position),
            min(answer.as_of for answer in answers),
        )

    async def export(
        self, first: date, last: date, customer_ids: Sequence[str] = ()
    ) -> AsyncGenerator[list[PurchaseCreated], None]:
        asked = self.asked()
        told: set[int] = set()  # events, by id: 100 bytes of memory each
        for each in asked:
            async with aclosing(each.source.export(first, last, customer_ids)) as chunks:
                async for chunk in chunks:
                    events = [event for event in chunk if self.cells.of_branch(event.branch_id)]
                    if len(asked) > 1:
                        events = [event for event in events if UUID(event.event_id).int not in told]
                    if each is not asked[-1]:
                        told.update(UUID(event.event_id).int for event in events)
                    yield events

    async def recorded_day(self, purchase_id: str) -> date | None:
        days = await asyncio.gather(*(each.source.recorded_day(purchase_id) for each in self.asked()))
        return next(filter(None, days), None)

    async def holds_event(self, event_id: str) -> bool:
        """Whether a purchase was recorded with this event, as far back as the outboxes are kept.

        Raises:
            RelayUnavailable: one of them does not say.
        """
        return any(await asyncio.gather(*(each.outbox.holds(event_id) for each in self.asked())))


@asynccontextmanager
async def connect(
    config: CellsSettings, zone: ZoneInfo, credentials: Credentials | None, *, purchases: str, relay: str
) -> AsyncIterator[Chain]:
    """The chain, as the file of cells says; without one, its only cell is at these addresses, which need not be up yet.

    Raises:
        SettingsError: the file makes no sense.
    """
    said = cells.follow(config) if config.cells_file else None
    chain = Chain(said, cells.only(purchases, relay), zone, credentials)
    try:
        yield chain
    finally:
        await chain.close()


def _positions(said: str) -> dict[str, str]:
    """By cell. What is none of ours means nothing: then all is listed."""
    try:
        found = json.loads(said)
    except ValueError:
        return {}
    return {name: str(position) for name, position in found.items()} if isinstance(found, dict) else {}
