"""The kinds of faults. Each breaks something, waits, and mends it; True when it happened as it was meant.

A fault has random numbers of its own, made of the run's seed. Faults overlap; two that need the same thing take turns.
"""

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress

import psycopg

from deploy.local.machine import StackError, wait_until
from tests.faults.crashing import STEPS
from tests.faults.ledger import Ledger
from tests.faults.messages import Messages
from tests.faults.proxy import Proxy
from tests.faults.repairs import Repairs
from tests.faults.syscalls import kill_at_syscall
from tests.faults.system import ROOT, Instance, System
from tests.faults.tills import DAY_US, HOUR_US, Tills

EXCHANGE, QUEUE = "purchases", "purchases.created"
STEP_TIMEOUT_S = 12.0  # for an armed step to be reached
RARE = {"in_partition", "after_partition", "rebuild_count", "rebuild_write", "rebuild_written"}  # once at best
SYSCALLS_MAX = 60  # one full sale makes fewer of them in any process
READY_TIMEOUT_S = 60.0


class Faults:
    """All kinds, by name.

    `long_s` is how long a process is stopped, or a line deaf: longer than every timeout. `months` is how far back sales
    go: retention comes from that end, the need for new partitions from this one.
    """

    def __init__(
        self, system: System, tills: Callable[[], Tills], ledger: Ledger, messages: Messages, long_s: float, months: int
    ):
        self._system, self._tills, self._ledger, self._messages = system, tills, ledger, messages
        self._long_s = long_s
        self._keep_months = months  # retention goes forward: each time it closes one month more
        self._new_month = 2  # months ago: there is no partition before it
        self._months_lock = threading.Lock()
        self._repairs = Repairs(system, ledger)
        self.kinds: Mapping[str, Callable[[random.Random], bool]] = {
            "kill": self._kill,
            "drain.kill": self._drain,
            "stop": self._stop,
            **{
                f"{service}.{step}": self._at_step(service, step)
                for service in ("purchases", "relay", "consumer")
                for step in STEPS[service]
            },
            **{f"rebuild.{step}": self._rebuild_dies(step) for step in STEPS["rebuild"]},
            "rebuild.everything": self._rebuild,
            "rebuild.day": self._rebuild_day,
            **{f"syscall.{service}": self._at_syscall(service) for service in ("purchases", "relay", "consumer")},
            "postgres.backend_terminated": self._backend_terminated,
            "postgres.backend_killed": self._backend_killed,
            "postgres.immediate_stop": self._immediate_stop,
            "postgres.restart": self._postgres_restart,
            "postgres.commit_answer_lost": self._commit_answer_lost,
            "rabbitmq.kill": self._rabbitmq_kill,
            "rabbitmq.restart": self._rabbitmq_restart,
            "rabbitmq.blocked": self._rabbitmq_blocked,
            "rabbitmq.unbound": self._rabbitmq_unbound,
            "rabbitmq.swallowed": self._rabbitmq_swallowed,
            "line.cut": self._line_cut,
            "line.deaf": self._line_deaf,
            "line.slow": self._line_slow,
            "line.mid_frame": self._line_mid_frame,
            "till.clock": self._till_clock,
            "retention": self._retention,
            "message.bad": self._message_bad,
            "message.again": self._message_again,
        }

    # --- processes ---

    def _instance(self, chance: random.Random, *services: str) -> Instance:
        return chance.choice([instance for name in services for instance in self._system.of(name)])

    def _any_instance(self, chance: random.Random) -> Instance:
        """Each service as often as the others, however many copies it has."""
        return self._instance(chance, chance.choice(["purchases", "relay", "consumer", "analytics"]))

    def _kill(self, chance: random.Random) -> bool:
        """kill -9, at any moment."""
        instance = self._any_instance(chance)
        with instance.lock:
            instance.kill(chance.uniform(0, 2))
            return self._back(instance)

    def _drain(self, chance: random.Random) -> bool:
        """SIGTERM, and kill -9 while it finishes what is in flight."""
        instance = self._any_instance(chance)
        with instance.lock:
            instance.send(signal.SIGTERM)
            self._system.pause(chance.uniform(0, 0.2))
            instance.kill(chance.uniform(0, 1))
            return self._back(instance)

    def _stop(self, chance: random.Random) -> bool:
        """SIGSTOP for longer than any timeout: it wakes up in a world that has given it up, and goes on."""
        instance = self._any_instance(chance)
        with instance.lock:
            instance.send(signal.SIGSTOP)
            self._system.pause(self._long_s * chance.uniform(0.2, 1))
            instance.send(signal.SIGCONT)
            return self._back(instance)

    def _at_step(self, service: str, step: str) -> Callable[[random.Random], bool]:
        def fault(chance: random.Random) -> bool:
            """kill -9 when the step is reached for the n-th time; where one copy may idle, in whichever comes first."""
            instances = self._system.of(service)
            if step in ("again", "alone"):
                return self._die_again(instances, alone=step == "alone")
            if service == "purchases" or step == "after_decode" or step.startswith("rebuild"):
                instances = [chance.choice(instances)]
            return self._die(instances, service, step, chance)

        return fault

    def _die(self, instances: list[Instance], service: str, step: str, chance: random.Random) -> bool:
        """One of the processes dies when it comes to the step."""
        with ExitStack() as locks:
            for instance in instances:
                locks.enter_context(instance.lock)
            if not wait_until(lambda: all(instance.ready for instance in instances), READY_TIMEOUT_S):
                return False
            count = 1 if step in RARE else chance.choice([1, 1, 2, 3, 5, 8])
            for instance in instances:
                self._arm(instance, f"{service}.{step}:{count}")
            if step.endswith("_partition"):
                self._sell_in_a_new_month()
            if step.startswith("rebuild"):
                self._repairs.begin_day(instances[0], chance)
            hit = self._disarmed(instances, any)
            return all(self._back(instance) for instance in instances) and hit

    def _die_again(self, consumers: list[Instance], *, alone: bool) -> bool:
        """The same messages see a consumer die that counts them, another that tries them again, and one that tries one
        of them alone. All that is none of their fault, and must not count as such."""
        first, second = consumers
        with first.lock, second.lock:
            if not wait_until(lambda: first.ready and second.ready, READY_TIMEOUT_S):
                return False
            self._arm(second, "consumer.again:1")
            self._arm(first, "consumer.after_apply:1")
            hit = self._disarmed(consumers, all)
            if hit and alone:
                for consumer in consumers:
                    self._arm(consumer, "consumer.alone:1")
                hit = self._disarmed(consumers, any)
            return self._back(first) and self._back(second) and hit

    def _disarmed(self, instances: list[Instance], enough: Callable[[list[bool]], bool]) -> bool:
        """Whether any, or all, of the armed processes died in time; no more will."""
        hit = wait_until(lambda: enough([not instance.arming.exists() for instance in instances]), STEP_TIMEOUT_S)
        for instance in instances:
            instance.arming.unlink(missing_ok=True)
        return hit

    def _sell_in_a_new_month(self) -> None:
        """Some tills' clocks have gone back to a month that nobody has sold anything in."""
        with self._months_lock:
            self._new_month += 1
            self._tills().ages_us.append(self._new_month * 31 * DAY_US)

    @staticmethod
    def _arm(instance: Instance, text: str) -> None:
        fresh = instance.arming.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(instance.arming)

    def _at_syscall(self, service: str) -> Callable[[random.Random], bool]:
        def fault(chance: random.Random) -> bool:
            """kill -9 at the n-th time that some thread sends or writes anything."""
            instance = self._instance(chance, service)
            with instance.lock:
                if not self._back(instance) or instance.process is None:
                    return False
                return kill_at_syscall(instance, chance.randint(1, SYSCALLS_MAX), STEP_TIMEOUT_S) and self._back(
                    instance
                )

        return fault

    def _back(self, instance: Instance) -> bool:
        return wait_until(lambda: instance.alive, READY_TIMEOUT_S)

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
        with self._system.postgres_lock, suppress(psycopg.Error):
            pids = self._backends()
            with self._system.database("postgres") as connection:
                for pid in pids:
                    connection.execute("SELECT pg_terminate_backend(%s)", [pid])
            return bool(pids)
        return False

    def _backend_killed(self, chance: random.Random) -> bool:
        """kill -9 of one backend: PostgreSQL ends all others and recovers."""
        with self._system.postgres_lock, suppress(psycopg.Error):
            pids = self._backends()
            if pids:
                os.kill(pids[0], signal.SIGKILL)
                self._postgres_back()
            return bool(pids)
        return False

    def _postgres_back(self) -> None:
        def answers() -> bool:
            try:
                with self._system.database("postgres") as connection:
                    connection.execute("SELECT 1")
            except psycopg.Error:
                return False
            return True

        wait_until(answers, READY_TIMEOUT_S)

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
        instance = self._instance(chance, chance.choice(["purchases", "relay", "consumer"]))
        proxy = self._system.proxies[f"{instance.name}>postgres"]
        # A sale's statement is a transaction by itself; the others end theirs by a COMMIT.
        request = b'"event_type":"PurchaseCreated"' if instance.service.name == "purchases" else b"COMMIT"
        ready_and_idle = b"Z\x00\x00\x00\x05I"
        with instance.lock:
            hit = proxy.lose_answer(request, ready_and_idle, STEP_TIMEOUT_S)
            proxy.heal()
            return hit

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
        """The binding is gone: no queue takes the events, though RabbitMQ still acknowledges each."""
        with self._system.rabbitmq_lock:
            with self._system.channel() as channel:
                channel.queue_unbind(QUEUE, EXCHANGE, QUEUE)
            self._system.pause(chance.uniform(0.5, 4))
            with self._system.channel() as channel:
                channel.queue_bind(QUEUE, EXCHANGE, QUEUE)
            return True

    def _rabbitmq_swallowed(self, chance: random.Random) -> bool:
        """What relays send gets lost on its way, and so do the broker's answers; then the connections break."""
        lines = [self._system.proxies[f"{relay.name}>rabbitmq"] for relay in self._system.of("relay")]
        for line in lines:
            line.deafen()
        self._system.pause(chance.choice([0.1, 0.5, 2, 5]) * chance.uniform(0.8, 1))
        for line in lines:
            line.cut()
            line.heal()
        return True

    def _message_bad(self, chance: random.Random) -> bool:
        with self._system.rabbitmq_lock:
            return self._messages.publish_bad(chance)

    def _message_again(self, chance: random.Random) -> bool:
        with self._system.rabbitmq_lock:
            return self._messages.publish_again(chance)

    # --- repairs ---

    def _rebuild_day(self, chance: random.Random) -> bool:
        """A day is rebuilt while sales of it come in: nothing was wrong with it, so nothing may be repaired."""
        return self._repairs.day(self._instance(chance, "consumer"), chance)

    def _rebuild(self, chance: random.Random) -> bool:
        """Everything is rebuilt while sales come in: no row was wrong."""
        return self._repairs.everything(self._instance(chance, "consumer")) == 0

    def _rebuild_dies(self, step: str) -> Callable[[random.Random], bool]:
        def fault(chance: random.Random) -> bool:
            """A rebuild of everything dies by kill -9 at the step: nothing has changed, nobody is in the way."""
            count = chance.choice([1, 2, 5]) if step == "after_count" else 1
            died = self._repairs.everything(self._instance(chance, "consumer"), f"rebuild.{step}:{count}")
            return died == -signal.SIGKILL

        return fault

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
        self._system.pause(1)
        busy = [proxy for name, proxy in self._system.proxies.items() if proxy.passed > before[name]]
        proxy = chance.choice(busy)
        hits = [proxy.break_frame(chance.choice([1, 3, 7, 20, 100, 1000]), 4.0) for _ in range(chance.randint(1, 3))]
        proxy.heal()
        return any(hits)

    # --- tills, operators, strangers ---

    def _till_clock(self, chance: random.Random) -> bool:
        """A till's clock jumps; sales dated more than five minutes ahead are refused until somebody sets it right."""
        clock = chance.choice(self._tills().clocks)
        jumps = [HOUR_US, 4 * HOUR_US // 60, -HOUR_US, -200 * DAY_US, 2 * DAY_US, 20 * 365 * DAY_US]
        clock.offset_us = chance.choice(jumps)
        self._system.pause(chance.uniform(1, 4))
        clock.offset_us = 0
        return True

    def _retention(self, chance: random.Random) -> bool:
        """An operator drops the oldest month, while tills still send sales of it."""
        service, ages_us = self._instance(chance, "purchases"), self._tills().ages_us
        with self._months_lock:
            self._keep_months -= 1
            keep_months = self._keep_months
        age_us = (keep_months + 1) * 2629746 * 1_000_000 + 15 * DAY_US  # the mean month has that many seconds
        ages_us.append(age_us)
        self._system.pause(chance.uniform(1, 3))
        done = subprocess.run(
            [sys.executable, "-m", "purchases_svc", "partitions", "--drop"],
            env={**service.environ, "PURCHASES_RETENTION_MONTHS": str(keep_months)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        self._system.pause(chance.uniform(0, 1))
        ages_us.remove(age_us)
        if done.returncode:
            raise StackError(done.stdout + done.stderr)
        with self._system.database("purchases") as connection:
            row = connection.execute("SELECT extract(epoch FROM dropped_before)::bigint FROM chain_settings").fetchone()
        assert row is not None
        self._ledger.write("dropped", before_us=int(str(row[0])) * 1_000_000)
        return True
