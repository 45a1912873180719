"""`retail-analytics rebuild`: the read models from the recorded purchases, while all goes on."""

import asyncio

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from analytics_svc.settings import RebuildSettings
from analytics_svc.upstream import chain
from chassis import cli, logs, tls, zones
from chassis.errors import ServiceError

FOREIGN_SHOWN = 1_000


@click.command("rebuild")
def command() -> int:
    """Make the read models anew.

    From the recorded purchases, while sales and answers go on. The exit code is 1 when it ended before it was done;
    then do it again. Days whose purchases are past their retention stay as they are.
    """
    config = cli.of_environment_or_local_stack(RebuildSettings, "consumer")
    logs.configure("analytics-rebuild", "WARNING")
    return asyncio.run(run(config, console=cli.console()))


async def run(config: RebuildSettings, *, console: Console) -> int:
    """Rebuild and tell what was wrong; returns the exit code: 0 when it is done, 1 when it ended before."""
    from analytics_svc.proof import rebuild  # not in every process of this package: it brings metrics

    zone, credentials = zones.load(config.business_time_zone), tls.credentials(config)
    columns = (
        TextColumn("days"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("days", total=None, note="")

        def show(now: rebuild.Progress) -> None:
            progress.update(
                bar, total=now.steps, completed=now.steps_done, note=f"{now.purchases:,} purchases; {now.stage}"
            )

        try:
            async with chain.connect(
                config, zone, credentials, purchases=config.purchases_target, relay=config.relay_target
            ) as cells:
                rebuilt = await rebuild.rebuild_all(
                    config.database_url,
                    cells,
                    cells.today(),
                    show=show,
                    positions={each.cell.name: each.outbox.position for each in cells.asked()},
                )
        except ServiceError as error:
            console.print(f"not done: {error.message}", style="red", markup=False)
            return 1
    wrong = {table: rows for table, rows in rebuilt.repaired.items() if rows}
    console.print(
        f"{rebuilt.purchases:,} purchases were read, of which {rebuilt.added:,} had not been counted;"
        f" {sum(wrong.values()):,} rows were wrong, missing or surplus."
    )
    for table, rows in wrong.items():
        console.print(f"  {table}: {rows:,}")
    if rebuilt.complete_from:
        console.print(f"Days before {rebuilt.complete_from} stay as they are: their purchases are past the retention.")
    if rebuilt.foreign:
        console.print(
            f"{len(rebuilt.foreign):,} events had been counted that nobody recorded; they count no more:",
            style="yellow",
        )
        for event_id in rebuilt.foreign[:FOREIGN_SHOWN]:
            console.print(f"  {event_id}")
    return 0
