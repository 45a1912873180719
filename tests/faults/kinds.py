"""The kinds of faults. Each breaks something, waits, and mends it; True when it happened as it was meant.

A fault has random numbers of its own, made of the run's seed. Faults overlap; two that need the same thing take turns.
"""

import random
from collections.abc import Callable, Mapping

from tests.faults.crashing import STEPS
from tests.faults.ledger import Ledger
from tests.faults.messages import Messages
from tests.faults.months import Months
from tests.faults.neighbours import NeighbourFaults
from tests.faults.nodes import NodeFaults
from tests.faults.processes import ProcessFaults
from tests.faults.repairs import Repairs
from tests.faults.servers import ServerFaults
from tests.faults.standby import StandbyFaults
from tests.faults.system import System
from tests.faults.tills import DAY_US, HOUR_US, Tills


class Faults:
    """All kinds, by name.

    `long_s` is how long a process is stopped, or a line deaf: longer than every timeout. `months` is how far back sales
    go: retention comes from that end, the need for new partitions from this one.
    """

    def __init__(
        self, system: System, tills: Callable[[], Tills], ledger: Ledger, messages: Messages, long_s: float, months: int
    ):
        self._system, self._tills, self._messages = system, tills, messages
        self._months = Months(system, tills, ledger, months)
        self.kinds: Mapping[str, Callable[[random.Random], bool]] = {
            **ProcessFaults(system, self._months, Repairs(system, ledger), long_s).kinds,
            **ServerFaults(system, long_s).kinds,
            **StandbyFaults(system).kinds,
            **NeighbourFaults(system, tills, ledger, self._months, long_s).kinds,
            **NodeFaults(system, ledger).kinds,
            "till.clock": self._till_clock,
            "retention": self._retention(),
            **{f"retention.{step}": self._retention(f"retention.{step}") for step in STEPS["retention"]},
            "message.bad": self._message_bad,
            "message.again": self._message_again,
            "message.redriven": self._message_redriven,
        }

    def _till_clock(self, chance: random.Random) -> bool:
        """A till's clock jumps; sales dated more than five minutes ahead are refused until somebody sets it right."""
        clock = chance.choice(self._tills().clocks)
        jumps = [HOUR_US, 4 * HOUR_US // 60, -HOUR_US, -200 * DAY_US, 2 * DAY_US, 20 * 365 * DAY_US]
        clock.offset_us = chance.choice(jumps)
        self._system.pause(chance.uniform(1, 4))
        clock.offset_us = 0
        return True

    def _retention(self, step: str = "") -> Callable[[random.Random], bool]:
        def fault(chance: random.Random) -> bool:
            """An operator drops the oldest month, while tills still send sales of it; and again, if that was killed."""
            return self._months.drop_oldest(chance.choice(self._system.of("purchases")), step)

        return fault

    def _message_bad(self, chance: random.Random) -> bool:
        with self._system.rabbitmq_lock:
            return self._messages.publish_bad(chance)

    def _message_again(self, chance: random.Random) -> bool:
        with self._system.rabbitmq_lock:
            return self._messages.publish_again(chance)

    def _message_redriven(self, chance: random.Random) -> bool:
        """Somebody hopes that bad messages have become good."""
        return self._messages.redrive(chance.choice(self._system.of("consumer")))
