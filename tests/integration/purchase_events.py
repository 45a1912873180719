"""Events for tests, what the read models must make of them, and what they hold: computed apart from the service."""

import json
import random
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
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
    """What the read models must hold after these sales, each counted once."""
    daily: defaultdict[Any, Counter[str]] = defaultdict(Counter)
    products: defaultdict[Any, Counter[str]] = defaultdict(Counter)
    totals: defaultdict[int, Counter[str]] = defaultdict(Counter)
    visits: defaultdict[Any, list[datetime]] = defaultdict(list)
    for sale in {sale.event_id: sale for sale in sales}.values():
        day = sale.purchase_time.astimezone(ZoneInfo(zone)).date()
        for product_id, quantity, price in sale.lines:
            products[day, sale.branch_id, product_id] += Counter(qty=quantity, cents=int(quantity * price * 100))
        sums = Counter(
            cents=int(sale.total * 100),
            items=sum(quantity for _, quantity, _ in sale.lines),
            purchases=1,
            with_customer=int(sale.customer_id is not None),
        )
        for counter in (daily[day, sale.branch_id], totals[sale.branch_id], totals[0]):
            counter.update(sums)
        if sale.customer_id:
            visits[sale.customer_id, sale.branch_id].append(sale.purchase_time)
            visits[sale.customer_id, 0].append(sale.purchase_time)
    columns = ("cents", "items", "purchases", "with_customer")
    return {
        "daily": {key: tuple(sums[name] for name in columns) for key, sums in daily.items()},
        "products": {key: (sums["qty"], sums["cents"]) for key, sums in products.items()},
        "loyalty": {key: (len(times), max(times)) for key, times in visits.items()},
        "totals": {
            branch_id: (*(sums[name] for name in columns), sum(visit_branch == branch_id for _, visit_branch in visits))
            for branch_id, sums in totals.items()
        },
    }


def read_models(url: str) -> dict[str, Any]:
    """What the tables hold, in the form of `expected`; branch 0 is the chain."""
    with psycopg.connect(url) as connection:
        daily = connection.execute(
            "SELECT day, branch_id, (revenue_sum * 100)::bigint, items_sum, purchases_count,"
            " purchases_with_customer_count FROM daily_sales_by_branch"
        ).fetchall()
        products = connection.execute(
            "SELECT day, branch_id, product_id, qty_sum, (revenue_sum * 100)::bigint FROM product_sales_daily"
        ).fetchall()
        loyalty = connection.execute(
            "SELECT customer_id::text, branch_id, purchases_count, last_purchase_at FROM customer_loyalty UNION ALL"
            " SELECT customer_id::text, 0, purchases_count, last_purchase_at FROM customer_loyalty_chain"
        ).fetchall()
        totals = connection.execute(
            "SELECT branch_id, (revenue_sum * 100)::bigint, items_sum, purchases_count,"
            " purchases_with_customer_count, unique_customers_count FROM sales_totals"
        ).fetchall()
    return {
        "daily": {tuple(row[:2]): tuple(row[2:]) for row in daily},
        "products": {tuple(row[:3]): tuple(row[3:]) for row in products},
        "loyalty": {tuple(row[:2]): tuple(row[2:]) for row in loyalty},
        "totals": {row[0]: tuple(row[1:]) for row in totals},
    }


def query(url: str, statement: str) -> list[tuple[Any, ...]]:
    """The rows of a statement, run by the owner and committed."""
    with psycopg.connect(url) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []
