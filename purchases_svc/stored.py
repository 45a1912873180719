"""What is stored, read back. Every function takes the connection and commits nothing."""

import datetime
from collections.abc import AsyncGenerator, Iterator, Sequence
from functools import cache
from typing import Any, LiteralString, NamedTuple
from zoneinfo import ZoneInfo

from chassis.migrate import MigrationError
from chassis.postgres import Connection, make_durable
from chassis.wire import parse_cents
from chassis.zones import business_day
from purchases_svc.sale import EARLIEST, Item, Purchase, Sale

ROLE = "purchases_service"  # that the service acts as; see the migrations

ITEMS_PER_PAGE_MAX = 50_000  # a page of the biggest purchases would not fit into a message

NEWEST_AHEAD = datetime.timedelta(days=400)  # no purchase is later: a year ahead, and what clocks differ
DAY = datetime.timedelta(days=1)
EXPORT_CHUNK = 200  # purchases fetched at a time; their items come with them

_COLUMNS: LiteralString = """
    p.purchase_id::text, p.event_id::text, p.created_at, p.idempotency_key::text, p.receipt_id, p.branch_id,
    p.cashier_id, p.pos_id, p.customer_id::text, p.purchase_time, p.business_day, p.total_amount::text, p.item_count
"""


Window = tuple[datetime.datetime, datetime.datetime]  # from, up to


class ControlTotals(NamedTuple):
    """Sums over the purchases of one branch on one business day; `revenue` is an exact decimal as text."""

    day: datetime.date
    branch_id: int
    purchase_count: int
    purchase_with_customer_count: int
    item_count: int
    revenue: str


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
        f"SELECT {_COLUMNS} FROM purchases p"
        " WHERE p.purchase_id = ANY(%s::uuid[]) AND p.purchase_time BETWEEN %s AND %s",
        [[purchase_id for purchase_id, _ in held], min(times), max(times)],
    )
    found = await _with_items(connection, await cursor.fetchall())
    return {purchase.sale.idempotency_key: purchase for purchase in found}


async def months(connection: Connection) -> set[datetime.date]:
    """The months that have their partition, by their first days."""
    cursor = await connection.execute(
        "SELECT to_date(right(child.relname, 7), 'YYYY_MM') FROM pg_inherits"
        " JOIN pg_class AS child ON child.oid = inhrelid WHERE inhparent = 'purchases'::regclass"
    )
    return {month for (month,) in await cursor.fetchall()}


async def held_customers(connection: Connection, customer_ids: Sequence[str]) -> set[str]:
    """Those of the customers whose rows somebody holds, so that a sale to them has to wait."""
    cursor = await connection.execute("SELECT held_customers(%s::uuid[])::text", [list(customer_ids)])
    return {customer_id for (customer_id,) in await cursor.fetchall()}


async def by_id(connection: Connection, purchase_id: str, branch_id: int | None = None) -> Purchase | None:
    """A purchase, if it is that branch's, should one be given. Its id tells the millisecond of its time, and so the one
    partition to look into."""
    milliseconds = int(purchase_id[:8] + purchase_id[9:13], 16)
    cursor = await connection.execute(
        f"SELECT {_COLUMNS} FROM purchases p WHERE p.purchase_id = %(id)s"
        " AND p.purchase_time >= to_timestamp(%(ms)s / 1000.0)"
        " AND p.purchase_time < to_timestamp((%(ms)s + 1) / 1000.0)"
        " AND (%(branch_id)s::int IS NULL OR p.branch_id = %(branch_id)s::int)",
        {"id": purchase_id, "ms": milliseconds, "branch_id": branch_id},
    )
    found = await _with_items(connection, await cursor.fetchall())
    return found[0] if found else None


def windows_back(first: datetime.datetime, end: datetime.datetime) -> Iterator[Window]:
    """The time from `first` up to `end`, the latest part first: a year, then twice as long each time.

    Whoever asks for what is new looks into few partitions, however many there are; who has to look at them all does
    so in a few steps.
    """
    year = datetime.timedelta(days=366)
    length = max(end - (datetime.datetime.now(datetime.UTC) - year), year)  # what is to come has few months, if any
    while end > first:
        start = max(end - length, first) if end - first > length else first
        yield start, end
        end, length = start, 2 * length


def windows_ahead(first: datetime.date, end: datetime.date) -> Iterator[tuple[datetime.date, datetime.date]]:
    """The days from `first` up to `end`, the earliest part first, likewise."""
    length = datetime.timedelta(days=31)
    while first < end:
        last = first + length if end - first > length else end
        yield first, last
        first, length = last, 2 * length


def around(first: datetime.date, last: datetime.date) -> dict[str, datetime.datetime]:
    """Times between which all sales of these business days lie, in any time zone: by them, PostgreSQL finds the
    partitions before it runs the query, and does not open the others. It needs plain values for that.
    """
    midnight = datetime.time(tzinfo=datetime.UTC)
    return {
        "from": datetime.datetime.combine(max(first, datetime.date.min + DAY) - DAY, midnight),
        "to": datetime.datetime.combine(min(last, datetime.date.max - 2 * DAY) + 2 * DAY, midnight),
    }


async def page(
    connection: Connection,
    *,
    limit: int,
    before: tuple[datetime.datetime, str] | None,
    branch_id: int | None,
    customer_id: str | None,
    start: datetime.datetime | None,
    end: datetime.datetime | None,
) -> tuple[list[Purchase], bool]:
    """Purchases by time, the latest first, from `before` on; and whether there are more.

    The page is shorter than `limit` where purchases have so many items that they would not fit into a message.
    """
    conditions: list[LiteralString] = ["p.purchase_time >= %(from)s AND p.purchase_time < %(to)s"]
    if branch_id is not None:
        conditions.append("p.branch_id = %(branch_id)s")
    if customer_id is not None:
        conditions.append("p.customer_id = %(customer_id)s")
    newest = max(datetime.datetime.now(datetime.UTC), EARLIEST) + NEWEST_AHEAD
    if before is not None:
        conditions.append("(p.purchase_time, p.purchase_id) < (%(before_time)s, %(before_id)s)")
        newest = min(newest, before[0] + datetime.timedelta.resolution)
    rows: list[tuple[Any, ...]] = []
    for first, last in windows_back(max(start or EARLIEST, EARLIEST), min(end or newest, newest)):
        cursor = await connection.execute(
            f"SELECT {_COLUMNS} FROM purchases p WHERE {' AND '.join(conditions)}"
            " ORDER BY p.purchase_time DESC, p.purchase_id DESC LIMIT %(limit)s",
            {
                "from": first,
                "to": last,
                "branch_id": branch_id,
                "customer_id": customer_id,
                "before_time": before and before[0],
                "before_id": before and before[1],
                "limit": limit + 1 - len(rows),
            },
            prepare=False,  # planned for this very range: then only its partitions are looked at
        )
        rows += await cursor.fetchall()
        if len(rows) > limit:
            break
    fitting, items = 0, 0
    for row in rows[:limit]:
        items += row[-1]
        if fitting and items > ITEMS_PER_PAGE_MAX:
            break
        fitting += 1
    return await _with_items(connection, rows[:fitting]), len(rows) > fitting


async def export_day(
    connection: Connection, day: datetime.date, customer_ids: Sequence[str]
) -> AsyncGenerator[Purchase, None]:
    """The purchases of one business day by time, all from one snapshot; only those customers' if there are any."""
    async with connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        async with connection.cursor(name="export") as cursor:
            await cursor.execute(
                f"SELECT {_COLUMNS} FROM purchases p"
                " WHERE p.business_day = %(day)s"
                "   AND p.purchase_time >= %(from)s AND p.purchase_time < %(to)s"
                "   AND (%(everybody)s OR p.customer_id = ANY(%(customer_ids)s::uuid[]))"
                " ORDER BY p.purchase_time, p.purchase_id",
                {
                    "day": day,
                    **around(day, day),
                    "everybody": not customer_ids,
                    "customer_ids": list(customer_ids),
                },
            )
            while rows := await cursor.fetchmany(EXPORT_CHUNK):
                for purchase in await _with_items(connection, rows):
                    yield purchase


async def _with_items(connection: Connection, rows: Sequence[tuple[Any, ...]]) -> list[Purchase]:
    if not rows:
        return []
    ids = [row[0] for row in rows]
    times = [row[9] for row in rows]
    cursor = await connection.execute(
        "SELECT purchase_id::text, product_id, unit_price::text FROM purchase_items"
        " WHERE purchase_id = ANY(%s::uuid[]) AND purchase_time BETWEEN %s AND %s ORDER BY purchase_item_id",
        [ids, min(times), max(times)],
    )
    items: dict[str, list[Item]] = {purchase_id: [] for purchase_id in ids}
    for purchase_id, product_id, price in await cursor.fetchall():
        items[purchase_id].append(Item(product_id, _cents(price)))
    return [_purchase(row, tuple(items[row[0]])) for row in rows]


def _purchase(row: tuple[Any, ...], items: tuple[Item, ...]) -> Purchase:
    (
        purchase_id,
        event_id,
        created_at,
        key,
        receipt_id,
        branch_id,
        cashier_id,
        pos_id,
        customer_id,
        time,
        day,
        total,
        _,
    ) = row
    sale = Sale(
        key, receipt_id, branch_id, cashier_id, pos_id, customer_id, time, _cents(total), items, register_customer=False
    )
    return Purchase(purchase_id, event_id, created_at, day, sale)


def _cents(amount: str) -> int:
    """A stored amount; always two fraction digits, and a sum may be longer than what the wire takes in."""
    cents = parse_cents(amount)
    return int(amount.replace(".", "")) if cents is None else cents


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


async def control_totals(
    connection: Connection,
    *,
    first: datetime.date,
    last: datetime.date,
    branch_ids: Sequence[int],
    after: tuple[datetime.date, int] | None,
    limit: int,
) -> list[ControlTotals]:
    """Sums per business day and branch, from the purchases' own counts."""
    start = max(first, after[0]) if after else first
    cursor = await connection.execute(
        """
        SELECT business_day, branch_id, count(*), count(customer_id), sum(item_count), sum(total_amount)::text
        FROM purchases
        WHERE business_day BETWEEN %(start)s AND %(last)s
          AND purchase_time >= %(from)s AND purchase_time < %(to)s
          AND (%(all_branches)s OR branch_id = ANY(%(branch_ids)s))
          AND (business_day, branch_id) > (%(after_day)s, %(after_branch)s)
        GROUP BY business_day, branch_id ORDER BY business_day, branch_id LIMIT %(limit)s
        """,
        {
            "start": start,
            "last": last,
            **around(start, last),
            "all_branches": not branch_ids,
            "branch_ids": list(branch_ids),
            "after_day": after[0] if after else datetime.date.min,
            "after_branch": after[1] if after else 0,
            "limit": limit,
        },
        prepare=False,
    )
    return [ControlTotals(*row) for row in await cursor.fetchall()]


async def stored_range(connection: Connection) -> tuple[datetime.date, datetime.date] | None:
    """The first and the last business day with a purchase; None when there is none."""
    newest = datetime.datetime.now(datetime.UTC) + NEWEST_AHEAD
    for first, end in windows_back(EARLIEST, newest):
        cursor = await connection.execute(
            "SELECT max(business_day) FROM purchases WHERE purchase_time >= %s AND purchase_time < %s",
            [first - DAY, end],  # a sale of the next day may be a little older, where clocks were set back
            prepare=False,
        )
        ((latest,),) = await cursor.fetchall()
        if latest is not None:
            earliest = await next_day(connection, EARLIEST.date() - DAY, latest)
            return earliest or latest, latest
    return None


async def next_day(connection: Connection, day: datetime.date, last: datetime.date) -> datetime.date | None:
    """The first business day with a purchase from `day` to `last`, both inclusive."""
    for first, end in windows_ahead(day, last + DAY):
        cursor = await connection.execute(
            """
            SELECT min(business_day) FROM purchases
            WHERE business_day >= %(first)s AND business_day < %(end)s
              AND purchase_time >= %(from)s AND purchase_time < %(to)s
            """,
            {"first": first, "end": end, **around(first, end - DAY)},
            prepare=False,
        )
        ((found,),) = await cursor.fetchall()
        if found is not None:
            assert isinstance(found, datetime.date)
            return found
    return None


async def read_marks(connection: Connection, zone: ZoneInfo) -> tuple[datetime.datetime, datetime.date | None]:
    """The time by now, after whatever was read before; and the first business day of which nothing was dropped."""
    cursor = await connection.execute(
        # its default: nothing was
        "SELECT clock_timestamp(), nullif(dropped_before, '2000-01-01') FROM chain_settings"
    )
    ((read_at, dropped_before),) = await cursor.fetchall()
    return read_at, first_day_from(dropped_before, zone) if dropped_before else None


@cache
def first_day_from(month: datetime.date, zone: ZoneInfo) -> datetime.date:
    """The first business day of which no moment is before that month (UTC).

    The last moment before need not lie on the last of these days: clocks may have been set back over midnight, which
    they are at whole minutes.
    """
    start = datetime.datetime.combine(month, datetime.time(), datetime.UTC)
    before = (start - n * datetime.timedelta(minutes=1) - datetime.timedelta.resolution for n in range(24 * 60))
    return max(business_day(moment, zone) for moment in before) + datetime.timedelta(days=1)


async def customer(connection: Connection, customer_id: str) -> datetime.datetime | None:
    """When a customer was registered; None when it was not."""
    cursor = await connection.execute("SELECT created_at FROM customers WHERE customer_id = %s", [customer_id])
    row = await cursor.fetchone()
    return row[0] if row else None


async def register_customer(connection: Connection, customer_id: str) -> datetime.datetime:
    """Register a customer, or find it registered; when. Either is durable once the caller's transaction is."""
    inserted = await connection.execute(
        "INSERT INTO customers (customer_id) VALUES (%s) ON CONFLICT DO NOTHING", [customer_id]
    )  # a concurrent one waits here and is visible to the next statement
    if not inserted.rowcount:
        await make_durable(connection)
    registered = await customer(connection, customer_id)
    assert registered is not None  # customers are never deleted
    return registered


async def customers_page(
    connection: Connection, *, limit: int, after: str | None
) -> list[tuple[str, datetime.datetime]]:
    """Customers by id, from `after` on."""
    condition: LiteralString = "true" if after is None else "c.customer_id > %(after)s"
    cursor = await connection.execute(
        # Qualified: a plain `ORDER BY customer_id` means the text that is selected, and would sort all customers.
        f"SELECT c.customer_id::text, c.created_at FROM customers c WHERE {condition}"
        " ORDER BY c.customer_id LIMIT %(limit)s",
        {"after": after, "limit": limit},
    )
    return await cursor.fetchall()


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
