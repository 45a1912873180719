"""`retail-relay partitions [--drop] [--json]`: the days of the outbox, and what retention does with each."""

import json

from rich.table import Column, Table

from chassis import cli, postgres
from relay_svc import outbox, retention
from relay_svc.settings import PartitionsSettings

STATEMENT_TIMEOUT_S = 60.0  # for looking through all days


async def run(config: PartitionsSettings, *, drop: bool, as_json: bool) -> None:
    """Print them; with `drop`, let retention do its work before. Without, nothing is changed."""
    async with postgres.open_pool(
        config.database_url,
        role=outbox.ROLE,
        application_name="relay partitions",
        size=1,
        statement_timeout_s=STATEMENT_TIMEOUT_S,
    ) as pool:
        dropped = await retention.drop_old_days(pool) if drop else []
        days = await retention.days(pool)
        async with pool.connection() as connection:
            horizon = await retention.first_kept(connection)
    if as_json:
        for day in days:
            print(json.dumps({**day._asdict(), "day": day.day.isoformat(), "retention": day.verdict(horizon)}))
        return
    console = cli.console()
    if drop:
        console.print(f"Dropped: {', '.join(f'{day:%Y-%m-%d}' for day in dropped) or 'nothing'}.")
    table = Table("day", *(Column(name, justify="right") for name in ("events", "size MiB")), "retention")
    for day in days:
        table.add_row(f"{day.day:%Y-%m-%d}", f"~{day.events:,}", f"{day.bytes / 2**20:,.1f}", day.verdict(horizon))
    console.print(table)
    console.print(
        f"Days before {horizon:%Y-%m-%d} may go, when all is sent and known to the reader of committed events; "
        "`retail-purchases retention` decides that. `--drop` drops now; the relay does so every hour."
    )
