"""`python -m tests.faults.one_sale [PROCESS…]`: a process dies at every send and write of one full sale.

One copy of each service. For each of them: count the system calls between a till's call and the moment its sale is in
the read models, by kind of call; then sell once more for each of them, with the process dying there. In the end
everything is counted. strace counts by thread: of two threads that make the same kind of call, the first one dies.
"""

import sys
import time
from collections.abc import Callable

from rich.table import Column, Table

from deploy.local.machine import StackError, wait_until
from tests.faults import show
from tests.faults.findings import Findings
from tests.faults.ledger import Ledger
from tests.faults.run import check
from tests.faults.syscalls import SYSCALLS, count_syscalls, kill_at_syscall
from tests.faults.system import Instance, System, running
from tests.faults.tills import Numbers, Tills

PROCESSES = ("purchases", "relay", "consumer")
WARM_UP = 5  # sales
COUNTED = 3  # sales whose calls are counted; the one that takes the most decides
ATTEMPTS = 3  # sales differ a little in how many calls they take
PATIENCE_S = 60.0
COPIES = {"purchases": 1, "relay": 1, "consumer": 1, "analytics": 1}


def main() -> int:
    chosen = sys.argv[1:] or PROCESSES
    if unknown := set(chosen) - set(PROCESSES):
        show.fail(f"no such process: {', '.join(sorted(unknown))}; there are {', '.join(PROCESSES)}")
        return 2
    begin = time.monotonic()
    numbers = (Column(name, justify="right") for name in ("calls", "deaths", "sales", "seconds"))
    table = Table("process", "call", *numbers)
    findings = Findings()
    try:
        with running(show.say, copies=COPIES) as system:
            ledger = Ledger(system.directory / "ledger.jsonl")
            target, analytics = (system.target(system.of(name)[0]) for name in ("purchases", "analytics"))
            tills = Tills(
                system.identities, lambda _: [target], analytics, ledger, Numbers(), seed="one sale", count=1, rate=1
            )
            with tills.beside(target) as till:
                for name in chosen:
                    _enumerate(system, ledger, system.of(name)[0], till.sell, table)
            check(system, ledger, findings)
            ledger.close()
            system.keep = bool(findings)
    except StackError as error:
        show.fail(str(error))
        return 1
    show.console.print(table)
    show.say(f"{ledger.acknowledged} sales in {time.monotonic() - begin:.0f} s; findings: {dict(findings.counts)}")
    for line in findings.lines():
        show.fail(line)
    return 1 if findings else 0


def _enumerate(system: System, ledger: Ledger, instance: Instance, sell: Callable[[], object], table: Table) -> None:
    """One row for each kind of call: how many of them a sale takes, and how often the process died at one of them."""

    def sold() -> None:
        sell()
        if not wait_until(lambda: _uncounted(system, ledger) == 0, PATIENCE_S):
            raise StackError(f"{instance.name}: {_uncounted(system, ledger)} acknowledged sales are not counted")

    for _ in range(WARM_UP):
        sold()
    samples = [count_syscalls(instance, sold) for _ in range(COUNTED)]
    for call in SYSCALLS:
        calls = max(sample[call] for sample in samples)
        if not calls:
            continue
        begin, before, deaths = time.monotonic(), ledger.acknowledged, 0
        for n in range(1, calls + 1):
            if not wait_until(lambda: instance.ready, PATIENCE_S):
                raise StackError(f"{instance.name} does not come back")
            died = any(kill_at_syscall(instance, n, 0.0, sold, [call]) for _ in range(ATTEMPTS))
            deaths += died
            show.say(f"{'✓' if died else '·'} {instance.name} at {call} {n} of {calls}")
        figures = calls, deaths, ledger.acknowledged - before, round(time.monotonic() - begin)
        table.add_row(instance.service.kind, call, *map(str, figures))


def _uncounted(system: System, ledger: Ledger) -> int:
    """Acknowledged sales that are not in the read models."""
    ids = {event_id for _, event_id in ledger.acknowledged_since(0)}
    with system.database("analytics") as connection:
        row = connection.execute(
            "SELECT count(*) FROM analytics_event_log WHERE event_id = ANY (%s::uuid[])", [list(ids)]
        ).fetchone()
    assert row is not None
    return len(ids) - int(str(row[0]))


if __name__ == "__main__":
    sys.exit(main())
