"""The main job: `retail-pos demo [--file F] [--limit N] [--report F] [--seed N] [--streams] [--journals DIR]`.

Sends purchases through the gRPC API, waits until the read models have them, and prints the owner's answers.
Exit code: 0 only if the audit finds that the read models equal what was recorded, 1 if not, 2 for wrong usage or an
unreadable file, 130 on Ctrl-C.
"""

import itertools
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

import click
from rich.console import Console
from rich.progress import Progress

from chassis import cells, cli, tls, traces
from chassis.lifecycle import FORCED_EXIT_CODE
from pos import report
from pos.analytics import AnalyticsClient
from pos.audit import AuditClient
from pos.backlog import Backlog
from pos.client import DayTotals, PosClient, Sale, connect
from pos.control_totals import Comparison, wait_until_equal
from pos.errors import PosError
from pos.importing.reading import UnreadableFile
from pos.lines import Identities
from pos.progress import waiting_for, work_progress
from pos.replay import read_sales
from pos.report import Answers, Sent
from pos.settings import Settings
from pos.simulator import simulate
from pos.tills import SaleFailed, Tills

READ_TIMEOUT_S = 180.0  # as patient as the tills are
REFRESH_S = 0.1
SEED = 1


class Asked(NamedTuple):
    file: Path | None
    limit: int | None
    report: IO[str] | None
    seed: int
    streams: bool
    journals: Path | None


# The report is opened before anything is sent, to tell a wrong path at once. A run that fails leaves it empty.
@click.command()
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Replay these books: UCI Online Retail, .csv or .csv.gz. [default: simulate a chain]",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N purchases. [default: all]")
@click.option("--report", type=click.File("w", lazy=False), metavar="FILE", help="Write the answers as JSON.")
@click.option("--seed", type=int, default=SEED, show_default=True, metavar="N", help="Of the simulated chain.")
@click.option("--streams", is_flag=True, help="Tills keep streams open instead of calling for each sale.")
@click.option(
    "--journals",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="One till of each branch keeps a journal, here; it goes on with it the next time.",
)
def demo(
    file: Path | None, limit: int | None, report: IO[str] | None, seed: int, streams: bool, journals: Path | None
) -> int:
    """Sell, wait until all is counted, and ask.

    The exit code is 0 only if the audit finds that the read models equal what was recorded.
    """
    try:
        settings = cli.of_environment_or_local_stack(Settings, "purchases")
        with traces.exported(settings, "pos"):
            return 0 if run(Asked(file, limit, report, seed, streams, journals), settings, cli.console()) else 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # impatience must not break what is left to do
        click.echo("stopped; what was acknowledged is stored, and sending it again changes nothing", err=True)
        return FORCED_EXIT_CODE
    except UnreadableFile as error:
        click.echo(f"{error}\nnothing was sent", err=True)
        return 2
    except (SaleFailed, PosError) as error:
        click.echo(f"the demo stopped: {error}", err=True)
        return 1


def run(args: Asked, settings: Settings, console: Console) -> bool:
    """The whole story; True when the read models equal what was recorded.

    Raises:
        UnreadableFile: before anything was sent.
        SaleFailed: a sale was refused, or its outcome stayed unknown.
        PosError: a service did not answer in time.
    """
    sales = _sales(args, console)
    with work_progress(console) as progress:
        credentials = tls.credentials(settings)
        identities = Identities(credentials, Path(settings.till_certificates) if settings.till_certificates else None)
        target, seed = settings.purchases_target, args.seed
        if args.file:  # books are sent as a till sends what it sold while it was offline
            sender: Tills | Backlog = Backlog(sales, target, seed=seed, identities=identities)
        else:
            kept = args.journals / f"seed-{seed}" if args.journals else None
            sender = Tills(sales, target, seed=seed, identities=identities, streams=args.streams, journals=kept)
        sent = send(sender, len(sales), progress)
        comparison, answers = wait_and_ask(settings, credentials, progress)
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
            progress.update(bar, completed=tills.recorded, note=waiting_for(tills.trouble))
        seconds = time.monotonic() - started
    return Sent(tills.recorded, tills.replayed, tills.duplicates_sent, seconds)


def wait_and_ask(
    settings: Settings, credentials: tls.Credentials | None, progress: Progress
) -> tuple[Comparison, Answers]:
    """Wait until the read models equal what was recorded, or move no more; then ask for the audit and the answers."""
    bar = progress.add_task("counted", total=None, note="")

    def pause(pause_s: float, why: PosError) -> None:
        progress.update(bar, note=waiting_for(why))
        time.sleep(pause_s)

    def show(comparison: Comparison) -> None:
        lagging = f"{len(comparison.lags):,} days and branches lag" if comparison.lags else ""
        progress.update(bar, total=comparison.purchases, completed=comparison.arrived, note=lagging)

    listed = cells.follow(settings).value if settings.cells_file else cells.only(settings.purchases_target, "")
    with (
        ExitStack() as channels,
        connect(settings.analytics_target, credentials) as read_models,
        connect(settings.consumer_target, credentials) as auditor,
    ):
        truth = {
            name: channels.enter_context(connect(cell.purchases, credentials)) for name, cell in listed.by_name.items()
        }

        def recorded() -> Iterator[DayTotals]:
            """By every cell, of the branches that are its own."""
            for name, channel in truth.items():
                purchases = PosClient(channel, total_timeout_s=READ_TIMEOUT_S, pause=pause)
                yield from (row for row in purchases.list_control_totals() if listed.has(name, row.branch_id))

        analytics = AnalyticsClient(read_models, total_timeout_s=READ_TIMEOUT_S, pause=pause)
        comparison = wait_until_equal(recorded, analytics.daily_sales, show)
        audited = AuditClient(auditor, total_timeout_s=READ_TIMEOUT_S, pause=pause).audit()
        comparison = comparison._replace(audited=audited)
        answers = Answers(
            analytics.summary(),
            analytics.daily_sales(),
            analytics.count_loyal_customers(report.LOYAL_PURCHASES),
            analytics.top_products(report.TOP_PRODUCTS),
        )
    return comparison, answers


def _sales(args: Asked, console: Console) -> list[Sale]:
    if args.file:
        with console.status(f"reading {args.file.name}"):
            sales = read_sales(args.file)[: args.limit]
        console.print(f"{len(sales):,} purchases from {args.file}", markup=False)
    else:
        sales = list(itertools.islice(simulate(args.seed), args.limit))
        console.print(f"{len(sales):,} purchases of a simulated chain, seed {args.seed}")
    return sales
