"""What a process's login plants in the database is never run, or read, by a function that runs as its owner."""

from collections.abc import Iterator
from contextlib import suppress

import psycopg
import pytest
from psycopg import sql

import purchases_svc.__main__ as purchases
from analytics_svc import database as analytics
from analytics_svc.settings import MigrateSettings as AnalyticsMigrateSettings
from purchases_svc.settings import MigrateSettings

ROLES = {
    "purchases": ("purchases_service", "purchases_relay"),
    "analytics": ("analytics_consumer", "analytics_server"),
}
LOGINS = [(kind, role) for kind, roles in ROLES.items() for role in roles]

# A month and a day that have partitions, that had them, and never; as text, years before Christ have the same digits.
DATES = ("2026-03-01", "2001-01-01", "1999-01-01", "2026-03-01 BC", "infinity", "-infinity")
ARGUMENTS = {
    "date": DATES,
    "uuid": ("00000000-0000-0000-0000-000000000000",),
    "uuid[]": ("{00000000-0000-0000-0000-000000000000}",),
    "integer": ("10",),
    "interval": ("0 s",),
}
CATALOG = {"integer": "int4", "uuid[]": "_uuid"}  # names of types that are not SQL's
PARTITIONED = ("purchases", "purchase_items", "receipts", "dropped_purchases", "outbox_events")


@pytest.fixture
def databases(purchases_db: str, analytics_db: str) -> dict[str, str]:
    """Migrated as an operator does it: a copy has not what was revoked from the original."""
    purchases.migrate_database(MigrateSettings(purchases_db))
    analytics.migrate_database(AnalyticsMigrateSettings(analytics_db))
    return {"purchases": purchases_db, "analytics": analytics_db}


@pytest.fixture
def stranger(postgres_url: str) -> Iterator[str]:
    """A login that is in no group."""
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        admin.execute("DROP ROLE IF EXISTS test_stranger")
        admin.execute("CREATE ROLE test_stranger")
        yield "test_stranger"
        admin.execute("DROP ROLE test_stranger")


@pytest.mark.parametrize("kind", ROLES)
def test_nobody_makes_temporary_objects(databases: dict[str, str], kind: str, stranger: str) -> None:
    """Neither a stranger nor a process, but for what is granted to it by name."""
    with psycopg.connect(databases[kind]) as connection:
        for role in (stranger, *ROLES[kind]):
            acl = connection.execute(
                "SELECT count(*) FROM pg_database, aclexplode(datacl)"
                " WHERE datname = current_database() AND privilege_type = 'TEMPORARY' AND grantee = %s::regrole",
                [role],
            ).fetchone()
            may = connection.execute("SELECT has_database_privilege(%s, current_database(), 'TEMP')", [role]).fetchone()
            assert may == (acl != (0,),), role
        assert connection.execute(
            "SELECT has_database_privilege(%s, current_database(), 'TEMP')", [stranger]
        ).fetchone() == (False,)


@pytest.mark.parametrize(("kind", "role"), LOGINS)
def test_owners_functions_see_nothing_planted(databases: dict[str, str], kind: str, role: str) -> None:
    """A login that has got hold of TEMPORARY plants views, functions, operators and types; none is used."""
    with psycopg.connect(databases[kind], autocommit=True) as connection:
        connection.execute("CREATE TABLE seen (who text)")
        connection.execute("GRANT INSERT ON seen TO PUBLIC")
        database = sql.Identifier(connection.info.dbname)
        connection.execute(sql.SQL("GRANT TEMPORARY ON DATABASE {} TO {}").format(database, sql.Identifier(role)))
        connection.execute(sql.SQL("SET SESSION AUTHORIZATION {}").format(sql.Identifier(role)))
        calls = _calls(connection, role)
        _plant(connection)
        for statement in calls:
            for path in ("public", "pg_temp, public", "pg_temp, pg_catalog, public"):
                connection.execute(f"SET search_path = {path}")
                with suppress(psycopg.Error):  # most arguments are nonsense
                    connection.execute(statement)
                assert connection.execute("SELECT pg_catalog.count(*) FROM pg_temp.ran").fetchone() == (0,), statement
        connection.execute("RESET SESSION AUTHORIZATION")
        assert connection.execute("SELECT who FROM public.seen").fetchall() == []


def _plant(connection: psycopg.Connection) -> None:
    """Whatever runs one of these as somebody else leaves a row in `seen`."""
    me = connection.execute("SELECT current_user").fetchone()
    assert me is not None
    connection.execute("CREATE TEMP TABLE ran (who text)")
    connection.execute("GRANT ALL ON ran TO PUBLIC")
    connection.execute(
        f"""
        CREATE FUNCTION pg_temp.evil() RETURNS text LANGUAGE plpgsql AS $$
        BEGIN
            IF current_user <> {sql.Literal(me[0]).as_string(connection)} THEN
                INSERT INTO pg_temp.ran VALUES (current_user);
                INSERT INTO public.seen VALUES (current_user);
            END IF;
            RETURN 'NEW';
        END $$
        """
    )
    connection.execute("GRANT EXECUTE ON FUNCTION pg_temp.evil() TO PUBLIC")
    for name in _names(connection):
        connection.execute(
            sql.SQL(
                "CREATE TEMP VIEW {} AS SELECT pg_temp.evil() AS status, pg_temp.evil() AS who, 0::oid AS oid,"
                " gen_random_uuid() AS purchase_id, gen_random_uuid() AS idempotency_key, '1'::xid8 AS created_xid"
            ).format(sql.Identifier(name))
        )
        connection.execute(sql.SQL("GRANT ALL ON {} TO PUBLIC").format(sql.Identifier(name)))
    for signature, result in (
        ("transaction_ids_realm()", "text"),
        ("outbox_day_kept_for(date)", "text"),
        ("uuid7_floor(timestamptz)", "uuid"),
        ("retention_horizon(int)", "date"),
        ("retention_horizon()", "date"),
        ("outbox_horizon()", "date"),
        ("hashtext(text)", "int"),
        ("to_regclass(text)", "regclass"),
        ("now()", "timestamptz"),
        ("format(text, VARIADIC text[])", "text"),
        ("to_char(date, text)", "text"),
        ("date_trunc(text, date)", "date"),
    ):
        connection.execute(
            f"CREATE FUNCTION pg_temp.{signature} RETURNS {result} LANGUAGE plpgsql AS"
            f" $$ BEGIN PERFORM pg_temp.evil(); RETURN NULL; END $$"
        )
    for left, right in (("date", "date"), ("uuid", "uuid"), ("text", "text"), ("xid8", "xid8")):
        connection.execute(
            f"CREATE FUNCTION pg_temp.compare({left}, {right}) RETURNS boolean LANGUAGE plpgsql AS"
            " $$ BEGIN PERFORM pg_temp.evil(); RETURN true; END $$"
        )
        for operator in ("<", ">", "=", ">=", "<=", "<>"):
            connection.execute(
                f"CREATE OPERATOR pg_temp.{operator} (FUNCTION = pg_temp.compare, LEFTARG = {left}, RIGHTARG = {right})"
            )
    for domain in ("date", "text", "uuid", "xid8", "pg_snapshot", "regclass"):
        connection.execute(f"CREATE DOMAIN pg_temp.{domain} AS text CHECK (pg_temp.evil() IS NOT NULL)")


def _names(connection: psycopg.Connection) -> set[str]:
    """All that functions could look for: what there is, and partitions that there are not."""
    rows = connection.execute("SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN"
                              " ('r', 'p', 'v')").fetchall()  # fmt: skip
    dates = [date for date in DATES if date[0].isdigit()]
    days = {date[:10].replace("-", "_") for date in dates} | {"2000_12_01", "1998_12_01", "2026_02_01", "2026_04_01"}
    suffixes = {"", *days, *(day[:7] for day in days)}
    computed = {f"{table}_{suffix}".rstrip("_") for table in PARTITIONED for suffix in suffixes}
    return ({name for (name,) in rows} | computed | {"pg_class", "pg_inherits", "pg_constraint"}) - {"seen"}


def _calls(connection: psycopg.Connection, role: str) -> list[str]:
    """Each function that runs as its owner and that the role may call, with each of the arguments."""
    found = connection.execute(
        """
        SELECT proname, oidvectortypes(proargtypes) FROM pg_proc
        WHERE prosecdef AND pronamespace = 'public'::regnamespace AND has_function_privilege(%s, oid, 'EXECUTE')
        """,
        [role],
    ).fetchall()
    calls = []
    for name, types in found:
        kinds = types.split(", ") if types else []
        for date in DATES:
            values = [date if kind == "date" else ARGUMENTS[kind][0] for kind in kinds]
            typed = [
                f"'{value}'::pg_catalog.{CATALOG.get(kind, kind)}" for value, kind in zip(values, kinds, strict=True)
            ]
            arguments = ", ".join(typed)
            calls.append(f"SELECT * FROM public.{name}({arguments})")
    assert calls or role == "analytics_server", role
    return calls
