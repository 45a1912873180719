"""The main job: `python -m pos.demo [--file F] [--limit N] [--report F] [--seed N]`.

Sends purchases through the gRPC API, waits until the read models have them, and prints the owner's answers.
Exit code: 0 only if the audit finds that the read models equal what was recorded, 1 if not, 2 for wrong usage or an
unreadable file, 130 on Ctrl-C.
"""

import argparse
import itertools
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from chassis.settings import SettingsError, address, load, setting
from pos import report
from pos.analytics import AnalyticsClient
from pos.audit import AuditClient
from pos.backlog import Backlog
from pos.client import PosClient, Sale, connect
from pos.control_totals import Comparison, wait_until_equal
from pos.errors import PosError
from pos.replay import UnreadableFile, read_sales
from pos.report import Answers, Sent
from pos.simulator import simulate
from pos.tills import SaleFailed, Tills

READ_TIMEOUT_S = 180.0  # as patient as the tills are
REFRESH_S = 0.1
SEED = 1

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    purchases_target: str = setting("PURCHASES_TARGET", address, default="127.0.0.1:50051")
    analytics_target: str = setting("ANALYTICS_TARGET", address, default="127.0.0.1:50052")
    consumer_target: str = setting("CONSUMER_TARGET", address, default="127.0.0.1:50054")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    complaints = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        args = _parser().parse_args(arguments)
        args.seed = SEED if args.seed is None else args.seed
        return 0 if run(args, load(Settings), Console(highlight=False)) else 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # impatience must not break what is left to do
        complaints.print("stopped; what was acknowledged is stored, and sending it again changes nothing")
        return 130
    except SettingsError as error:
        complaints.print(f"wrong settings:\n{error}", markup=False)
        return 2
    except UnreadableFile as error:
        complaints.print(f"{error}\nnothing was sent", markup=False)
        return 2
    except (SaleFailed, PosError) as error:
        complaints.print(f"the demo stopped: {error}", markup=False)
        return 1


def run(args: argparse.Namespace, settings: Settings, console: Console) -> bool:
    """The whole story; True when the read models equal what was recorded.

    Raises:
        UnreadableFile: before anything was sent.
        SaleFailed: a sale was refused, or its outcome stayed unknown.
        PosError: a service did not answer in time.
    """
    sales = _sales(args, console)
    with _progress(console) as progress:
        sender = Backlog if args.file else Tills  # books are sent as a till sends what it sold while it was offline
        sent = send(sender(sales, settings.purchases_target, seed=args.seed), len(sales), progress)
        comparison, answers = wait_and_ask(settings, progress)
    report.print_all(answers, comparison, sent, console)
    if args.file:
        console.print(
            "Note: every quantity in the file was cut to one unit, branches and tills were assigned by rule. "
            "The revenue is not the firm's revenue."
        )
    if args.report:
        with args.report:
            args.report.write(report.as_json(answers, comparison, sent))
    return comparison.agrees


def send(sender: Tills | Backlog, sales: int, progress: Progress) -> Sent:
    """Send all sales."""
    bar = progress.add_task("sold", total=sales, note="")
    started = time.monotonic()
    with sender as tills:
        finished = False
        while not finished:
            finished = tills.wait(REFRESH_S)
            progress.update(bar, completed=tills.recorded, note=_waiting(tills.trouble))
        seconds = time.monotonic() - started
    return Sent(tills.recorded, tills.replayed, tills.duplicates_sent, seconds)


def wait_and_ask(settings: Settings, progress: Progress) -> tuple[Comparison, Answers]:
    """Wait until the read models equal what was recorded, or move no more; then ask for the audit and the answers."""
    bar = progress.add_task("counted", total=None, note="")

    def pause(pause_s: float, why: PosError) -> None:
        progress.update(bar, note=_waiting(why))
        time.sleep(pause_s)

    def show(comparison: Comparison) -> None:
        lagging = f"{len(comparison.lags):,} days and branches lag" if comparison.lags else ""
        progress.update(bar, total=comparison.purchases, completed=comparison.arrived, note=lagging)

    with (
        connect(settings.purchases_target) as truth,
        connect(settings.analytics_target) as read_models,
        connect(settings.consumer_target) as auditor,
    ):
        purchases = PosClient(truth, total_timeout_s=READ_TIMEOUT_S, pause=pause)
        analytics = AnalyticsClient(read_models, total_timeout_s=READ_TIMEOUT_S, pause=pause)
        comparison = wait_until_equal(purchases.list_control_totals, analytics.daily_sales, show)
        audited = AuditClient(auditor, total_timeout_s=READ_TIMEOUT_S, pause=pause).audit()
        comparison = comparison._replace(audited=audited)
        answers = Answers(
            analytics.summary(),
            analytics.daily_sales(),
            analytics.count_loyal_customers(report.LOYAL_PURCHASES),
            analytics.top_products(report.TOP_PRODUCTS),
        )
    return comparison, answers


def _sales(args: argparse.Namespace, console: Console) -> list[Sale]:
    if args.file:
        with console.status(f"reading {args.file.name}"):
            sales = read_sales(args.file)[: args.limit]
        console.print(f"{len(sales):,} purchases from {args.file}", markup=False)
    else:
        sales = list(itertools.islice(simulate(args.seed), args.limit))
        console.print(f"{len(sales):,} purchases of a simulated chain, seed {args.seed}")
    return sales


def _waiting(trouble: PosError | None) -> str:
    return f"waits for the service ({trouble.status.reason or trouble.status.code.name})" if trouble else ""


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("[yellow]{task.fields[note]}"),
        console=console,
    )


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("pos.demo", description="Sell, wait until all is counted, and ask.")
    add = parser.add_argument
    add("--file", type=_given(Path), help="replay this file (UCI Online Retail, .csv or .csv.gz)")
    add("--limit", type=_given(_count), metavar="N", help="only the first N purchases")
    add("--report", type=_given(_new_file), metavar="FILE", help="write the answers as JSON")
    add("--seed", type=_given(int), metavar="N", help=f"of the simulated chain (default {SEED})")
    return parser


def _given(parse: Callable[[str], T]) -> Callable[[str], T | None]:
    """An argument with an empty value counts as not given: make passes on what was not set as well."""

    def parsed(raw: str) -> T | None:
        return parse(raw) if raw else None

    parsed.__name__ = parse.__name__  # argparse names it when the value is wrong
    return parsed


def _new_file(raw: str) -> IO[str]:
    """Opened before anything is sent, to tell a wrong path at once. A run that fails leaves it empty."""
    try:
        return Path(raw).open("w")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {raw}: {error.strerror}") from None


def _count(raw: str) -> int:
    if not (raw.isascii() and raw.isdigit() and int(raw) > 0):
        raise argparse.ArgumentTypeError(f"{raw!r} is not a number of 1 or more")
    return int(raw)


if __name__ == "__main__":
    sys.exit(main())
