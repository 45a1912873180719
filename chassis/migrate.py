"""Numbered SQL files, applied in order, once, under an advisory lock; an applied file must never change."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import psycopg
import structlog

from chassis.postgres import Connection

LOCK_TIMEOUT_S = 60  # how long to wait for another migrator
LOCK_KEY = 7_265_746_169  # any number that all our migrators share; advisory locks are per database

log = structlog.get_logger()


class MigrationError(Exception):
    """The database and the files do not fit together."""


class Migration(NamedTuple):
    """One file: `0001_purchases.sql` has the version 1."""

    version: int
    name: str
    statements: str
    checksum: str


def read(directory: Path) -> list[Migration]:
    migrations = []
    for path in sorted(directory.glob("[0-9][0-9][0-9][0-9]_*.sql")):
        statements = path.read_text()
        checksum = hashlib.sha256(statements.encode()).hexdigest()
        migrations.append(Migration(int(path.name[:4]), path.stem, statements, checksum))
    return migrations


def migrate(url: str, directory: Path) -> list[str]:
    """Apply what is missing, each file in a transaction of its own; returns the names applied.

    Raises:
        MigrationError: an applied file was changed or is gone, or another migrator holds the lock too long.
        psycopg.Error: a file failed; it left nothing behind.
    """
    applied = []
    with psycopg.connect(url, autocommit=True, application_name="migrate", connect_timeout=10) as connection:
        connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_S}s'")
        try:
            connection.execute("SELECT pg_advisory_lock(%s)", [LOCK_KEY])
        except psycopg.errors.LockNotAvailable:
            raise MigrationError(f"another migrator has held the lock for {LOCK_TIMEOUT_S} s") from None
        connection.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations (version int PRIMARY KEY, name text NOT NULL,"
            " checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
        )
        rows = connection.execute("SELECT version, name, checksum FROM schema_migrations").fetchall()
        for migration in _missing(read(directory), {version: (name, checksum) for version, name, checksum in rows}):
            with connection.transaction():
                connection.execute(migration.statements)
                connection.execute(
                    "INSERT INTO schema_migrations (version, name, checksum) VALUES (%s, %s, %s)",
                    [migration.version, migration.name, migration.checksum],
                )
            log.info("migration applied", name=migration.name)
            applied.append(migration.name)
    return applied


async def require_current(connection: Connection, directory: Path) -> None:
    """Refuse to run on a database that lacks one of our migrations. Later ones are fine: they come from an upgrade.

    Raises:
        MigrationError: naming what is missing.
    """
    try:
        rows = await (await connection.execute("SELECT version FROM schema_migrations")).fetchall()
    except psycopg.errors.UndefinedTable:
        raise MigrationError("the database is empty: run `migrate` first") from None
    present = {version for (version,) in rows}
    if missing := [m.name for m in read(directory) if m.version not in present]:
        raise MigrationError(f"the database lacks the migrations {', '.join(missing)}: run `migrate` first")


def _missing(migrations: list[Migration], applied: dict[int, tuple[str, str]]) -> list[Migration]:
    ours = {m.version: m for m in migrations}
    for version, (name, checksum) in sorted(applied.items()):
        if version in ours and ours[version].checksum != checksum:
            raise MigrationError(f"{name} was changed after it had been applied; add a new migration instead")
    return [m for m in migrations if m.version not in applied]
