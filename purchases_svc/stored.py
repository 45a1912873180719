"""What the write path looks up. Every function takes the connection and commits nothing."""

import datetime
from collections.abc import Sequence

from chassis.migrate import MigrationError
from chassis.postgres import Connection
from purchases_svc.purchase_rows import COLUMNS, with_items
from purchases_svc.sale import Purchase, Sale

ROLE = "purchases_service"  # that the service acts as; see the migrations


async def settings(connection: Connection) -> tuple[str, bytes]:
    """The stored time zone, and the key that signs page tokens."""
    cursor = await connection.execute("SELECT time_zone, page_token_key FROM chain_settings")
    row = await cursor.fetchone()
    if row is None:
        raise MigrationError("the database has no settings: run `migrate` first")
    return row[0], row[1]


async def clock(connection: Connection) -> datetime.datetime:
    """The database's, in UTC."""
    row = await (await connection.execute("SELECT clock_timestamp()")).fetchone()
    assert row is not None
    moment: datetime.datetime = row[0]
    return moment.astimezone(datetime.UTC)


async def months(connection: Connection) -> set[datetime.date]:
    """The months that have their partition, by their first days."""
    cursor = await connection.execute(
        "SELECT to_date(right(child.relname, 7), 'YYYY_MM') FROM pg_inherits"
        " JOIN pg_class AS child ON child.oid = inhrelid WHERE inhparent = 'purchases'::regclass"
    )
    return {month for (month,) in await cursor.fetchall()}


async def by_keys(connection: Connection, keys: Sequence[str]) -> dict[str, Purchase]:
    """The purchases that hold these idempotency keys, by key."""
    cursor = await connection.execute(
        "SELECT purchase_id::text, purchase_time FROM idempotency_keys WHERE idempotency_key = ANY(%s::uuid[])",
        [list(keys)],
    )
    held = await cursor.fetchall()
    if not held:
        return {}
    # Not as a join: that looks into all partitions for each key. The range of times prunes them once.
    times = [time for _, time in held]
    cursor = await connection.execute(
        f"SELECT {COLUMNS} FROM purchases p"
        " WHERE p.purchase_id = ANY(%s::uuid[]) AND p.purchase_time BETWEEN %s AND %s",
        [[purchase_id for purchase_id, _ in held], min(times), max(times)],
    )
    found = await with_items(connection, await cursor.fetchall())
    return {purchase.sale.idempotency_key: purchase for purchase in found}


async def unknown_customers(connection: Connection, sales: Sequence[Sale]) -> set[str]:
    """Which of the sales' customers are not registered."""
    asked = {sale.customer_id for sale in sales if sale.customer_id is not None}
    if not asked:
        return set()
    cursor = await connection.execute(
        "SELECT customer_id::text FROM customers WHERE customer_id = ANY(%s::uuid[])", [list(asked)]
    )
    return asked - {customer_id for (customer_id,) in await cursor.fetchall()}


async def receipt_holders(connection: Connection, purchases: Sequence[Purchase]) -> dict[str, str]:
    """Which purchases have these ones' receipt numbers on their branch, till and business day; by the sale's key."""
    if not purchases:
        return {}
    sales = [purchase.sale for purchase in purchases]
    cursor = await connection.execute(
        """
        SELECT sale.key, r.purchase_id::text
        FROM unnest(%(keys)s::text[], %(branches)s::int[], %(tills)s::text[], %(receipts)s::text[],
                    %(days)s::date[]) AS sale(key, branch_id, pos_id, receipt_id, business_day)
        JOIN receipts r USING (branch_id, pos_id, receipt_id, business_day)
        """,
        {
            "keys": [sale.idempotency_key for sale in sales],
            "branches": [sale.branch_id for sale in sales],
            "tills": [sale.pos_id for sale in sales],
            "receipts": [sale.receipt_id for sale in sales],
            "days": [purchase.business_day for purchase in purchases],
        },
    )
    return dict(await cursor.fetchall())


async def held_customers(connection: Connection, customer_ids: Sequence[str]) -> set[str]:
    """Those of the customers whose rows somebody holds, so that a sale to them has to wait."""
    cursor = await connection.execute("SELECT held_customers(%s::uuid[])::text", [list(customer_ids)])
    return {customer_id for (customer_id,) in await cursor.fetchall()}
