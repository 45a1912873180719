"""Sales that need a row which somebody holds: they wait apart from all others until it is free, or their time is over.

Whoever locks a customer, say to erase it, stops the sales to this customer and no others.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import psycopg
import structlog
from psycopg_pool import PoolTimeout

from chassis.errors import TransactionConflict
from chassis.postgres import Pool, patience
from purchases_svc import stored
from purchases_svc.answers import Outcome
from purchases_svc.entry import Entry

LOOK_EVERY_S = 0.1

log = structlog.get_logger()


class Aside:
    def __init__(
        self,
        pool: Pool,
        go_on: Callable[[Entry], None],
        try_alone: Callable[[Entry], Awaitable[bool]],
        settle: Callable[[Entry, Outcome], None],
        drop: Callable[[Entry], None],
        patience_s: float,
    ) -> None:
        """`go_on` takes back a sale that nothing holds up any more; `try_alone` stores one, or says that it is held up
        still; `settle` answers one, `drop` forgets one whose caller has left. After `patience_s` a sale is given up.
        """
        self._pool, self._go_on, self._try_alone = pool, go_on, try_alone
        self._settle, self._drop = settle, drop
        self._patience_s = patience_s
        self._by_customer: dict[str, list[Entry]] = {}  # who is held, also while nobody waits for them
        self._alone: list[Entry] = []  # held up by what cannot be told
        self._watching: asyncio.Task[None] | None = None

    def takes(self, entry: Entry) -> bool:
        """Whether the sale waits here now, because somebody is known to hold its customer."""
        if not self._by_customer or (held := self._by_customer.get(entry.sale.customer_id or "")) is None:
            return False
        held.append(entry)
        return True

    async def sort_out(self, entries: list[Entry]) -> list[Entry]:
        """Take in those whose customer somebody holds, and a single one whatever it is; returns the others."""
        customers = {entry.sale.customer_id for entry in entries if entry.sale.customer_id}
        try:
            held = await self._held(customers)
        except (psycopg.Error, PoolTimeout):
            held = set()
        for customer_id in held:
            self._by_customer.setdefault(customer_id, [])
        others = [entry for entry in entries if not self.takes(entry)]
        if len(entries) == len(others) == 1:
            self._alone.append(others.pop())
        if (held or self._alone) and self._watching is None:
            log.info("sales wait for rows that somebody holds", customers=len(held), sales=len(entries) - len(others))
            self._watching = asyncio.create_task(self._watch())
        return others

    async def close(self) -> None:
        """Give up what waits here."""
        if self._watching is not None:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
        for entry in (*self._alone, *(entry for held in self._by_customer.values() for entry in held)):
            self._give_up(entry)

    async def _watch(self) -> None:
        try:
            while self._by_customer or self._alone:
                await asyncio.sleep(LOOK_EVERY_S)
                self._give_up_late()
                with suppress(psycopg.Error, PoolTimeout):
                    held = await self._held(self._by_customer.keys())
                    for customer_id in self._by_customer.keys() - held:
                        for entry in self._by_customer.pop(customer_id):
                            self._go_on(entry)
                for entry in list(self._alone):
                    if await self._try_alone(entry):
                        self._alone.remove(entry)
        finally:
            self._watching = None

    async def _held(self, customer_ids: Collection[str]) -> set[str]:
        if not customer_ids:
            return set()
        async with self._pool.connection() as connection:
            with patience(connection, self._patience_s):
                return await stored.held_customers(connection, sorted(customer_ids))

    def _give_up_late(self) -> None:
        """Those whose time is over, or whose caller has left."""
        since = datetime.now(UTC) - timedelta(seconds=self._patience_s)

        def stays(entry: Entry) -> bool:
            if entry.abandoned:
                self._drop(entry)
            elif entry.purchase.created_at < since:
                self._give_up(entry)
            else:
                return True
            return False

        self._alone = list(filter(stays, self._alone))
        for customer_id, entries in self._by_customer.items():
            self._by_customer[customer_id] = list(filter(stays, entries))

    def _give_up(self, entry: Entry) -> None:
        log.warning("a sale was given up: somebody holds what it needs", seconds=self._patience_s)
        self._settle(entry, TransactionConflict("somebody else holds what this sale needs; try again"))
