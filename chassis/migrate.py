"""Numbered SQL files, applied in order, once, under an advisory lock; an applied file must never change.

Sales go on meanwhile. Whatever waits for a table's lock makes all who come after it wait, too: so a file waits a second
at most, and is tried again. It has to be written so that it needs its locks for a moment only: columns without a
computed default, constraints NOT VALID and validated by a later file, indexes of full tables made concurrently before;
expand first, contract when no process of the old form is left.
"""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psycopg
import structlog
from psycopg import sql

from chassis.postgres import SESSION, Connection, set_all

LOCK_TIMEOUT_S = 60  # how long to wait for another migrator, and to try a file again
TABLE_LOCK_TIMEOUT_S = 1  # how long a file may make everybody wait who needs the same table
PAUSE_S = 0.2  # between its attempts: whoever had to wait behind it gets on
LOCK_KEY = 7_265_746_169  # any number that all our migrators share; advisory locks are per database

_APPLIED = "SELECT version, name, checksum FROM schema_migrations ORDER BY version"

log = structlog.get_logger()


class MigrationError(Exception):
    """The database and the files do not fit together."""


class Applied(NamedTuple):
    """One file as it was applied: `0001_purchases.sql` has the version 1."""

    version: int
    name: str
    checksum: str


class Migration(NamedTuple):
    """One file as we have it."""

    version: int
    name: str
    checksum: str
    statements: str


def read(directory: Path) -> list[Migration]:
    migrations = []
    for path in sorted(directory.glob("[0-9][0-9][0-9][0-9]_*.sql")):
        statements = path.read_text()
        checksum = hashlib.sha256(statements.encode()).hexdigest()
        migrations.append(Migration(int(path.name[:4]), path.stem, checksum, statements))
    return migrations


@contextmanager
def connect(url: str) -> Iterator[psycopg.Connection]:
    """The owner's autocommit connection to the database that is to be migrated."""
    with psycopg.connect(url, autocommit=True, application_name="migrate", connect_timeout=10) as connection:
        connection.execute(set_all({**SESSION, "lock_timeout": f"{LOCK_TIMEOUT_S}s"}))
        yield connection


def migrate(connection: psycopg.Connection, directory: Path) -> list[str]:
    """Apply what is missing, each file in a transaction of its own; returns the names applied.

    Each time, what everybody may do in a new database is taken away: a dump does not tell of it.

    Raises:
        MigrationError: an applied file was changed or is gone, or another migrator holds the lock too long.
        psycopg.Error: a file failed; it left nothing behind.
    """
    try:
        connection.execute("SELECT pg_advisory_lock(%s)", [LOCK_KEY])
    except psycopg.errors.LockNotAvailable:
        raise MigrationError(f"another migrator has held the lock for {LOCK_TIMEOUT_S} s") from None
    connection.execute(
        "CREATE TABLE IF NOT EXISTS schema_migrations (version int PRIMARY KEY, name text NOT NULL,"
        " checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
    )
    applied = [Applied(*row) for row in connection.execute(_APPLIED)]
    missing = _missing(read(directory), applied, connection.info)
    _forbid_temporary_objects(connection)
    connection.execute(set_all({"lock_timeout": f"{TABLE_LOCK_TIMEOUT_S}s"}))
    for migration in missing:
        _apply(connection, migration)
        log.info("migration applied", name=migration.name)
    return [migration.name for migration in missing]


def _apply(connection: psycopg.Connection, migration: Migration) -> None:
    until = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            with connection.transaction():
                connection.execute(migration.statements)
                connection.execute(
                    "INSERT INTO schema_migrations (version, name, checksum) VALUES (%s, %s, %s)",
                    [migration.version, migration.name, migration.checksum],
                )
        except psycopg.errors.LockNotAvailable as error:
            if time.monotonic() > until:
                raise MigrationError(f"{migration.name}: somebody has held a table for {LOCK_TIMEOUT_S} s") from error
            log.info("a table is in use; the migration is tried again", name=migration.name)
            time.sleep(PAUSE_S)
        else:
            return


def _forbid_temporary_objects(connection: psycopg.Connection) -> None:
    """Of nothing that a process makes for itself may a function of the owner's ever take notice."""
    database = sql.Identifier(connection.info.dbname)
    connection.execute(sql.SQL("REVOKE TEMPORARY ON DATABASE {} FROM PUBLIC").format(database))
    # Who does not own the database revokes nothing, and PostgreSQL only warns.
    if connection.execute("SELECT has_database_privilege('public', current_database(), 'TEMPORARY')").fetchone() == (
        True,
    ):
        log.warning(
            "every login may make temporary tables; an administrator should revoke it",
            statement=f"REVOKE TEMPORARY ON DATABASE {connection.info.dbname} FROM PUBLIC",
        )


async def require_current(connection: Connection, directory: Path) -> None:
    """Refuse to run on a database that lacks one of our migrations. Later ones are fine: they come from an upgrade.

    Raises:
        MigrationError: naming what is missing, or was applied in another form.
    """
    try:
        applied = [Applied(*row) for row in await (await connection.execute(_APPLIED)).fetchall()]
    except psycopg.errors.UndefinedTable:
        raise MigrationError("the database is empty: run `migrate` first") from None
    if missing := _missing(read(directory), applied, connection.info):
        names = ", ".join(migration.name for migration in missing)
        raise MigrationError(f"the database lacks the migrations {names}: run `migrate` first")


def _missing(ours: list[Migration], applied: list[Applied], database: psycopg.ConnectionInfo) -> list[Migration]:
    """What is still to be applied. Versions above ours are fine: an upgrade applied them.

    Raises:
        MigrationError: what was applied is not what we have.
    """
    checksums = {migration.version: migration.checksum for migration in ours}
    others = [
        f"{it.name} was changed" if it.version in checksums else f"{it.name} is gone"
        for it in applied
        if it.version <= max(checksums, default=0) and checksums.get(it.version) != it.checksum
    ]
    if others:
        raise MigrationError(
            f"the database {database.dbname} at {database.host}:{database.port} was made by a version with other"
            f" migrations: {', '.join(others)} after it had been applied. Once released, none is ever changed; from a"
            " database of before that, no way leads on: remove it with all its data, and let `migrate` make a new one"
        )
    done = {it.version for it in applied}
    return [migration for migration in ours if migration.version not in done]
