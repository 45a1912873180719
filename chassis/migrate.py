"""Numbered SQL files, applied in order, once, under an advisory lock; an applied file must never change.

Sales go on meanwhile. Whatever waits for a table's lock makes all who come after it wait, too: so a file waits a second
at most, and is tried again. It has to be written so that it needs its locks for a moment only: columns without a
computed default, constraints NOT VALID and validated by a later file. And processes of the release before, which
`deploy/previous` names, go on: expand first, contract when none of them is left (CONTRIBUTING.md has a table).

An index of a table that is full is made by a file of its own, which has that one statement and no other:

    CREATE INDEX CONCURRENTLY purchases_cashier ON purchases (cashier_id, purchase_time);

It runs outside of a transaction and takes as long as it takes; nobody waits for it. Of a partitioned table, of which
PostgreSQL makes no index so, it is made partition by partition. If it fails or is stopped halfway, the next `migrate`
goes on: an index that is not valid is dropped and made again.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import psycopg
import structlog
from psycopg import sql

from chassis.postgres import SESSION, Connection, set_all

LOCK_TIMEOUT_S = 60  # how long to wait for another migrator, and to try a file again
TABLE_LOCK_TIMEOUT_S = 1  # how long a file may make everybody wait who needs the same table
PAUSE_S = 0.2  # between its attempts: whoever had to wait behind it gets on
LOCK_KEY = 7_265_746_169  # any number that all our migrators share; advisory locks are per database

_INDEX = re.compile(
    r"(?:\s*--[^\n]*\n)*\s*CREATE\s+(UNIQUE\s+)?INDEX\s+CONCURRENTLY\s+(\w+)\s+ON\s+(\w+)\s*([^;]+?)\s*;?\s*",
    re.IGNORECASE,
)
_APPLIED = "SELECT version, name, checksum FROM schema_migrations ORDER BY version"

# Partitions of a table that have no part of an index yet.
_WITHOUT_PART = """
SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = %s::regclass AND NOT EXISTS (
    SELECT FROM pg_index part JOIN pg_inherits whole ON whole.inhrelid = part.indexrelid
    WHERE part.indrelid = c.oid AND whole.inhparent = %s::regclass)
ORDER BY 1
"""
NAME_MAX = 63  # bytes

P = ParamSpec("P")
T = TypeVar("T")
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


class Index(NamedTuple):
    """An index to be made concurrently."""

    unique: bool
    name: str
    table: str
    what: str  # columns, and what may follow them

    def statement(self, how: str) -> sql.SQL:
        unique = "UNIQUE " if self.unique else ""
        return sql.SQL(f"CREATE {unique}INDEX {how} {self.what}")


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
        connection.execute(set_all({**SESSION, "lock_timeout": f"{LOCK_TIMEOUT_S}s", "statement_timeout": "0"}))
        yield connection


def migrate(connection: psycopg.Connection, directory: Path) -> list[str]:
    """Apply what is missing, each file in a transaction of its own, if it can be in one; returns the names applied.

    Each time, what everybody may do in a new database is taken away: a dump does not tell of it.

    Raises:
        MigrationError: an applied file was changed or is gone, or somebody holds a lock too long.
        psycopg.Error: a file failed; it left nothing behind, or an index that the next `migrate` makes again.
    """
    try:
        connection.execute("SELECT pg_advisory_lock(%s)", [LOCK_KEY])
    except psycopg.errors.LockNotAvailable:
        raise MigrationError(f"another migrator has held the lock for {LOCK_TIMEOUT_S} s") from None
    connection.execute(set_all({"lock_timeout": f"{TABLE_LOCK_TIMEOUT_S}s"}))
    applied = _giving_way("schema_migrations", _begin, connection)
    missing = _missing(read(directory), applied, connection.info)
    _giving_way("temporary objects", _forbid_temporary_objects, connection)
    for migration in missing:
        if index := _INDEX.fullmatch(migration.statements):
            unique, name, table, what = index.groups()
            _make_index(connection, Index(bool(unique), name, table, what))
            _giving_way(migration.name, _note, connection, migration)
        else:
            _giving_way(migration.name, _apply, connection, migration)
        log.info("migration applied", name=migration.name)
    return [migration.name for migration in missing]


def migrate_chain(url: str, directory: Path, settings_table: str, time_zone: str) -> None:
    """Bring a database up to date, and fix the chain's time zone, which is in that table, the first time.

    Raises:
        MigrationError: as `migrate`, and `require_time_zone`.
        psycopg.Error: a file failed; it left nothing behind.
    """
    table = sql.Identifier(settings_table)
    with connect(url) as connection:
        migrate(connection, directory)
        connection.execute(
            sql.SQL("INSERT INTO {} (time_zone) VALUES (%s) ON CONFLICT DO NOTHING").format(table), [time_zone]
        )
        row = connection.execute(sql.SQL("SELECT time_zone FROM {}").format(table)).fetchone()
    assert row is not None  # inserted above, if not before
    require_time_zone(time_zone, row[0])


def require_time_zone(asked: str, stored_zone: str) -> None:
    """Business days are cut already: another zone would move sales to other days.

    Raises:
        MigrationError: the zones differ.
    """
    if asked != stored_zone:
        raise MigrationError(
            f"BUSINESS_TIME_ZONE is {asked}, but the database was set up with {stored_zone}; it cannot be changed"
        )


def _giving_way(what: str, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do a step that waits for locks a second at most, again and again.

    Raises:
        MigrationError: it never got them.
    """
    until = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            return step(*args, **kwargs)
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as error:
            if time.monotonic() > until:
                raise MigrationError(f"{what}: somebody has held a table for {LOCK_TIMEOUT_S} s") from error
            log.info("a table is in use; the migration is tried again", name=what)
            time.sleep(PAUSE_S)


def _begin(connection: psycopg.Connection) -> list[Applied]:
    """What was applied, perhaps nothing ever."""
    connection.execute(
        "CREATE TABLE IF NOT EXISTS schema_migrations (version int PRIMARY KEY, name text NOT NULL,"
        " checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
    )
    return [Applied(*row) for row in connection.execute(_APPLIED)]


def _apply(connection: psycopg.Connection, migration: Migration) -> None:
    with connection.transaction():
        connection.execute(migration.statements)
        _note(connection, migration)


def _note(connection: psycopg.Connection, migration: Migration) -> None:
    connection.execute(
        "INSERT INTO schema_migrations (version, name, checksum) VALUES (%s, %s, %s)",
        [migration.version, migration.name, migration.checksum],
    )


def _make_index(connection: psycopg.Connection, index: Index) -> None:
    """Make it, or what is missing of it.

    Of a partitioned table it is first one that has no parts; partitions that come from then on have theirs.
    """
    kind = connection.execute("SELECT relkind = 'p' FROM pg_class WHERE oid = %s::regclass", [index.table]).fetchone()
    if kind != (True,):
        _giving_way(index.name, _make_concurrently, connection, index)
        return
    whole = index.statement(f"IF NOT EXISTS {index.name} ON ONLY {index.table}")
    _giving_way(index.name, connection.execute, whole)
    for (partition,) in connection.execute(_WITHOUT_PART, [index.table, index.name]).fetchall():
        part = index._replace(name=f"{partition}_{index.name}"[:NAME_MAX], table=partition)
        _giving_way(part.name, _make_concurrently, connection, part)
        attach = sql.SQL("ALTER INDEX {} ATTACH PARTITION {}").format(
            sql.Identifier(index.name), sql.Identifier(part.name)
        )
        _giving_way(part.name, connection.execute, attach)


def _make_concurrently(connection: psycopg.Connection, index: Index) -> None:
    """Nobody waits behind this, so it may wait for others: for all transactions that were there before."""
    valid = connection.execute(
        "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(%s)", [index.name]
    ).fetchone()
    if valid == (True,):
        return
    connection.execute("SET lock_timeout = 0")
    try:
        if valid:  # half an index, of an attempt that was stopped
            connection.execute(sql.SQL("DROP INDEX CONCURRENTLY {}").format(sql.Identifier(index.name)))
        connection.execute(index.statement(f"CONCURRENTLY {index.name} ON {index.table}"))
    finally:
        if not connection.broken:
            connection.execute(set_all({"lock_timeout": f"{TABLE_LOCK_TIMEOUT_S}s"}))


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
