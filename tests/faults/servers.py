"""Faults of the servers, and of the lines to them: killed, restarted, locked, full; cut, deaf, slow.

Every method breaks something, waits, and mends it; True when it happened as it was meant.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import LiteralString

import psycopg
from pika.adapters.blocking_connection import BlockingChannel

from deploy.local.machine import wait_until
from tests.faults.proxy import Proxy
from tests.faults.system import System

EXCHANGE, QUEUE = "purchases", "purchases.created"
TAP = "somebody.else"
ANSWER_TIMEOUT_S = 20.0  # for a commit whose answer can be lost
FRAME_TIMEOUT_S = 4.0
READY_TIMEOUT_S = 60.0
LOCK_TIMEOUT_S = 10
LOCKED: list[tuple[str, LiteralString]] = [
    ("purchases", "purchases"),
    ("purchases", "idempotency_keys"),
    ("purchases", "outbox_events"),
    ("analytics", "analytics_event_log"),
    ("analytics", "daily_sales_by_branch"),
    ("analytics", "freshness"),
]


class ServerFaults:
    """`long_s` is how long a line is deaf at most: longer than every timeout."""

    def __init__(self, system: System, long_s: float) -> None:
        self._system, self._long_s = system, long_s
        self.kinds: Mapping[str, Callable[[random.Random], bool]] = {
            "postgres.backend_terminated": self._backend_terminated,
            "postgres.backend_killed": self._backend_killed,
            "postgres.immediate_stop": self._immediate_stop,
            "postgres.restart": self._postgres_restart,
            "postgres.commit_answer_lost": self._commit_answer_lost,
            "postgres.locked": self._postgres_locked,
            "postgres.read_only": self._postgres_read_only,
            "pooler.restart": self._pooler_restart,
            "rabbitmq.kill": self._rabbitmq_kill,
            "rabbitmq.restart": self._rabbitmq_restart,
            "rabbitmq.blocked": self._rabbitmq_blocked,
            "rabbitmq.unbound": self._rabbitmq_unbound,
            "rabbitmq.tapped": self._rabbitmq_tapped,
            "rabbitmq.swallowed": self._rabbitmq_swallowed,
            "line.cut": self._line_cut,
            "line.deaf": self._line_deaf,
            "line.slow": self._line_slow,
            "line.mid_frame": self._line_mid_frame,
        }

    # --- PostgreSQL ---

    def _backends(self) -> list[int]:
        """Those of the services that are doing something, or else any of theirs."""
        with self._system.database("postgres") as connection:
            rows = connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE starts_with(usename::text, 'local_')"
                " ORDER BY state = 'idle', random() LIMIT 4"
            ).fetchall()
        return [int(str(pid)) for (pid,) in rows]

    def _backend_terminated(self, chance: random.Random) -> bool:
        with self._system.postgres_lock:
            return wait_until(self._terminate_backends, READY_TIMEOUT_S)

    def _terminate_backends(self) -> bool:
        with suppress(psycopg.Error):
            pids = self._backends()
            with self._system.database("postgres") as connection:
                for pid in pids:
                    connection.execute("SELECT pg_terminate_backend(%s)", [pid])
            return bool(pids)
        return False

    def _backend_killed(self, chance: random.Random) -> bool:
        """kill -9 of one backend: PostgreSQL ends all others and recovers."""
        with self._system.postgres_lock:
            return wait_until(self._kill_backend, READY_TIMEOUT_S) and wait_until(self._answers, READY_TIMEOUT_S)

    def _kill_backend(self) -> bool:
        with suppress(psycopg.Error, ProcessLookupError):
            for pid in self._backends():
                os.kill(pid, signal.SIGKILL)
                return True
        return False

    def _answers(self) -> bool:
        with suppress(psycopg.Error), self._system.database("postgres") as connection:
            connection.execute("SELECT 1")
            return True
        return False

    def _immediate_stop(self, chance: random.Random) -> bool:
        """As if the machine had lost power: no checkpoint, no goodbye; then recovery."""
        with self._system.postgres_lock:
            if chance.random() < 0.5:
                self._system.postgres.kill()
            else:
                process = self._system.postgres.process
                if process is not None:
                    process.end(signal.SIGQUIT)
            self._system.pause(chance.uniform(0, 1.5))
            self._system.postgres.start()
            return True

    def _postgres_restart(self, chance: random.Random) -> bool:
        with self._system.postgres_lock:
            self._system.postgres.stop()
            self._system.pause(chance.uniform(0, 1.5))
            self._system.postgres.start()
            return True

    def _commit_answer_lost(self, chance: random.Random) -> bool:
        """The commit has happened, and who asked for it does not learn that: the connection is gone instead."""
        instance = chance.choice(self._system.of(chance.choice(["purchases", "relay", "consumer"])))
        proxy = self._system.proxies[f"{instance.name}>postgres"]
        # A sale's statement is a transaction by itself; the others end theirs by a COMMIT.
        request = b'"event_type":"PurchaseCreated"' if instance.service.kind == "purchases" else b"COMMIT"
        ready_and_idle = b"Z\x00\x00\x00\x05I"
        with instance.lock:
            hit = proxy.lose_answer(request, ready_and_idle, ANSWER_TIMEOUT_S)
            proxy.heal()
            return hit

    def _postgres_locked(self, chance: random.Random) -> bool:
        """Somebody's ALTER TABLE takes its time: nobody else can even read that table."""
        kind, table = chance.choice(LOCKED)
        database = chance.choice(self._system.databases(kind))
        with self._system.postgres_lock, self._system.database(database) as connection, connection.transaction():
            connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_S}s'")
            connection.execute("LOCK TABLE " + table + " IN ACCESS EXCLUSIVE MODE")
            self._system.pause(chance.uniform(0.5, 8))
        return True

    def _postgres_read_only(self, chance: random.Random) -> bool:
        """As a standby that is not promoted yet, or an operator in need: everything can be read, nothing written."""
        with self._system.postgres_lock:
            try:
                self._configure("ALTER SYSTEM SET default_transaction_read_only = on")
                self._system.pause(chance.uniform(0.5, 4))
            finally:
                self._configure("ALTER SYSTEM RESET default_transaction_read_only")
            return True

    def _pooler_restart(self, chance: random.Random) -> bool:
        """All connections through it end at once; for a while there are none."""
        assert self._system.pooler is not None
        with self._system.postgres_lock:
            self._system.pooler.kill()
            try:
                self._system.pause(chance.choice([0, 0.5, 4]) * chance.uniform(0.5, 1))
            finally:
                self._system.pooler.start()
            return True

    def _configure(self, statement: LiteralString) -> None:
        with self._system.database("postgres") as connection:
            connection.execute(statement)
            connection.execute("SELECT pg_reload_conf()")

    # --- RabbitMQ ---

    def _rabbitmq_kill(self, chance: random.Random) -> bool:
        with self._system.rabbitmq_lock:
            self._system.rabbitmq.kill()
            self._system.pause(chance.uniform(0, 2))
            self._system.rabbitmq.start()
            self._system.pause(2)
            return True

    def _rabbitmq_restart(self, chance: random.Random) -> bool:
        with self._system.rabbitmq_lock:
            self._system.rabbitmq.stop()
            self._system.pause(chance.uniform(0, 2))
            self._system.rabbitmq.start()
            self._system.pause(2)
            return True

    def _rabbitmq_blocked(self, chance: random.Random) -> bool:
        """Its memory alarm: it takes no more from publishers, and says so."""
        with self._system.rabbitmq_lock:
            try:
                self._system.rabbitmq.ctl("set_vm_memory_high_watermark", "absolute", "1024")
                self._system.pause(chance.uniform(1, 6))
            finally:
                self._system.rabbitmq.ctl("set_vm_memory_high_watermark", "absolute", "2GiB")
            return True

    def _rabbitmq_unbound(self, chance: random.Random) -> bool:
        """The binding is lost, again and again: no queue takes the events, though RabbitMQ acknowledges each."""
        with self._system.rabbitmq_lock, self._system.channel() as channel:
            self._unbind(channel, chance)
        return True

    def _rabbitmq_tapped(self, chance: random.Random) -> bool:
        """The same, while somebody else's queue takes everything: to RabbitMQ each event is routed."""
        with self._system.rabbitmq_lock, self._system.channel() as channel:
            channel.queue_declare(TAP, auto_delete=True)
            channel.queue_bind(TAP, EXCHANGE, "#")
            try:
                self._unbind(channel, chance)
            finally:
                channel.queue_delete(TAP)
        return True

    def _unbind(self, channel: BlockingChannel, chance: random.Random) -> None:
        until = time.monotonic() + chance.uniform(0.5, 4)
        while time.monotonic() < until:
            channel.queue_unbind(QUEUE, EXCHANGE, QUEUE)
            self._system.pause(chance.uniform(0, 0.1))
        channel.queue_bind(QUEUE, EXCHANGE, QUEUE)

    def _rabbitmq_swallowed(self, chance: random.Random) -> bool:
        """What relays send gets lost on its way, and so do the broker's answers; then the connections break."""
        lines = [line for line in self._system.proxies_to("rabbitmq") if line.name.startswith("relay")]
        for line in lines:
            line.deafen()
        self._system.pause(chance.choice([0.1, 0.5, 2, 5]) * chance.uniform(0.8, 1))
        for line in lines:
            line.cut()
            line.heal()
        return True

    # --- lines ---

    def _proxy(self, chance: random.Random) -> Proxy:
        """Any line, each end as often as the others."""
        return chance.choice(
            self._system.proxies_to(chance.choice(["postgres", "rabbitmq", "purchases", "analytics", "relay"]))
        )

    def _line_cut(self, chance: random.Random) -> bool:
        proxy = self._proxy(chance)
        for _ in range(chance.randint(1, 4)):
            proxy.cut()
            self._system.pause(chance.uniform(0.05, 0.8))
        return True

    def _line_deaf(self, chance: random.Random) -> bool:
        """Nothing passes; then it does, late, or the connection breaks."""
        proxy = self._proxy(chance)
        proxy.deafen()
        self._system.pause(chance.choice([0.3, 1, 0.5 * self._long_s, self._long_s]) * chance.uniform(0.8, 1))
        if chance.random() < 0.5:
            proxy.cut()
        proxy.heal()
        return True

    def _line_slow(self, chance: random.Random) -> bool:
        proxy = self._proxy(chance)
        proxy.delay(chance.uniform(0.02, 0.4))
        self._system.pause(chance.uniform(1, 6))
        proxy.heal()
        return True

    def _line_mid_frame(self, chance: random.Random) -> bool:
        before = {name: proxy.passed for name, proxy in self._system.proxies.items()}

        def busy() -> list[Proxy]:
            return [proxy for name, proxy in self._system.proxies.items() if proxy.passed > before[name]]

        self._system.pause(1)
        if not wait_until(lambda: bool(busy()), READY_TIMEOUT_S):
            return False
        proxy = chance.choice(busy())
        after = [chance.choice([1, 3, 7, 20, 100, 1000]) for _ in range(chance.randint(1, 3))]
        hits = [proxy.break_frame(count, FRAME_TIMEOUT_S) for count in after]
        proxy.heal()
        return any(hits)
