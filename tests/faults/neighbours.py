"""Faults of one that must not become those of all: a row or a table that somebody holds, a process of PostgreSQL that
is frozen, a caller that floods.

Meanwhile neighbours sell, one at each purchases service: they have to get through while the fault lasts, which it does
until they have.
"""

import itertools
import os
import random
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import LiteralString
from zoneinfo import ZoneInfo

import psycopg
from psycopg import sql

from deploy.local.machine import wait_until
from tests.faults.ledger import Ledger, Sale, business_day
from tests.faults.months import Months
from tests.faults.nodes import is_counted
from tests.faults.system import TIME_ZONE, Instance, System
from tests.faults.tills import Till, Tills

SALES = 10  # of each neighbour
GO_ON_TIMEOUT_S = 120.0  # longer than other faults stop a neighbour, one after the other
READY_TIMEOUT_S = 60.0
LOCK_TIMEOUT_S = 10
STUCK_S = 1.0  # who needs what is held has no answer for so long
ANALYZED: list[tuple[str, LiteralString]] = [
    ("purchases", "purchases"),
    ("purchases", "purchase_items"),
    ("purchases", "receipts"),
    ("purchases", "idempotency_keys"),
    ("purchases", "customers"),
    ("purchases", "outbox_events"),
    ("analytics", "analytics_event_log"),
    ("analytics", "daily_sales_by_branch"),
]
CLIENT_READ = "SELECT wait_event FROM pg_stat_activity WHERE pid = %s"  # it waits for its client, and holds no latch
FREEZABLE = (
    "SELECT pid FROM pg_stat_activity WHERE starts_with(usename::text, 'local_') AND wait_event = 'ClientRead'"
    " AND application_name = %s ORDER BY random() LIMIT 1"
)
POOLS = ["purchases write", "purchases write", "purchases read", "relay", "analytics consume"]


class NeighbourFaults:
    """`long_s` is how long a process is frozen at most: longer than every timeout."""

    def __init__(
        self, system: System, tills: Callable[[], Tills], ledger: Ledger, months: Months, long_s: float
    ) -> None:
        self._system, self._tills, self._ledger, self._months = system, tills, ledger, months
        self._long_s = long_s
        self.kinds: dict[str, Callable[[random.Random], bool]] = {
            "postgres.row_held": self._row_held,
            "postgres.table_analyzed": self._table_analyzed,
            "postgres.backend_frozen": self._backend_frozen,
            "till.flood": self._flood,
        }
        if system.cells > 1:
            self.kinds |= {
                "cell.database_closed": self._database_closed,
                "cell.killed": self._cell_killed,
                "cell.unheard": self._cell_unheard,
            }

    # --- the faults ---

    def _row_held(self, chance: random.Random) -> bool:
        """Somebody holds the row of a customer, or has taken a key or a receipt number and does not commit."""
        hold = chance.choice([self._hold_customer, self._hold_key, self._hold_receipt])
        instance = chance.choice(self._system.of("purchases"))
        target, database = self._system.target(instance), instance.service.database.name
        with self._undisturbed(), self._tills().beside(target) as till, self._transaction(database) as held:
            sale = hold(held, _plain(till))
            victim = threading.Thread(target=till.deliver, args=[sale], daemon=True)
            victim.start()
            victim.join(STUCK_S)
            stuck = victim.is_alive()
            self._others_sell("a row was held")
            self._system.pause(chance.uniform(0, 8))
            held.rollback()
            victim.join(GO_ON_TIMEOUT_S)
            if victim.is_alive():
                self._stopped(f"a row was held, and {GO_ON_TIMEOUT_S:.0f} s later its sale has no answer yet")
            return stuck

    @staticmethod
    def _hold_customer(held: psycopg.Connection, sale: Sale) -> Sale:
        row = held.execute("SELECT customer_id::text FROM customers ORDER BY random() LIMIT 1 FOR UPDATE").fetchone()
        assert row is not None
        return sale._replace(customer_id=row[0])

    @staticmethod
    def _hold_key(held: psycopg.Connection, sale: Sale) -> Sale:
        held.execute(
            "INSERT INTO idempotency_keys (idempotency_key, purchase_id, purchase_time, event_id)"
            " VALUES (%s, %s, %s, %s)",
            [sale.key, uuid.uuid4(), _time(sale), uuid.uuid4()],
        )
        return sale

    @staticmethod
    def _hold_receipt(held: psycopg.Connection, sale: Sale) -> Sale:
        day = business_day(sale.time_us, ZoneInfo(TIME_ZONE))
        held.execute(
            "INSERT INTO receipts (branch_id, pos_id, business_day, receipt_id, purchase_id, purchase_time)"
            " VALUES (%s, %s, %s, %s, %s, %s)",
            [sale.branch_id, sale.pos_id, day, sale.receipt_id, uuid.uuid4(), _time(sale)],
        )
        return sale

    def _table_analyzed(self, chance: random.Random) -> bool:
        """ANALYZE of a large table takes its time; with the same lock, VACUUM and the building of indexes do."""
        kind, table = chance.choice(ANALYZED)
        database = chance.choice(self._system.databases(kind))
        with self._undisturbed(), self._transaction(database) as held:
            held.execute("ANALYZE " + table)
            self._months.sell_in_a_new_one()
            self._others_sell(f"{table} was analyzed")
            self._system.pause(chance.uniform(0, 8))
        return True

    def _backend_frozen(self, chance: random.Random) -> bool:
        """A process of PostgreSQL stands still while its client has it, and answers nothing, no cancellation either."""
        pool = chance.choice(POOLS)
        with self._undisturbed():
            frozen: list[int] = []
            try:
                if not wait_until(lambda: self._freeze(pool, frozen), READY_TIMEOUT_S):
                    return False
                self._others_sell("a connection was frozen")
                self._system.pause(self._long_s * chance.uniform(0, 1))
            finally:
                for pid in frozen:
                    os.kill(pid, signal.SIGCONT)
            return True

    def _freeze(self, pool: str, frozen: list[int]) -> bool:
        """Only one that waits for its client: another one may hold what every process of the server needs."""
        with self._system.database("postgres") as connection:
            if (row := connection.execute(FREEZABLE, [pool]).fetchone()) is None:
                return False
            pid = int(str(row[0]))
            os.kill(pid, signal.SIGSTOP)
            frozen.append(pid)
            if connection.execute(CLIENT_READ, [pid]).fetchone() == ("ClientRead",):
                return True
            os.kill(pid, signal.SIGCONT)
            frozen.remove(pid)
        return False

    def _flood(self, chance: random.Random) -> bool:
        """One caller sends as much as it can over its connection: new sales, one again and again, or refused ones."""
        target = self._system.target(chance.choice(self._system.of("purchases")))
        over = threading.Event()
        with ExitStack() as stack:
            self._stack_instances(stack)
            till = stack.enter_context(self._tills().beside(target))
            sales, at_once = self._flood_of(chance, till)
            flooding = threading.Thread(target=till.flood, args=[sales, at_once, over.is_set], daemon=True)
            flooding.start()
            self._others_sell("a till flooded a service")
            self._system.pause(chance.uniform(0, 3))
            over.set()
            flooding.join(GO_ON_TIMEOUT_S)
            return not flooding.is_alive() and till.answers > 0

    def _flood_of(self, chance: random.Random, till: Till) -> tuple[Iterator[Sale], int]:
        """What is sent, and how much of it at once."""
        sale = _plain(till)
        match chance.choice(["new", "again", "refused"]):
            case "new":
                return (self._sent(_plain(till)) for _ in range(2_000)), 500
            case "refused":
                sale = sale._replace(customer_id=str(uuid.UUID(int=chance.getrandbits(128))))
        return itertools.repeat(self._sent(sale), 5_000), 2_500

    def _sent(self, sale: Sale) -> Sale:
        self._ledger.sale_sent(sale)
        return sale

    # --- a cell ---

    def _database_closed(self, chance: random.Random) -> bool:
        """One cell's database lets nobody in any more."""
        purchases, _ = self._one_cell(chance)
        name = purchases.service.database.name
        with self._undisturbed():
            try:
                self._let_in(name, 0)
                self._other_cells_go_on(purchases, "the database of another cell was closed")
                self._system.pause(chance.uniform(0, 8))
            finally:
                self._let_in(name, -1)
        return True

    def _let_in(self, database: str, sessions: int) -> None:
        """So many of those who are no superusers, -1 for all."""
        with self._system.database("postgres") as connection:
            name = sql.Identifier(database)
            connection.execute(sql.SQL("ALTER DATABASE {} CONNECTION LIMIT {}").format(name, sql.Literal(sessions)))
            if not sessions:
                ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
                connection.execute(ended + " AND starts_with(usename::text, 'local_')", [database])

    def _cell_killed(self, chance: random.Random) -> bool:
        """Both processes of one cell are dead for a while."""
        purchases, relay = self._one_cell(chance)
        with ExitStack() as stack:
            self._stack_instances(stack)
            stack.enter_context(relay.lock)
            try:
                for instance in (purchases, relay):
                    instance.wanted = False
                    instance.kill()
                self._other_cells_go_on(purchases, "another cell was dead")
                self._system.pause(chance.uniform(0, 8))
            finally:
                purchases.wanted = relay.wanted = True
        return True

    def _cell_unheard(self, chance: random.Random) -> bool:
        """What one cell's relay sends to the broker gets lost on its way: its sales are recorded, and not counted."""
        purchases, relay = self._one_cell(chance)
        lines = [line for line in self._system.proxies_to("rabbitmq") if line.name.startswith(f"{relay.name}>")]
        with ExitStack() as stack:
            self._stack_instances(stack)
            for line in lines:
                line.deafen()
            try:
                self._other_cells_go_on(purchases, "another cell's relay was unheard")
                self._system.pause(self._long_s * chance.uniform(0, 1))
            finally:
                for line in lines:
                    line.cut()
                    line.heal()
        return True

    def _one_cell(self, chance: random.Random) -> tuple[Instance, Instance]:
        """The purchases service and the relay of one."""
        purchases = chance.choice(self._system.of("purchases"))
        (relay,) = [it for it in self._system.of("relay") if it.service.cell == purchases.service.cell]
        return purchases, relay

    def _other_cells_go_on(self, away: Instance, while_what: str) -> None:
        """What they sell is counted, too."""
        begin = time.time()
        self._others_sell(while_what, [it for it in self._system.of("purchases") if it is not away])
        if not wait_until(lambda: is_counted(self._system, begin), GO_ON_TIMEOUT_S):
            self._stopped(f"{while_what}, and nothing that others sold was counted for {GO_ON_TIMEOUT_S:.0f} s")

    # --- the others ---

    def _others_sell(self, while_what: str, at: Sequence[Instance] = ()) -> None:
        """Each neighbour makes its sales, or that is a finding; there is one at each service, or at these."""
        sellers = [
            threading.Thread(target=self._sell, args=[self._system.target(instance)], daemon=True)
            for instance in at or self._system.of("purchases")
        ]
        for seller in sellers:
            seller.start()
        if not wait_until(lambda: not any(seller.is_alive() for seller in sellers), GO_ON_TIMEOUT_S):
            self._stopped(f"{while_what}, and others could not sell for {GO_ON_TIMEOUT_S:.0f} s")

    def _sell(self, target: str) -> None:
        with self._tills().beside(target) as till:
            while till.answers < SALES:
                till.deliver(_plain(till))

    def _stopped(self, why: str) -> None:
        self._ledger.write("stopped", why=why)

    # --- nothing else, meanwhile ---

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """No other fault has the database, or a purchases service."""
        with ExitStack() as stack:
            self._stack_instances(stack)
            stack.enter_context(self._system.postgres_lock)
            yield

    def _stack_instances(self, stack: ExitStack) -> None:
        instances = self._system.of("purchases")
        for instance in instances:
            stack.enter_context(instance.lock)
        wait_until(lambda: all(instance.ready for instance in instances), READY_TIMEOUT_S)

    @contextmanager
    def _transaction(self, database: str) -> Iterator[psycopg.Connection]:
        """Of somebody else; it is rolled back in the end."""
        with psycopg.connect(self._system.url(database), connect_timeout=5) as connection:
            try:
                connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_S}s'")
                yield connection
            finally:
                connection.rollback()


def _plain(till: Till) -> Sale:
    """Of now and without a customer: it needs no row that another sale has, and no month that is yet to be made."""
    return till.sale(time_us=time.time_ns() // 1_000)._replace(customer_id=None, register=False)


def _time(sale: Sale) -> datetime:
    return datetime.fromtimestamp(sale.time_us / 1_000_000, UTC)
