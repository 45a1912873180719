"""The one transaction of the write half: remember a batch's events, add the new ones to every read model.

Rows are written in the order of their keys, and tables always in the same order, so that several consumers wait for
each other and never deadlock. The few rows that every batch changes come last, so that the wait is short; where they
would be many, the batch only makes a note (`summing.py`).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from analytics_svc.ingest import event_log, quarantine, summing
from analytics_svc.ingest.announce import announce
from analytics_svc.ingest.events import EVENT_TYPE
from analytics_svc.ingest.quarantine import QuarantinedEvent
from analytics_svc.purchase import PurchaseCreated
from chassis.postgres import Connection


class Applied(NamedTuple):
    """What became of a batch."""

    counted: int
    duplicates: int
    quarantined: int  # those that were not there yet
    # Not counted, and for the quarantine:
    below_floor: list[PurchaseCreated]  # the log may have forgotten them
    conflicting: list[PurchaseCreated]  # their ids are counted with other content


async def apply(
    connection: Connection, events: Sequence[PurchaseCreated], unfit: Sequence[QuarantinedEvent]
) -> Applied:
    """Count the events that are new and quarantine the unfit ones, all in the caller's transaction.

    Its isolation must be READ COMMITTED, and this be the first that it does: see `event_log.enter`.
    """
    floor = await event_log.enter(connection)
    below_floor = [event for event in events if event.event_id < floor]
    if below_floor:
        events = [event for event in events if event.event_id >= floor]
    new, conflicting = await _remember(connection, events)
    if new:
        await fold(connection, new)
    quarantined = await quarantine.keep(connection, unfit) if unfit else 0
    if new or quarantined:
        await announce(connection, {(event.day, event.branch_id) for event in new}, counted=bool(new))
    duplicates = len(events) - len(new) - len(conflicting)
    return Applied(len(new), duplicates, quarantined, below_floor, conflicting)


async def fold(connection: Connection, new: Sequence[PurchaseCreated]) -> None:
    """Add events to every read model, whether or not they are in the log; at least one.

    No table is named with its schema: with another `search_path` it folds into the tables of that schema.
    """
    lines = _columns((event.day, event.branch_id, *item) for event in new for item in event.items)
    await _add_products(connection, lines)
    new_customers = await _add_visits(connection, [event for event in new if event.customer_id])
    await _roll_up_products(connection, lines)
    await _add_sums(connection, new, new_customers)


async def _remember(
    connection: Connection, events: Sequence[PurchaseCreated]
) -> tuple[list[PurchaseCreated], list[PurchaseCreated]]:
    """Log the events; returns those whose id was not there, each once, and those that the log knows with other content.

    Of several with one id, the first is logged.
    """
    by_id = {event.event_id: event for event in reversed(events)}
    checksums = {event_id: by_id[event_id].checksum() for event_id in sorted(by_id)}
    logged = [by_id[event_id] for event_id in checksums]
    cursor = await connection.execute(
        """
        INSERT INTO analytics_event_log
            (event_id, day, branch_id, customer_id, purchase_time, purchase_id, checksum, event_type)
        SELECT *, %s FROM unnest(
            %s::uuid[], %s::date[], %s::int[], %s::uuid[], %s::timestamptz[], %s::uuid[], %s::bigint[])
        ON CONFLICT (event_id) DO NOTHING
        RETURNING event_id::text
        """,
        [
            EVENT_TYPE,
            _array(checksums),
            _array(event.day for event in logged),
            _array(event.branch_id for event in logged),
            _array(event.customer_id or "NULL" for event in logged),
            _array(event.purchase_time.isoformat() for event in logged),
            _array(event.purchase_id or "NULL" for event in logged),
            _array(checksums.values()),
        ],
    )
    new = {event_id: by_id[event_id] for (event_id,) in await cursor.fetchall()}
    if len(new) == len(events):
        return list(new.values()), []
    cursor = await connection.execute(
        "SELECT event_id::text, checksum FROM analytics_event_log WHERE event_id = ANY (%s::uuid[])",
        [_array(checksums.keys() - new.keys())],
    )
    checksums |= dict(await cursor.fetchall())
    return list(new.values()), [event for event in events if checksums[event.event_id] not in (None, event.checksum())]


async def _add_products(connection: Connection, lines: Sequence[str]) -> None:
    await connection.execute(
        """
        INSERT INTO product_sales_daily AS stored (day, branch_id, product_id, qty_sum, revenue_sum)
        SELECT day, branch_id, product_id, sum(quantity), sum(cents) * 0.01
        FROM unnest(%s::date[], %s::int[], %s::bigint[], %s::bigint[], %s::bigint[])
            AS line (day, branch_id, product_id, quantity, cents)
        GROUP BY day, branch_id, product_id
        ORDER BY day, branch_id, product_id
        ON CONFLICT (day, branch_id, product_id) DO UPDATE SET
            qty_sum = stored.qty_sum + excluded.qty_sum,
            revenue_sum = stored.revenue_sum + excluded.revenue_sum
        """,
        lines,
    )


async def _roll_up_products(connection: Connection, lines: Sequence[str]) -> None:
    await connection.execute(
        """
        INSERT INTO product_sales_totals AS stored (branch_id, product_id, qty_sum, revenue_sum)
        SELECT branch_id, product_id, sum(quantity), sum(cents) * 0.01
        FROM unnest(%s::int[], %s::bigint[], %s::bigint[], %s::bigint[])
            AS line (branch_id, product_id, quantity, cents)
        GROUP BY branch_id, product_id
        ORDER BY branch_id, product_id
        ON CONFLICT (branch_id, product_id) DO UPDATE SET
            qty_sum = stored.qty_sum + excluded.qty_sum,
            revenue_sum = stored.revenue_sum + excluded.revenue_sum
        """,
        lines[1:],
    )
    day, _, *sold = lines
    await summing.note(connection, day, *sold)


async def _add_visits(connection: Connection, visits: Sequence[PurchaseCreated]) -> list[tuple[int, int]]:
    """Count purchases per customer; returns how many customers came for the first time: (branch or 0, count)."""
    if not visits:
        return []
    columns = _columns((event.customer_id, event.branch_id, event.purchase_time.isoformat()) for event in visits)
    # A customer whose purchases are those of this batch was not known before it.
    chain = await connection.execute(
        """
        WITH visits AS (
            SELECT customer_id, count(*) AS purchases, max(purchase_time) AS last_at
            FROM unnest(%s::uuid[], %s::int[], %s::timestamptz[]) AS visit (customer_id, branch_id, purchase_time)
            GROUP BY customer_id
        ), upserted AS (
            INSERT INTO customer_loyalty_chain AS stored (customer_id, purchases_count, last_purchase_at)
            SELECT customer_id, purchases, last_at FROM visits ORDER BY customer_id
            ON CONFLICT (customer_id) DO UPDATE SET
                purchases_count = stored.purchases_count + excluded.purchases_count,
                last_purchase_at = greatest(stored.last_purchase_at, excluded.last_purchase_at)
            RETURNING customer_id, purchases_count
        )
        SELECT 0, count(*) FROM upserted JOIN visits USING (customer_id) WHERE purchases_count = purchases
        """,
        columns,
    )
    branches = await connection.execute(
        """
        WITH visits AS (
            SELECT customer_id, branch_id, count(*) AS purchases, max(purchase_time) AS last_at
            FROM unnest(%s::uuid[], %s::int[], %s::timestamptz[]) AS visit (customer_id, branch_id, purchase_time)
            GROUP BY customer_id, branch_id
        ), upserted AS (
            INSERT INTO customer_loyalty AS stored (customer_id, branch_id, purchases_count, last_purchase_at)
            SELECT customer_id, branch_id, purchases, last_at FROM visits ORDER BY customer_id, branch_id
            ON CONFLICT (customer_id, branch_id) DO UPDATE SET
                purchases_count = stored.purchases_count + excluded.purchases_count,
                last_purchase_at = greatest(stored.last_purchase_at, excluded.last_purchase_at)
            RETURNING customer_id, branch_id, purchases_count
        )
        SELECT branch_id, count(*) FROM upserted JOIN visits USING (customer_id, branch_id)
        WHERE purchases_count = purchases
        GROUP BY branch_id
        """,
        columns,
    )
    return [*await chain.fetchall(), *await branches.fetchall()]


async def _add_sums(
    connection: Connection, new: Sequence[PurchaseCreated], new_customers: Sequence[tuple[int, int]]
) -> None:
    columns = _columns(
        (
            event.day,
            event.branch_id,
            event.cents,
            sum(item.quantity for item in event.items),
            int(bool(event.customer_id)),
        )
        for event in new
    )
    await connection.execute(
        """
        INSERT INTO daily_sales_by_branch AS stored
            (day, branch_id, revenue_sum, items_sum, purchases_count, purchases_with_customer_count)
        SELECT day, branch_id, sum(cents) * 0.01, sum(items), count(*), sum(with_customer)
        FROM unnest(%s::date[], %s::int[], %s::bigint[], %s::bigint[], %s::bigint[])
            AS purchase (day, branch_id, cents, items, with_customer)
        GROUP BY day, branch_id
        ORDER BY day, branch_id
        ON CONFLICT (day, branch_id) DO UPDATE SET
            revenue_sum = stored.revenue_sum + excluded.revenue_sum,
            items_sum = stored.items_sum + excluded.items_sum,
            purchases_count = stored.purchases_count + excluded.purchases_count,
            purchases_with_customer_count
                = stored.purchases_with_customer_count + excluded.purchases_with_customer_count
        """,
        columns,
    )
    # From here on, the chain is the grouping set without a branch, and branch 0 where a table has both.
    await connection.execute(
        """
        INSERT INTO monthly_sales_by_branch AS stored
            (branch_id, month, revenue_sum, items_sum, purchases_count, purchases_with_customer_count)
        SELECT coalesce(branch_id, 0), month, sum(cents) * 0.01, sum(items), count(*), sum(with_customer)
        FROM unnest(%s::date[], %s::int[], %s::bigint[], %s::bigint[], %s::bigint[])
                AS purchase (day, branch_id, cents, items, with_customer),
            date(date_trunc('month', day::timestamp)) AS month
        GROUP BY GROUPING SETS ((branch_id, month), (month))
        ORDER BY grouping(branch_id), branch_id, month
        ON CONFLICT (branch_id, month) DO UPDATE SET
            revenue_sum = stored.revenue_sum + excluded.revenue_sum,
            items_sum = stored.items_sum + excluded.items_sum,
            purchases_count = stored.purchases_count + excluded.purchases_count,
            purchases_with_customer_count
                = stored.purchases_with_customer_count + excluded.purchases_with_customer_count
        """,
        columns,
    )
    day, _, *sums = columns
    await connection.execute(
        """
        INSERT INTO daily_sales_of_chain AS stored
            (day, revenue_sum, items_sum, purchases_count, purchases_with_customer_count)
        SELECT day, sum(cents) * 0.01, sum(items), count(*), sum(with_customer)
        FROM unnest(%s::date[], %s::bigint[], %s::bigint[], %s::bigint[])
            AS purchase (day, cents, items, with_customer)
        GROUP BY day
        ORDER BY day
        ON CONFLICT (day) DO UPDATE SET
            revenue_sum = stored.revenue_sum + excluded.revenue_sum,
            items_sum = stored.items_sum + excluded.items_sum,
            purchases_count = stored.purchases_count + excluded.purchases_count,
            purchases_with_customer_count
                = stored.purchases_with_customer_count + excluded.purchases_with_customer_count
        """,
        [day, *sums],
    )
    await connection.execute(
        """
        INSERT INTO sales_totals AS stored
            (branch_id, revenue_sum, items_sum, purchases_count, purchases_with_customer_count, unique_customers_count)
        SELECT branch_id, revenue, items, purchases, with_customer, coalesce(new_customers, 0)
        FROM (
            SELECT coalesce(branch_id, 0), sum(cents) * 0.01, sum(items), count(*), sum(with_customer)
            FROM unnest(%s::int[], %s::bigint[], %s::bigint[], %s::bigint[])
                AS purchase (branch_id, cents, items, with_customer)
            GROUP BY GROUPING SETS ((branch_id), ())
        ) AS added (branch_id, revenue, items, purchases, with_customer)
        LEFT JOIN unnest(%s::int[], %s::bigint[]) AS came (branch_id, new_customers) USING (branch_id)
        ORDER BY branch_id = 0, branch_id
        ON CONFLICT (branch_id) DO UPDATE SET
            revenue_sum = stored.revenue_sum + excluded.revenue_sum,
            items_sum = stored.items_sum + excluded.items_sum,
            purchases_count = stored.purchases_count + excluded.purchases_count,
            purchases_with_customer_count
                = stored.purchases_with_customer_count + excluded.purchases_with_customer_count,
            unique_customers_count = stored.unique_customers_count + excluded.unique_customers_count
        """,
        [*columns[1:], [branch for branch, _ in new_customers], [count for _, count in new_customers]],
    )


def _columns(rows: Iterable[Sequence[object]]) -> list[str]:
    """The rows as one array a column."""
    return [_array(column) for column in zip(*rows, strict=True)]


def _array(values: Iterable[object]) -> str:
    """PostgreSQL's text form of an array, for values that need no quotes: numbers, days, times, UUIDs.

    Far cheaper than to have the driver adapt the values one by one.
    """
    return "{" + ",".join(map(str, values)) + "}"
