"""`retail-purchases tills`: of which tills sales are missing, or came with a number twice."""

import datetime
import json

from rich.console import Console
from rich.table import Column, Table

from chassis import cli, postgres
from purchases_svc import stored, tills
from purchases_svc.settings import ServeSettings

STATEMENT_TIMEOUT_S = 30.0


async def run(config: ServeSettings, *, as_json: bool) -> bool:
    """Print them; True if there are any."""
    async with (
        postgres.open_pool(
            config.database_url,
            role=stored.ROLE,
            application_name="purchases tills",
            size=1,
            statement_timeout_s=STATEMENT_TIMEOUT_S,
        ) as pool,
        pool.connection() as connection,
    ):
        found = await tills.troubles(connection, older_than=tills.GAP_AGE, conflicts_for=tills.CONFLICTS_TOLD)
    console = cli.console()
    if as_json:
        console.print_json(json.dumps([_as_json(trouble) for trouble in found]))
    else:
        show(found, console)
    return bool(found)


def show(found: list[tills.Trouble], console: Console) -> None:
    if not found:
        console.print("Of no till sales have been missing for more than a day, and no number came twice within a week.")
        return
    table = Table(
        Column("branch", justify="right"),
        "till",
        "journal",
        Column("here up to", justify="right"),
        Column("given out", justify="right"),
        "missing since (UTC)",
        "reported (UTC)",
        Column("twice", justify="right"),
    )
    for trouble in found:
        table.add_row(
            str(trouble.till.branch_id),
            trouble.till.pos_id,
            trouble.epoch[:8],
            f"{trouble.complete_through:,}",
            f"{trouble.reported_through:,}",
            _text(trouble.missing_since) if trouble.missing_since else "nothing",
            _text(trouble.reported_at),
            f"{trouble.conflicts:,}" if trouble.conflicts else "",
        )
    console.print(table)
    console.print("What is missing is on the till's disk, refused or unsent: ask there for its journal's status.")
    if any(trouble.conflicts for trouble in found):
        console.print("A number that came twice: the till's disk was restored from an image, or cloned.")


def _text(moment: datetime.datetime) -> str:
    return f"{moment.astimezone(datetime.UTC):%Y-%m-%d %H:%M}"


def _as_json(trouble: tills.Trouble) -> dict[str, object]:
    return {
        "branch_id": trouble.till.branch_id,
        "pos_id": trouble.till.pos_id,
        "epoch": trouble.epoch,
        "complete_through": trouble.complete_through,
        "reported_through": trouble.reported_through,
        "missing_since": trouble.missing_since.isoformat() if trouble.missing_since else None,
        "reported_at": trouble.reported_at.isoformat(),
        "conflicts": trouble.conflicts,
        "clock_offset_ms": trouble.clock_offset_ms,
    }
