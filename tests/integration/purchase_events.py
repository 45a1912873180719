"""Events for tests, what the read models must make of them, and what they hold: computed apart from the service."""

import json
import random
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import psycopg

GOLDEN = (Path(__file__).parent.parent.parent / "proto" / "events" / "purchase_created.v1.example.json").read_bytes()
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Sold(NamedTuple):
    """A purchase as an event tells it; lines are (product, quantity, unit price)."""

    lines: tuple[tuple[int, int, Decimal], ...] = ((1001, 1, Decimal("8.90")), (2007, 1, Decimal("124.70")))
    branch_id: int = 1
    customer_id: str | None = None
    purchase_time: datetime = NOON
    event_id: str = ""

    @property
    def total(self) -> Decimal:
        return sum((quantity * price for _, quantity, price in self.lines), Decimal())

    def body(self, **changes: Any) -> bytes:
        """The event's bytes, with every decimal as it is; `changes` replace fields of the event or the purchase."""
        purchase: dict[str, Any] = {
            "purchase_id": str(uuid.uuid4()),
            "receipt_id": "123456",
            "idempotency_key": str(uuid.uuid4()),
            "branch_id": self.branch_id,
            "cashier_id": 17,
            "pos_id": "POS-3",
            "purchase_time": self.purchase_time.isoformat(),
            "total_amount": self.total,
            "items": [
                {"product_id": product_id, "qty": quantity, "unit_price": price}
                for product_id, quantity, price in self.lines
            ],
        }
        if self.customer_id:
            purchase["customer_id"] = self.customer_id
        event = {
            "event_id": self.event_id,
            "event_type": "PurchaseCreated",
            "occurred_at": self.purchase_time.isoformat(),
            "purchase": purchase,
        }
        for name, value in changes.items():
            (event if name in event else purchase)[name] = value
        return dumps(event)


def sold(*prices: str, **changes: Any) -> Sold:
    """A purchase with an id of its own: one unit of product 1001, 1002, … for each price."""
    lines = tuple((1001 + n, 1, Decimal(price)) for n, price in enumerate(prices))
    defaults: dict[str, Any] = {"event_id": str(uuid.uuid4())} | ({"lines": lines} if lines else {})
    return Sold(**(defaults | changes))


def some_sales(count: int, seed: int, days: int = 3, branches: int = 3, products: int = 40) -> list[Sold]:
    """Sales of a small chain: few keys, so that they meet in every read model."""
    chance = random.Random(seed)
    customers = [str(uuid.UUID(int=chance.getrandbits(128))) for _ in range(count // 5 + 1)]
    return [
        Sold(
            lines=tuple(
                (product_id, chance.choice([1, 1, 1, 2, 7]), Decimal(chance.randrange(1, 20_000)) / 100)
                for product_id in chance.sample(range(1, products + 1), chance.randint(1, 6))
            ),
            branch_id=chance.randint(1, branches),
            customer_id=chance.choice(customers) if chance.random() < 0.7 else None,
            purchase_time=NOON
            + timedelta(seconds=chance.randrange(days * 86_400), microseconds=chance.randrange(10**6)),
            event_id=str(uuid.UUID(int=chance.getrandbits(128))),
        )
        for _ in range(count)
    ]


def dumps(value: Any) -> bytes:
    """JSON with decimals as exact numbers, which the standard library cannot write."""
    numbers: dict[str, str] = {}

    def mark(amount: Any) -> str:
        assert isinstance(amount, Decimal)
        numbers[key := f"<{uuid.uuid4()}>"] = str(amount)
        return key

    text = json.dumps(value, default=mark)
    for key, number in numbers.items():
        text = text.replace(f'"{key}"', number)
    return text.encode()


def expected(sales: Iterable[Sold], zone: str = "UTC") -> dict[str, Any]:
    """What the read models must hold after these sales, each counted once; branch 0 is the chain."""
    daily: defaultdict[Any, Counter[str]] = defaultdict(Counter)
    monthly: defaultdict[Any, Counter[str]] = defaultdict(Counter)
    products: defaultdict[Any, Counter[str]] = defaultdict(Counter)
    products_of_chain: defaultdict[Any, Counter[str]] = defaultdict(Counter)
    product_totals: defaultdict[Any, Counter[str]] = defaultdict(Counter)
    totals: defaultdict[int, Counter[str]] = defaultdict(Counter)
    visits: defaultdict[Any, list[datetime]] = defaultdict(list)
    for sale in {sale.event_id: sale for sale in sales}.values():
        day = sale.purchase_time.astimezone(ZoneInfo(zone)).date()
        month = day.replace(day=1)
        for product_id, quantity, price in sale.lines:
            sold = Counter(qty=quantity, cents=int(quantity * price * 100))
            products[day, sale.branch_id, product_id].update(sold)
            product_totals[sale.branch_id, product_id].update(sold)
            for period in (("day", day), ("month", month), ("all", date.min)):
                products_of_chain[*period, product_id].update(sold)
        sums = Counter(
            cents=int(sale.total * 100),
            items=sum(quantity for _, quantity, _ in sale.lines),
            purchases=1,
            with_customer=int(sale.customer_id is not None),
        )
        for branch_id in (sale.branch_id, 0):
            daily[day, branch_id].update(sums)
            monthly[branch_id, month].update(sums)
            totals[branch_id].update(sums)
            if sale.customer_id:
                visits[sale.customer_id, branch_id].append(sale.purchase_time)
    columns = ("cents", "items", "purchases", "with_customer")
    return {
        "daily": {key: tuple(sums[name] for name in columns) for key, sums in daily.items()},
        "monthly": {key: tuple(sums[name] for name in columns) for key, sums in monthly.items()},
        "products": {key: (sums["qty"], sums["cents"]) for key, sums in products.items()},
        "products_of_chain": {key: (sums["qty"], sums["cents"]) for key, sums in products_of_chain.items()},
        "product_totals": {key: (sums["qty"], sums["cents"]) for key, sums in product_totals.items()},
        "loyalty": {key: (len(times), max(times)) for key, times in visits.items()},
        "totals": {
            branch_id: (*(sums[name] for name in columns), sum(visit_branch == branch_id for _, visit_branch in visits))
            for branch_id, sums in totals.items()
        },
    }


READ_MODELS = {
    "daily": """
        SELECT day, branch_id, (revenue_sum * 100)::bigint, items_sum, purchases_count, purchases_with_customer_count
        FROM (SELECT * FROM daily_sales_by_branch UNION ALL SELECT day, 0, revenue_sum, items_sum, purchases_count,
            purchases_with_customer_count FROM daily_sales_of_chain) AS daily
        """,
    "monthly": """
        SELECT branch_id, month, (revenue_sum * 100)::bigint, items_sum, purchases_count, purchases_with_customer_count
        FROM monthly_sales_by_branch
        """,
    "products": "SELECT day, branch_id, product_id, qty_sum, (revenue_sum * 100)::bigint FROM product_sales_daily",
    "products_of_chain": """
        SELECT period, first_day, product_id, sum(qty)::bigint, sum(cents)::bigint FROM (
            SELECT period, first_day, product_id, qty_sum, (revenue_sum * 100)::bigint FROM product_sales_of_chain_sums
            UNION ALL
            SELECT period, first_day, product_id, quantity, line.cents
            FROM product_sales_of_chain_notes AS note,
                unnest(days, product_ids, quantities, note.cents) AS line (day, product_id, quantity, cents),
                date(date_trunc('month', day::timestamp)) AS month,
                LATERAL (VALUES ('day', day), ('month', month), ('all', '0001-01-01')) AS place (period, first_day)
        ) AS part (period, first_day, product_id, qty, cents) GROUP BY 1, 2, 3
        """,
    "product_totals": "SELECT branch_id, product_id, qty_sum, (revenue_sum * 100)::bigint FROM product_sales_totals",
    "loyalty": """
        SELECT customer_id::text, branch_id, purchases_count, last_purchase_at FROM customer_loyalty
        UNION ALL SELECT customer_id::text, 0, purchases_count, last_purchase_at FROM customer_loyalty_chain
        """,
    "totals": """
        SELECT branch_id, (revenue_sum * 100)::bigint, items_sum, purchases_count, purchases_with_customer_count,
            unique_customers_count
        FROM sales_totals
        """,
}
KEY_COLUMNS = {"daily": 2, "monthly": 2, "products": 3, "products_of_chain": 3, "product_totals": 2, "loyalty": 2}


def read_models(url: str, schema: str = "public") -> dict[str, Any]:
    """What the tables hold, in the form of `expected`."""
    found: dict[str, Any] = {}
    with psycopg.connect(url, options=f"-c search_path={schema}") as connection:
        for name, statement in READ_MODELS.items():
            width, rows = KEY_COLUMNS.get(name, 1), connection.execute(statement.encode()).fetchall()
            found[name] = {row[0] if width == 1 else tuple(row[:width]): tuple(row[width:]) for row in rows}
    return found


def query(url: str, statement: str) -> list[tuple[Any, ...]]:
    """The rows of a statement, run by the owner and committed."""
    with psycopg.connect(url) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []
