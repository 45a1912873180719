"""The analytics database as a process finds it when it starts: up, migrated, made for the same time zone."""

import asyncio
from pathlib import Path

import psycopg

from analytics_svc.settings import MigrateSettings
from chassis import migrate, postgres
from chassis.postgres import Connection

DOMAIN = "analytics.retail.example"  # whose reasons our errors carry
MIGRATIONS = Path(__file__).parent / "migrations"


async def wait_until_ready(pool: postgres.Pool, time_zone: str, stop: asyncio.Event) -> bool:
    """Wait until the database is up; False when `stop` came first.

    Raises:
        MigrationError: it is not the database that this process was made for.
    """
    while await postgres.wait_until_up(pool, stop):
        try:
            async with pool.connection() as connection:
                await migrate.require_current(connection, MIGRATIONS)
                row = await (await connection.execute("SELECT time_zone FROM analytics_settings")).fetchone()
        except (psycopg.errors.UndefinedTable, psycopg.errors.InsufficientPrivilege) as error:
            raise migrate.MigrationError(f"{error.diag.message_primary}: run `migrate` first") from error
        except postgres.UNAVAILABLE:
            continue
        if row is None:
            raise migrate.MigrationError("the database has no time zone: run `migrate` first")
        migrate.require_time_zone(time_zone, row[0])
        return True
    return False


def migrate_database(config: MigrateSettings) -> None:
    migrate.migrate_chain(config.database_url, MIGRATIONS, "analytics_settings", config.business_time_zone)


async def page_token_key(connection: Connection) -> bytes:
    """The secret that signs page tokens, the same for all servers of this database."""
    row = await (await connection.execute("SELECT page_token_key FROM analytics_settings")).fetchone()
    assert row is not None  # checked at the start of the process
    key: bytes = row[0]
    return key
