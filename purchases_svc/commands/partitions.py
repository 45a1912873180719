"""`retail-purchases partitions`: the months, their sizes, what retention does with each, and opening old ones."""

import datetime
from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table

from chassis import cli, postgres
from purchases_svc import retention, stored
from purchases_svc.partitions import Partitions
from purchases_svc.settings import ServeSettings


async def run(config: ServeSettings, *, drop: bool, opened: Sequence[datetime.date]) -> None:
    """Print them; before that, make those to be opened, and with `drop`, let retention do its work."""
    async with postgres.open_pool(
        config.database_url,
        role=stored.ROLE,
        application_name="purchases partitions",
        size=1,
        statement_timeout_s=retention.STATEMENT_TIMEOUT_S,
    ) as pool:
        console = cli.console()
        await Partitions(pool).ensure(opened, [])
        if drop:
            dropped = await retention.drop_old_months(pool)
            console.print(f"Dropped: {', '.join(f'{month:%Y-%m}' for month in dropped) or 'nothing'}.")
        show(await retention.months(pool), await retention.first_kept(pool), console)


def show(months: list[retention.Month], horizon: datetime.date | None, console: Console) -> None:
    numbers = ("purchases", "size MiB", "unsent")
    table = Table("month", *(Column(name, justify="right") for name in numbers), "retention")
    for month in months:
        size = f"{month.bytes / 2**20:,.1f}"
        table.add_row(
            f"{month.month:%Y-%m}", f"~{month.purchases:,}", size, f"{month.unsent:,}", month.verdict(horizon)
        )
    console.print(table)
    if horizon is None:
        console.print("Everything is kept; `retail-purchases retention` decides that.")
        return
    going = [month for month in months if month.verdict(horizon) == "drop"]
    console.print(
        f"Months before {horizon:%Y-%m} may go: {len(going)} of {len(months)}, "
        f"{sum(month.bytes for month in going) / 2**20:,.1f} MiB, as soon as all their events are sent. "
        "`--drop` drops now; services do so every hour."
    )
