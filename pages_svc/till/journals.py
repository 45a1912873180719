"""The journals of the tills that sell here, and the switch that takes a till off the network, to see what happens.

A till that is offline sells into its journal. Once it is online, what waits is sent, each sale once; after a restart
all are online.
"""

import asyncio
import datetime
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple, TypeVar

import structlog

from chassis.tls import Broken
from pages_svc.till.clients import Clients
from pos.client import Sale
from pos.journal import Journal, JournalError, JournalStatus

TILLS_MAX = 64
SOLD_MAX = 1_000  # carts that are remembered as sold
DRAIN_EVERY_S = 1.0
DRAIN_S = 10.0  # for one go

T = TypeVar("T")
Till = tuple[int, str]  # branch and till
Zone = Callable[[], Awaitable[datetime.tzinfo | None]]  # the chain's; None while it is not known

log = structlog.get_logger()


class TillState(NamedTuple):
    """How a till does."""

    offline: bool
    journal: JournalStatus | None  # None: it has none yet


class Journals:
    """One journal for each till, in `directory`; nobody else may have them open."""

    def __init__(self, directory: Path, clients: Clients, zone: Zone, executor: Executor) -> None:
        self._directory, self._clients, self._zone, self._executor = directory, clients, zone, executor
        self._open: dict[Till, Journal] = {}
        self._opening = asyncio.Lock()
        self._offline: set[Till] = set()
        self._sold: OrderedDict[str, int] = OrderedDict()  # by the cart's key: pressed twice, it is sold once

    async def switch(self, till: Till, *, offline: bool) -> None:
        """Raises JournalError: the till has no journal to sell into."""
        if offline:
            await self._journal(till)
            self._offline.add(till)
        else:
            self._offline.discard(till)

    def is_offline(self, till: Till) -> bool:
        return till in self._offline

    async def state(self, till: Till) -> TillState:
        journal = self._open.get(till) or (await self._journal(till) if self._path(till).exists() else None)
        status = await self._run(journal.status) if journal else None
        return TillState(till in self._offline, status)

    async def sell(self, sale: Sale, register_customer: bool) -> int:
        """Write a sale to the till's disk; its number there.

        Raises:
            JournalError, pos.errors.InvalidSale: it is not sold.
        """
        if sale.idempotency_key not in self._sold:
            journal = await self._journal((sale.branch_id, sale.pos_id))
            receipt = await self._run(
                lambda: journal.record_sale(
                    sale.items,
                    cashier_id=sale.cashier_id,
                    customer_id=sale.customer_id,
                    register_customer=register_customer,
                    purchase_time=sale.purchase_time,
                )
            )
            self._sold[sale.idempotency_key] = receipt.sequence
            while len(self._sold) > SOLD_MAX:
                self._sold.popitem(last=False)
        return self._sold[sale.idempotency_key]

    async def drain(self) -> None:
        """Send what waits of all that are online, for ever."""
        for path in self._directory.glob("branch-*-till-*"):  # of an earlier process
            branch, _, pos = path.name.removeprefix("branch-").partition("-till-")
            if branch.isdigit():
                await self._try_to_open((int(branch), pos))
        while True:
            for till, journal in list(self._open.items()):
                if till not in self._offline:
                    await self._send(till, journal)
            await asyncio.sleep(DRAIN_EVERY_S)

    def close(self) -> None:
        for journal in self._open.values():
            journal.close()

    async def _send(self, till: Till, journal: Journal) -> None:
        try:
            if (await self._run(journal.status)).waiting:
                client = self._clients.of_till(*till)
                flushed = await self._run(lambda: journal.flush(client, within_s=DRAIN_S))
                log.info("sent what waited", till=till, stored=flushed.stored, waiting=flushed.waiting)
        except (JournalError, Broken) as error:
            log.warning("what waits at a till is not sent", till=till, error=error)

    async def _try_to_open(self, till: Till) -> None:
        try:
            await self._journal(till)
        except JournalError as error:
            log.warning("a till's journal cannot be opened", till=till, error=error)

    async def _journal(self, till: Till) -> Journal:
        async with self._opening:
            if till not in self._open:
                if len(self._open) >= TILLS_MAX:
                    raise JournalError(f"more than {TILLS_MAX} tills sell by this page")
                zone = await self._zone()
                branch_id, pos_id = till
                self._open[till] = await self._run(
                    lambda: Journal(self._path(till), branch_id=branch_id, pos_id=pos_id, zone=zone)
                )
            return self._open[till]

    def _path(self, till: Till) -> Path:
        if "/" in till[1] or "\0" in till[1] or not till[1]:
            raise JournalError("a till's name has letters, digits, points, hyphens and underscores only")
        return self._directory / f"branch-{till[0]}-till-{till[1]}"

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)
