"""`python -m tests.faults.one_sale`: every process dies at every send and write of one full sale.

One copy of each service. For each of them: count the system calls between a till's call and the moment the sale is in
the read models; then sell once more for each of them, with the process dying there. In the end everything is counted.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable

from rich.table import Column, Table

from deploy.local.machine import StackError, wait_until
from tests.faults import show
from tests.faults.checker import Findings
from tests.faults.ledger import Ledger
from tests.faults.run import check
from tests.faults.syscalls import count_syscalls, kill_at_syscall
from tests.faults.system import Instance, System, running
from tests.faults.tills import Numbers, Till, Tills

PROCESSES = ("purchases", "relay", "consumer")
WARM_UP = 5
PATIENCE_S = 60.0
COPIES = {"purchases": 1, "relay": 1, "consumer": 1, "analytics": 1}


def main() -> int:
    begin = time.monotonic()
    with running(show.say, copies=COPIES) as system:
        ledger = Ledger(system.directory / "ledger.jsonl")
        target, analytics = (system.target(system.of(name)[0]) for name in ("purchases", "analytics"))
        tills = Tills([target], analytics, ledger, Numbers(), seed="one sale", count=1, rate=1)
        with Till(tills, 0, [target], ledger, Numbers(), "one sale") as till:
            table = Table("process", *(Column(name, justify="right") for name in ("calls", "deaths", "sales")))
            for name in PROCESSES:
                (instance,) = system.of(name)
                calls, deaths = _enumerate(system, ledger, instance, till.sell)
                table.add_row(name, str(calls), str(deaths), str(ledger.acknowledged))
        tills.close()
        findings = Findings()
        check(system, ledger, findings)
        ledger.close()
    show.console.print(table)
    show.say(f"{ledger.acknowledged} sales in {time.monotonic() - begin:.0f} s")
    for line in findings.lines():
        show.fail(line)
    return 1 if findings else 0


def _enumerate(system: System, ledger: Ledger, instance: Instance, sell: Callable[[], object]) -> tuple[int, int]:
    """How many calls one sale takes in the process, and how often it died at one of them."""

    def sold() -> None:
        sell()
        if not wait_until(lambda: _counted(system) >= ledger.acknowledged, PATIENCE_S):
            raise StackError(f"{instance.name}: {ledger.acknowledged - _counted(system)} sales are not counted")

    for _ in range(WARM_UP):
        sold()
    calls = max(count_syscalls(instance, sold) for _ in range(3))
    deaths: Counter[bool] = Counter()
    for n in range(1, calls + 1):
        if not wait_until(lambda: instance.ready, PATIENCE_S):
            raise StackError(f"{instance.name} does not come back")
        died = kill_at_syscall(instance, n, 0.0, sold)
        deaths[died] += 1
        show.say(f"{'✓' if died else '·'} {instance.name} at call {n} of {calls}")
    return calls, deaths[True]


def _counted(system: System) -> int:
    with system.database("analytics") as connection:
        row = connection.execute("SELECT count(*) FROM analytics_event_log").fetchone()
    assert row is not None
    return int(str(row[0]))


if __name__ == "__main__":
    sys.exit(main())
