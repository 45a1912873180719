"""The purchases database itself: keys, partitions, roles, migrations."""

import asyncio
import datetime
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
from prometheus_client import REGISTRY

import purchases_svc.__main__ as purchases
from chassis import migrate
from deploy.local.machine import wait_until
from purchases_svc.partitions import Partitions
from purchases_svc.settings import MigrateSettings
from tests.conftest import ROOT, WAIT_S, pool

SPECIFIED_INDEXES = [
    ("purchases", "(branch_id, purchase_time)"),
    ("purchases", "(purchase_time)"),
    ("purchase_items", "(purchase_id)"),
    ("purchase_items", "(product_id, purchase_id)"),
    ("outbox_events", "(created_xid, event_id)"),
]


async def test_metrics_tell_how_far_partitions_reach(purchases_db: str) -> None:
    """As the database has them: the last partition that is there ends that many days from now."""
    async with pool(purchases_db, "purchases_service") as opened:
        assert await Partitions(opened).look_ahead()
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    with psycopg.connect(purchases_db) as connection:
        rows = connection.execute("SELECT inhrelid::regclass::text FROM pg_inherits").fetchall()
    there = {name for (name,) in rows}
    for table, form in (("purchases", "purchases_%Y_%m"), ("outbox_events", "outbox_events_%Y_%m_%d")):
        told = REGISTRY.get_sample_value("purchases_partitions_ahead_days", {"table": table})
        assert told and told > 2.9
        end = (now + told * day + datetime.timedelta(hours=1)).date()
        assert f"{end - day:{form}}" in there and f"{end:{form}}" not in there


def test_indexes_of_the_specification(purchases_db: str) -> None:
    """Every index that was asked for is there, and so is one row per product on each month."""
    with psycopg.connect(purchases_db) as connection:
        connection.execute("SELECT ensure_purchases_month('2026-03-01')")
        rows = connection.execute("SELECT tablename, indexdef FROM pg_indexes WHERE schemaname = 'public'").fetchall()
    for table, columns in SPECIFIED_INDEXES:
        assert any(t == table and d.endswith(f"USING btree {columns}") for t, d in rows), (table, columns)
    assert any(
        t == "purchase_items_2026_03" and "UNIQUE" in d and d.endswith("(purchase_id, product_id)") for t, d in rows
    )


@pytest.mark.parametrize(
    ("role", "statement"),
    [
        ("purchases_relay", "SELECT FROM purchases"),
        ("purchases_relay", "SELECT FROM customers"),
        ("purchases_relay", "DELETE FROM outbox_events"),
        ("purchases_relay", "INSERT INTO outbox_events DEFAULT VALUES"),
        ("purchases_relay", "UPDATE outbox_events SET payload_json = '{}'"),
        ("purchases_relay", "SELECT ensure_purchases_month('2026-03-01')"),
        ("purchases_relay", "CREATE TABLE mine ()"),
        ("purchases_service", "CREATE TABLE mine ()"),
        ("purchases_service", "DROP TABLE customers"),
        ("purchases_service", "UPDATE purchases SET total_amount = 0"),
        ("purchases_service", "DELETE FROM purchases"),
        ("purchases_service", "DELETE FROM idempotency_keys"),
        ("purchases_service", "UPDATE outbox_events SET status = 'SENT'"),
        ("purchases_service", "TRUNCATE purchase_items"),
    ],
)
async def test_roles_may_do_their_job_only(purchases_db: str, role: str, statement: str) -> None:
    """No process has a right that its job does not need; none may run DDL."""
    async with pool(purchases_db, role) as opened, opened.connection() as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await connection.execute(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT ensure_purchases_month('2026-03-02')",
        "SELECT ensure_purchases_month('1999-12-01')",
        "SELECT ensure_purchases_month('2100-01-01')",
        "SELECT ensure_outbox_day('1999-12-31')",
        "SELECT ensure_outbox_day('2100-01-01')",
    ],
)
async def test_partitions_keep_within_limits(purchases_db: str, statement: str) -> None:
    """The functions that may create tables do so only for months and days that can be."""
    async with pool(purchases_db, "purchases_service") as opened, opened.connection() as connection:
        with pytest.raises(psycopg.errors.DatetimeFieldOverflow):
            await connection.execute(statement)


async def test_partitions_from_several_places_at_once(purchases_db: str) -> None:
    """Ten services that need the same months at the same moment all get them."""
    months = [datetime.date(2026, month, 1) for month in (1, 2, 3)]
    days = [datetime.date(2026, 11, day) for day in (1, 2, 3)]
    async with pool(purchases_db, "purchases_service", size=10) as opened:
        await asyncio.gather(*(Partitions(opened).ensure(months, days) for _ in range(10)))
        async with opened.connection() as connection:
            cursor = await connection.execute(
                "SELECT count(*) FROM pg_inherits WHERE inhparent = 'purchases'::regclass"
            )
            assert await cursor.fetchone() == (3,)


async def test_items_and_purchases_are_bound(purchases_db: str) -> None:
    """The database refuses a line without its purchase, a second line of a product, and two units in a line."""
    async with pool(purchases_db, "purchases_service") as opened, opened.connection() as connection:
        await connection.execute("SELECT ensure_purchases_month('2026-03-01')")
        purchase = "'019ca8d7-2d00-73e5-9c29-281a86949936', '2026-03-01 10:00Z'"
        insert = "INSERT INTO purchase_items (purchase_id, purchase_time, product_id, qty, unit_price, line_total)"
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            await connection.execute(f"{insert} VALUES ({purchase}, 1, 1, 5, 5)")
        await connection.execute(
            "INSERT INTO purchases (purchase_id, purchase_time, business_day, receipt_id, idempotency_key, branch_id,"
            f" cashier_id, pos_id, total_amount, item_count, event_id) VALUES ({purchase}, '2026-03-01', 'R',"
            " gen_random_uuid(), 1, 1, 'P', 5, 1, gen_random_uuid())"
        )
        await connection.execute(f"{insert} VALUES ({purchase}, 1, 1, 5, 5)")
        with pytest.raises(psycopg.errors.UniqueViolation):
            await connection.execute(f"{insert} VALUES ({purchase}, 1, 1, 5, 5)")
        with pytest.raises(psycopg.errors.CheckViolation):
            await connection.execute(f"{insert} VALUES ({purchase}, 2, 2, 5, 10)")


def migrate_from(url: str, directory: Path) -> list[str]:
    with migrate.connect(url) as connection:
        return migrate.migrate(connection, directory)


def test_migrating_again_changes_nothing(purchases_db: str) -> None:
    """Migrations are applied once."""
    assert migrate_from(purchases_db, purchases.MIGRATIONS) == []


def test_failed_migration_leaves_nothing(purchases_db: str, tmp_path: Path) -> None:
    """A file is applied whole or not at all."""
    copy_migrations(tmp_path)
    (tmp_path / "0099_half.sql").write_text("CREATE TABLE half (); SELECT 1/0")
    with pytest.raises(psycopg.errors.DivisionByZero):
        migrate_from(purchases_db, tmp_path)
    with psycopg.connect(purchases_db) as connection:
        assert connection.execute("SELECT to_regclass('half')").fetchone() == (None,)


def copy_migrations(directory: Path) -> None:
    for path in purchases.MIGRATIONS.glob("*.sql"):
        shutil.copy(path, directory)


def test_migration_gives_way_to_sales(purchases_db: str, tmp_path: Path) -> None:
    """While somebody uses the table, the migration does not stand in the way of who comes next, but tries again."""
    directory = tmp_path / "migrations"
    shutil.copytree(purchases.MIGRATIONS, directory)
    (directory / "9000_wider.sql").write_text("ALTER TABLE customers ADD COLUMN wider int")
    wait = "SELECT count(*) FROM pg_locks WHERE relation = 'customers'::regclass AND NOT granted"
    with (
        psycopg.connect(purchases_db) as reader,
        psycopg.connect(purchases_db, autocommit=True) as till,
        migrate.connect(purchases_db) as connection,
        ThreadPoolExecutor(1) as aside,
    ):
        reader.execute("SELECT FROM customers")
        till.execute("SET lock_timeout = '5s'")  # by PostgreSQL's clock; a migration waits one
        migrating = aside.submit(migrate.migrate, connection, directory)
        for _ in range(2):  # it waits, gives way, and waits again
            assert wait_until(lambda: till.execute(wait).fetchone() == (1,), WAIT_S)
            # Behind the migration's wait: without its end, this would wait as long as the reader reads.
            till.execute("INSERT INTO customers VALUES (gen_random_uuid())")
        assert not migrating.done()
        reader.rollback()
        assert migrating.result(WAIT_S) == ["9000_wider"]


def test_first_statements_give_way_too(purchases_db: str) -> None:
    """What every `migrate` does waits for nobody longer than its files do."""
    wait = "SELECT count(*) FROM pg_locks WHERE relation = 'schema_migrations'::regclass AND NOT granted AND pid = %s"
    with (
        migrate.connect(purchases_db) as connection,
        ThreadPoolExecutor(1) as aside,
        psycopg.connect(purchases_db) as holder,
        psycopg.connect(purchases_db, autocommit=True) as looking,
    ):
        holder.execute("LOCK TABLE schema_migrations IN ACCESS EXCLUSIVE MODE")
        migrating = aside.submit(migrate.migrate, connection, purchases.MIGRATIONS)

        def waits() -> bool:
            return looking.execute(wait, [connection.info.backend_pid]).fetchone() == (1,)

        assert wait_until(waits, WAIT_S)  # it waits, gives way, and waits again
        assert wait_until(lambda: not waits(), WAIT_S)
        assert wait_until(waits, WAIT_S)
        holder.rollback()
        assert migrating.result(WAIT_S) == []


INDEXES = {
    "customers": "CREATE INDEX CONCURRENTLY customers_twice ON customers (customer_id, customer_id);",
    "receipts": "-- Why.\nCREATE UNIQUE INDEX CONCURRENTLY receipts_twice\n  ON receipts (business_day, purchase_id)",
}
WRITES = {
    "customers": "INSERT INTO customers VALUES (gen_random_uuid())",
    "receipts": "INSERT INTO {} SELECT 1, 'P', '2026-03-05', gen_random_uuid()::text, gen_random_uuid(),"
    " '2026-03-05 12:00Z'",
}


@pytest.mark.parametrize("table", INDEXES)
def test_index_of_a_table_in_use(purchases_db: str, tmp_path: Path, table: str) -> None:
    """An index is made while somebody writes, on all partitions; no writer waits longer than a second.

    A try that was broken off leaves an index that is not valid, and the next one makes it again.
    """
    copy_migrations(tmp_path)
    (tmp_path / "9000_index.sql").write_text(INDEXES[table])
    builds = "SELECT pid FROM pg_stat_activity WHERE query LIKE '%INDEX CONCURRENTLY%' AND wait_event_type = 'Lock'"
    built = f"SELECT indisvalid FROM pg_index WHERE indexrelid::regclass::text LIKE '%{table}_twice'"

    def build() -> list[str]:
        with migrate.connect(purchases_db) as connection:
            return migrate.migrate(connection, tmp_path)

    with (
        ThreadPoolExecutor(1) as aside,
        psycopg.connect(purchases_db, autocommit=True) as till,
        psycopg.connect(purchases_db) as slow,
    ):
        for month in ("2026-03-01", "2026-05-01"):
            till.execute("SELECT ensure_purchases_month(%s)", [month])
        slow.execute(WRITES[table].format("receipts_2026_03"))  # was there before: the index has to wait for it
        till.execute("SET lock_timeout = '1s'")
        for attempt in range(2):
            migrating = aside.submit(build)
            assert wait_until(lambda: bool(till.execute(builds).fetchall()), WAIT_S)
            for _ in range(20):
                till.execute(WRITES[table].format(table))
            if attempt == 0:
                till.execute(f"SELECT pg_terminate_backend(pid) FROM ({builds}) AS building")
                with pytest.raises(psycopg.OperationalError):
                    migrating.result(WAIT_S)
                assert (False,) in till.execute(built).fetchall()
        slow.commit()
        assert migrating.result(WAIT_S) == ["9000_index"]
        parts = till.execute(built).fetchall()
        if table == "receipts":  # February to June: those of the months around, too
            assert len(parts) == 1 + 5
            till.execute("SELECT ensure_purchases_month('2026-09-01')")  # later partitions have theirs
            assert till.execute(
                "SELECT count(*) FROM pg_inherits WHERE inhparent = 'receipts_twice'::regclass"
            ).fetchone() == (8,)
        assert {valid for (valid,) in parts} == {True}
    assert migrate_from(purchases_db, tmp_path) == []


async def test_database_of_another_history_is_refused(purchases_db: str, tmp_path: Path) -> None:
    """Files that were changed, or are gone, after they were applied: both sides name them and the database.

    A later file than ours is an upgrade's, and no trouble.
    """
    with psycopg.connect(purchases_db) as connection:
        connection.execute("INSERT INTO schema_migrations (version, name, checksum) VALUES (99, '0099_later', '')")
    copy_migrations(tmp_path)
    assert migrate_from(purchases_db, tmp_path) == []
    (tmp_path / "0001_settings.sql").write_text("SELECT 1")
    (tmp_path / "0003_outbox.sql").unlink()
    name = purchases_db.rpartition("/")[2]
    message = f"the database {name} at .*: 0001_settings was changed, 0003_outbox is gone after .* remove it"
    with pytest.raises(migrate.MigrationError, match=message):
        migrate_from(purchases_db, tmp_path)
    async with pool(purchases_db, "purchases_service") as opened, opened.connection() as connection:
        with pytest.raises(migrate.MigrationError, match=message):
            await migrate.require_current(connection, tmp_path)


@pytest.mark.parametrize("package", ["purchases_svc", "analytics_svc"])
def test_migrations_are_numbered_without_gaps(package: str) -> None:
    """Two files with one number, or a hole, are a mistake of a merge."""
    versions = [migration.version for migration in migrate.read(ROOT / package / "migrations")]
    assert versions == list(range(1, len(versions) + 1))


ODD_DEFAULTS = {
    "search_path": "elsewhere",
    "datestyle": "SQL, DMY",
    "timezone": "Asia/Kathmandu",
    "default_transaction_isolation": "serializable",
    "lock_timeout": "5ms",
}


async def test_defaults_of_the_database_change_nothing(postgres_url: str, purchases_db: str) -> None:
    """Whatever an administrator has set for a database: migrations land in `public`, and a service finds them there."""
    name = f"{purchases_db.rpartition('/')[2]}_odd"
    url = urlsplit(purchases_db)._replace(path=f"/{name}").geturl()
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
        try:
            for setting, value in ODD_DEFAULTS.items():
                admin.execute(f"ALTER DATABASE {name} SET {setting} = '{value}'")
            with psycopg.connect(url) as connection:
                connection.execute("CREATE SCHEMA elsewhere")
            purchases.migrate_database(MigrateSettings(url))
            async with pool(url, "purchases_service") as opened, opened.connection() as connection:
                await migrate.require_current(connection, purchases.MIGRATIONS)
                cursor = await connection.execute(
                    "SELECT '2026-02-01 00:00Z'::timestamptz, count(*) FROM pg_tables WHERE schemaname = 'elsewhere'"
                )
                assert await cursor.fetchone() == (datetime.datetime(2026, 2, 1, tzinfo=datetime.UTC), 0)
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def test_service_refuses_an_old_database(purchases_db: str, tmp_path: Path) -> None:
    """A service does not start on a database that lacks one of its migrations, and says which."""
    copy_migrations(tmp_path)
    (tmp_path / "0099_new.sql").write_text("SELECT 1")
    async with pool(purchases_db, "purchases_service") as opened, opened.connection() as connection:
        with pytest.raises(migrate.MigrationError, match="0099_new"):
            await migrate.require_current(connection, tmp_path)
