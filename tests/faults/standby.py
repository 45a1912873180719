"""Faults of the synchronous standby, and of those who wait for it: cut off, given up, cancelled, promoted.

Every method breaks something, waits, and mends it; True when it happened as it was meant.
"""

import random
from collections.abc import Callable, Mapping
from contextlib import suppress

import psycopg

from deploy.local.machine import wait_until
from tests.faults.system import System
from tests.replication import Replicated

WAITING_TIMEOUT_S = 20.0  # for a commit to wait for the standby


class StandbyFaults:
    def __init__(self, system: System) -> None:
        self._system = system
        self.kinds: Mapping[str, Callable[[random.Random], bool]] = {
            "standby.cut": self._cut,
            "standby.restart_in_wait": self._restart_in_wait,
            "standby.wait_cancelled": self._wait_cancelled,
            "standby.promoted": self._promoted,
            "standby.promoted_in_wait": self._promoted_in_wait,
        }

    @property
    def _pair(self) -> Replicated:
        assert self._system.pair is not None
        return self._system.pair

    def _cut(self, chance: random.Random) -> bool:
        """The standby is out of reach for a while: every commit waits."""
        with self._system.postgres_lock:
            self._pair.cut()
            try:
                hit = self._somebody_waits()
                self._system.pause(chance.uniform(0, 8))
            finally:
                self._pair.mend()
            return hit

    def _restart_in_wait(self, chance: random.Random) -> bool:
        """The primary is restarted meanwhile: what waited is there for all to see, and on no standby."""
        with self._system.postgres_lock:
            self._pair.cut()
            try:
                hit = self._somebody_waits()
                self._pair.restart()
                self._system.pause(chance.uniform(0, 5))
            finally:
                self._system.postgres.start()
                self._pair.mend()
            return hit

    def _wait_cancelled(self, chance: random.Random) -> bool:
        """An operator cancels whatever waits, again and again."""
        with self._system.postgres_lock:
            self._pair.cut()
            try:
                cancelled = self._cancel_waits(chance)
            finally:
                self._pair.mend()
            return cancelled > 0

    def _promoted(self, chance: random.Random) -> bool:
        """The primary dies; its standby takes over."""
        with self._system.postgres_lock:
            self._system.fail_over()
            return True

    def _promoted_in_wait(self, chance: random.Random) -> bool:
        """The primary has commits that the standby lacks, some of which can be seen, and then it dies."""
        with self._system.postgres_lock:
            self._pair.cut()
            try:
                hit = self._somebody_waits()
                if chance.random() < 0.5:
                    hit = self._cancel_waits(chance) > 0 and hit
                else:
                    self._pair.restart()
                    self._system.pause(chance.uniform(0, 3))
            finally:
                self._system.fail_over(lacking=True)
            return hit

    def _somebody_waits(self) -> bool:
        return wait_until(lambda: self._waiting() > 0, WAITING_TIMEOUT_S)

    def _waiting(self) -> int:
        with suppress(psycopg.OperationalError):
            return self._pair.waiting()
        return 0

    def _cancel_waits(self, chance: random.Random) -> int:
        cancelled = 0
        for _ in range(chance.randint(1, 8)):
            self._somebody_waits()
            cancelled += self._pair.cancel_waits()
            self._system.pause(chance.uniform(0, 0.5))
        return cancelled
