"""`make faults [FAULTS=n] [SEED=n] [CLUSTER=1] [TLS=1] [CELLS=n] [REPORT=file]`: break the system, count every cent."""

import argparse
import json
import os
import random
import signal
import sys
from pathlib import Path
from types import FrameType

from deploy.local import cells
from deploy.local.machine import StackError
from deploy.local.services import CELLS_SETTING
from tests.faults import show
from tests.faults.prove import CHANGES, unseen
from tests.faults.run import Options, Result, Run
from tests.faults.system import running

INTERRUPTED = 130


class Interrupted(BaseException):
    """Somebody wants us to end: first we clean up."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--faults", type=int, default=int(os.environ.get("FAULTS") or 200))
    parser.add_argument("--seed", type=int, default=int(os.environ.get("SEED") or random.randrange(1, 1_000_000)))
    parser.add_argument("--report", type=Path, default=os.environ.get("REPORT") or None)
    parser.add_argument("--only", default=os.environ.get("KINDS") or "", help="kinds, separated by commas")
    parser.add_argument("--planted", help="a bug of tests/faults/planted")
    parser.add_argument("--rate", type=float, default=60.0, help="sales a second")
    parser.add_argument("--long", type=float, default=45.0, help="seconds of faults that outlast every timeout")
    parser.add_argument("--gap", type=float, default=1.5, help="seconds between faults, on average")
    parser.add_argument("--prove", action="store_true", help="change the outcome in many ways: each must be found")
    parser.add_argument(
        "--cluster", action="store_true", default=bool(os.environ.get("CLUSTER")), help="three nodes of RabbitMQ"
    )
    parser.add_argument(
        "--certified", action="store_true", default=os.environ.get("TLS") == "1", help="mutual TLS for every call"
    )
    parser.add_argument("--cells", default=os.environ.get(CELLS_SETTING) or "1", help="how many the chain has")
    parser.add_argument("--keep", action="store_true", help="leave ledger and logs behind")
    chosen = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        options = Options(
            chosen.faults,
            chosen.seed,
            [kind for kind in chosen.only.split(",") if kind],
            rate=chosen.rate,
            long_s=chosen.long,
            gap_s=chosen.gap,
            cluster=chosen.cluster,
            certified=chosen.certified,
            cells=cells.count({CELLS_SETTING: chosen.cells}),
        )
        result = _run(options, chosen.planted, keep=chosen.keep, proven=chosen.prove)
    except StackError as error:
        show.fail(str(error))
        return 1
    except Interrupted:
        return INTERRUPTED
    show.table(result)
    if chosen.report:
        chosen.report.write_text(json.dumps(result.report(), indent=2) + "\n")
    return 0 if result.enough and not result.findings else 1


def _run(options: Options, planted: str | None, *, keep: bool, proven: bool) -> Result:
    again = f"make faults FAULTS={options.faults} SEED={options.seed}{' CLUSTER=1' if options.cluster else ''}"
    again += " TLS=1" if options.certified else ""
    again += f" CELLS={options.cells}" if options.cells > 1 else ""
    show.say(f"seed {options.seed}: `{again}` plays it again")
    rig = running(
        show.say, planted, cluster=options.cluster, certified=options.certified, number_of_cells=options.cells
    )
    with rig as system:
        run = Run(system, options, show.fault)
        with show.progress(run):
            result = run.run()
        if proven and not result.findings:
            if missed := unseen(system, run.ledger):
                raise StackError("the checker does not see: " + "; ".join(missed))
            show.say(f"{len(CHANGES)} changes of the outcome, made and taken back: the checker sees each")
        system.keep = keep or bool(result.findings)
        if system.keep:
            show.say(f"ledger and logs stay in {system.directory}")
        return result


def _interrupt(number: int, _: FrameType | None) -> None:
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(number)


if __name__ == "__main__":
    sys.exit(main())
