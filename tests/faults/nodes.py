"""Faults of a broker of three nodes: one of them is lost, and everything goes on without it."""

import random
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress

import psycopg

from deploy.local.machine import wait_until
from tests import broker_cluster
from tests.faults.ledger import Ledger
from tests.faults.system import System

READY_TIMEOUT_S = 60.0
GO_ON_TIMEOUT_S = 120.0


class NodeFaults:
    """Of a system whose broker is no cluster, there are none."""

    def __init__(self, system: System, ledger: Ledger) -> None:
        self._system, self._ledger = system, ledger
        self.kinds: Mapping[str, Callable[[random.Random], bool]] = (
            {"rabbitmq.leader_lost": self._leader_lost, "rabbitmq.node_lost": self._node_lost} if system.nodes else {}
        )

    def _leader_lost(self, chance: random.Random) -> bool:
        """The node that leads the queue."""
        return self._lose(lambda: broker_cluster.leader(self._system.nodes), chance)

    def _node_lost(self, chance: random.Random) -> bool:
        """Any node."""
        return self._lose(lambda: chance.choice(self._system.nodes), chance)

    def _lose(self, choose: Callable[[], broker_cluster.Node | None], chance: random.Random) -> bool:
        """What is sold without it gets counted without it, or that is a finding."""
        with ExitStack() as stack:
            for instance in (*self._system.of("relay"), *self._system.of("consumer")):
                stack.enter_context(instance.lock)
            stack.enter_context(self._system.rabbitmq_lock)
            if (node := choose()) is None:
                return False
            node.kill() if chance.random() < 0.5 else node.stop()
            try:
                self._await_counted(node)
                self._system.pause(chance.uniform(0, 5))
            finally:
                self._system.start_broker()
            self._system.pause(2)
            return True

    def _await_counted(self, lost: broker_cluster.Node) -> None:
        begin = time.time()
        if wait_until(lambda: is_counted(self._system, begin), GO_ON_TIMEOUT_S):
            self._ledger.write("went_on", without=lost.name, seconds=round(time.time() - begin, 1))
        else:
            why = f"without {lost.name}, nothing that was sold is counted after {GO_ON_TIMEOUT_S:.0f} s"
            self._ledger.write("stopped", why=why)


def is_counted(system: System, since: float) -> bool:
    """Whether any sale that was recorded since then is: its event's id tells when that was."""
    with suppress(psycopg.Error), system.database("analytics") as connection:
        lowest = uuid.UUID(int=int(since * 1000) << 80)
        counted = "SELECT FROM analytics_event_log WHERE event_id > %s LIMIT 1"
        return bool(connection.execute(counted, [lowest]).rowcount)
    return False
