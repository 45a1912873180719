"""`retail-purchases retention [--keep-months N] [--keep-outbox-days N]`: how long is kept, decided by the owner."""

from chassis import cli, migrate


def run(database_url: str, keep_months: int | None, keep_outbox_days: int | None) -> None:
    """Store what is given, and print what is stored.

    Raises:
        psycopg.Error: who logs in does not own the database, or there is none.
    """
    with migrate.connect(database_url) as connection:
        if keep_months is not None or keep_outbox_days is not None:
            connection.execute(
                "UPDATE chain_settings SET keep_months = coalesce(%s, keep_months),"
                " keep_outbox_days = coalesce(%s, keep_outbox_days)",
                [keep_months, keep_outbox_days],
            )
        row = connection.execute("SELECT keep_months, keep_outbox_days FROM chain_settings").fetchone()
    if row is None:
        raise migrate.MigrationError("the database has no settings: run `migrate` first")
    months, days = row
    console = cli.console()
    console.print(f"Purchases: {f'{months} full months' if months else 'everything'} is kept.")
    console.print(f"Outbox: {days} full days is kept.")
