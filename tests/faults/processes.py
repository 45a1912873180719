"""Faults of our processes: killed at any moment, at a named step or at a system call; drained; standing still.

Every method breaks something, waits, and mends it; True when it happened as it was meant.
"""

import random
import signal
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress

import psycopg

from deploy.local.machine import wait_until
from tests.faults.crashing import STEPS
from tests.faults.months import Months
from tests.faults.repairs import Repairs
from tests.faults.syscalls import kill_at_syscall
from tests.faults.system import Instance, System

STEP_TIMEOUT_S = 20.0  # for an armed step to be reached
AUDIT_TIMEOUT_S = 90.0  # the audit takes its time: the more, the longer the history is
RARE = {  # reached about once a second at best, or once at all: at the first time, then
    "before_upload",
    "after_upload",
    "in_partition",
    "after_partition",
    "rebuild_proof",
    "rebuild_store",
    "rebuild_stored",
}
SYSCALLS_MAX = 60  # one full sale makes fewer of them in any process
READY_TIMEOUT_S = 60.0
TRIALS_TIMEOUT_S = 15.0  # a note may also be left over, of a message that is settled long ago


class ProcessFaults:
    """`long_s` is how long a process stands still at most: longer than every timeout."""

    def __init__(self, system: System, months: Months, repairs: Repairs, long_s: float) -> None:
        self._system, self._months, self._repairs, self._long_s = system, months, repairs, long_s
        services = "purchases", "relay", "consumer"
        self.kinds: Mapping[str, Callable[[random.Random], bool]] = {
            "kill": self._kill,
            "drain.kill": self._drain,
            "stop": self._stop,
            **{f"{service}.{step}": self._at_step(service, step) for service in services for step in STEPS[service]},
            **{f"audit.{step}": self._audit_dies(step) for step in STEPS["audit"]},
            **{f"syscall.{service}": self._at_syscall(service) for service in services},
            "rebuild.day": self._rebuild_day,
            "rebuild.everything": self._rebuild,
            **{f"rebuild.{step}": self._rebuild_dies(step) for step in STEPS["rebuild"]},
        }

    def _any_instance(self, chance: random.Random) -> Instance:
        """Each service as often as the others, however many copies it has."""
        return chance.choice(self._system.of(chance.choice(["purchases", "relay", "consumer", "analytics"])))

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

    # --- at a step, at a system call ---

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
        with ExitStack() as stack:
            for instance in instances:
                stack.enter_context(instance.lock)
            if not self._ready(instances):
                return False
            count = 1 if step in RARE else chance.choice([1, 1, 2, 3, 5, 8])
            for instance in instances:
                self._arm(instance, f"{service}.{step}:{count}")
            if step.endswith("_partition"):
                self._months.sell_in_a_new_one()
            if step.startswith("rebuild"):
                # What died half way is done again, and must find that nothing is wrong.
                stack.enter_context(self._repairs.day_meanwhile(instances[0], chance))
            hit = self._disarmed(instances, any, STEP_TIMEOUT_S)
            return all(self._back(instance) for instance in instances) and hit

    def _audit_dies(self, step: str) -> Callable[[random.Random], bool]:
        def fault(_: random.Random) -> bool:
            """The process of the audit dies by kill -9; its consumer goes on and starts another one."""
            instances = self._system.of("consumer")
            with ExitStack() as stack:
                for instance in instances:
                    stack.enter_context(instance.lock)
                if not self._ready(instances):
                    return False
                for instance in instances:
                    self._arm(instance, f"audit.{step}:1")
                return self._disarmed(instances, any, AUDIT_TIMEOUT_S)

        return fault

    def _die_again(self, consumers: list[Instance], *, alone: bool) -> bool:
        """The same messages see a consumer die that counts them, another that tries them again, and one that tries one
        of them alone. All that is none of their fault, and must not count as such."""
        first, second = consumers
        with first.lock, second.lock:
            if not self._ready(consumers):
                return False
            try:
                self._arm(second, "consumer.again:1")
                self._arm(first, "consumer.after_apply:1")
                first.wanted = second.wanted = not alone  # the next ones start when they are armed, too
                hit = self._disarmed(consumers, all)
                if hit and alone:
                    self._arm(first, "consumer.alone:1")  # not both: two deaths, and a message is taken for the cause
                    first.wanted = True
                    hit = self._disarmed([first], any)
            finally:
                first.wanted = second.wanted = True
            return self._back(first) and self._back(second) and hit

    def _disarmed(
        self, instances: list[Instance], enough: Callable[[list[bool]], bool], within_s: float = STEP_TIMEOUT_S
    ) -> bool:
        """Whether any, or all, of the armed processes died in time; no more will."""
        hit = wait_until(lambda: enough([not instance.arming.exists() for instance in instances]), within_s)
        for instance in instances:
            instance.arming.unlink(missing_ok=True)
        return hit

    @staticmethod
    def _arm(instance: Instance, text: str) -> None:
        fresh = instance.arming.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(instance.arming)

    def _at_syscall(self, service: str) -> Callable[[random.Random], bool]:
        def fault(chance: random.Random) -> bool:
            """kill -9 at the n-th time that some thread sends or writes anything."""
            instance = chance.choice(self._system.of(service))
            with instance.lock:
                if not self._ready([instance]):
                    return False
                died = kill_at_syscall(instance, chance.randint(1, SYSCALLS_MAX), STEP_TIMEOUT_S)
                return self._back(instance) and died

        return fault

    def _ready(self, instances: list[Instance]) -> bool:
        """Wait for them, and for consumers until no message is suspected of the deaths before.

        One that two consumers die of, one after the other while it is tried alone, is rightly quarantined.
        """
        ready = wait_until(lambda: all(instance.ready for instance in instances), READY_TIMEOUT_S)
        if any(instance.service.kind == "consumer" for instance in instances):
            wait_until(self._none_suspected, TRIALS_TIMEOUT_S)
        return ready

    def _none_suspected(self) -> bool:
        with suppress(psycopg.Error), self._system.database("analytics") as connection:
            return connection.execute("SELECT FROM message_trials LIMIT 1").fetchone() is None
        return False

    def _back(self, instance: Instance) -> bool:
        return wait_until(lambda: instance.alive, READY_TIMEOUT_S)

    # --- repairs ---

    def _rebuild_day(self, chance: random.Random) -> bool:
        """A day is rebuilt while sales of it come in: nothing was wrong with it, so nothing may be repaired."""
        return self._repairs.day(chance.choice(self._system.of("consumer")), chance)

    def _rebuild(self, chance: random.Random) -> bool:
        """Everything is rebuilt while sales come in: no row was wrong."""
        return self._repairs.everything(chance.choice(self._system.of("consumer")))

    def _rebuild_dies(self, step: str) -> Callable[[random.Random], bool]:
        def fault(chance: random.Random) -> bool:
            """A rebuild of everything dies by kill -9 at the step: nothing has changed, nobody is in the way."""
            count = chance.choice([1, 2, 5]) if step == "after_count" else 1
            return self._repairs.everything(chance.choice(self._system.of("consumer")), f"rebuild.{step}:{count}")

        return fault
