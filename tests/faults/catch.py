"""`python -m tests.faults.catch [NAME…]`: every planted bug in a short run of its own; the checker must find it.

Prints the table of the README. Exit code 0 only if all are caught, and for what they are.
"""

import importlib
import pkgutil
import sys
import time
from typing import NamedTuple

from rich.table import Column, Table

from deploy.local.machine import StackError
from tests.faults import planted, show
from tests.faults.run import Options, Result, Run
from tests.faults.system import running

SEED = 1
QUIET_S = 20.0
MISFIT = "plant.<locals>."  # in the text of a TypeError: what was replaced is called in another way by now
TRIES = 3  # with other seeds: a race may not happen in so short a run


class Catch(NamedTuple):
    name: str
    bug: str
    faults: str
    found: dict[str, int]
    example: str
    caught: bool
    tries: int
    seconds: float


def catch(name: str) -> Catch:
    """Run with the bug until it is found, a few times at most."""
    bug = importlib.import_module(f"tests.faults.planted.{name}")
    begin = time.monotonic()
    for attempt in range(TRIES):
        findings = _run(name, bug.FAULTS, SEED + attempt).findings
        right = [kind for kind in findings.counts if kind in bug.CAUGHT_AS]
        if right:
            break
    return Catch(
        name,
        (bug.__doc__ or "").strip(),
        ", ".join(dict.fromkeys(bug.FAULTS)),
        dict(findings.counts),
        findings.details[right[0]][0] if right else "",
        bool(right),
        attempt + 1,
        time.monotonic() - begin,
    )


def _run(name: str, faults: tuple[str, ...], seed: int) -> Result:
    options = Options(len(faults), seed, faults, gap_s=1.0, long_s=8.0, quiet_s=QUIET_S, in_order=True)
    with running(lambda _: None, name) as system:
        result = Run(system, options, lambda *_: None).run()
        for log in (system.directory / "log").glob("*.log"):
            if MISFIT in log.read_text(errors="replace"):
                raise StackError(
                    f"the bug does not fit its place any more, see there: {MISFIT}… in the log of {log.stem}"
                )
        return result


def main() -> int:
    names = sys.argv[1:] or [module.name for module in pkgutil.iter_modules(planted.__path__)]
    catches = []
    for name in names:
        try:
            catches.append(found := catch(name))
        except StackError as error:
            show.fail(f"{name}: {error}")
            return 1
        mark = "[green]✓[/]" if found.caught else "[red]✗[/]"
        show.console.print(f"{mark} {name:34} {found.seconds:5.0f} s  {found.found}", soft_wrap=True)
        if found.example:
            show.say(f"      {found.example}")
    table = Table("planted bug", "found as", Column("tries", justify="right"), Column("seconds", justify="right"))
    for found in catches:
        table.add_row(found.name, ", ".join(found.found), str(found.tries), f"{found.seconds:.0f}")
    show.console.print(table)
    caught = sum(found.caught for found in catches)
    show.say(f"{caught} of {len(catches)} caught")
    for found in catches:  # the README's rows
        what = ", ".join(f"{kind} {count}" for kind, count in found.found.items()) or "not caught"
        print(f"| `{found.name}` | {found.bug} | {found.faults} | {what} |")
    return 0 if caught == len(catches) else 1


if __name__ == "__main__":
    sys.exit(main())
