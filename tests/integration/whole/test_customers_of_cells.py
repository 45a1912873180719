"""A customer whom one cell knows is known in the others, whoever is away for a while."""

import uuid
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from typing import Any

import grpc
import psycopg
import pytest

from purchases_svc import new_customers, other_cells
from retail.purchases.v1 import customers_service_pb2 as pb
from retail.purchases.v1.customers_service_pb2_grpc import CustomersServiceStub
from tests.conftest import WAIT_S, eventually, pool
from tests.integration.purchase_events import query
from tests.integration.sales import sale
from tests.integration.whole.test_two_cells import NORTH, SOUTH, World, _stub, world  # noqa: F401

ALL = "SELECT customer_id::text FROM customers ORDER BY 1"


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_cells, "ASK_EVERY_S", 0.2)
    monkeypatch.setattr(other_cells, "CUSTOMERS_AT_ONCE", 100)


async def test_customers_are_known_in_all_cells(world: World) -> None:  # noqa: F811
    many = (
        "INSERT INTO customers (customer_id, created_xid) SELECT gen_random_uuid(), NULL FROM generate_series(1, 250)"
    )
    query(world.databases["north"], many)  # from before it was noted who is new
    async with AsyncExitStack() as stack:
        north = await stack.enter_async_context(world.selling("north"))
        with_south = AsyncExitStack()
        south = await with_south.enter_async_context(world.selling("south"))
        stack.push_async_callback(with_south.aclose)
        await eventually(lambda: _alike(world, 250), "the south knows all of the north's")

        # In either, and in both at once.
        both = str(uuid.uuid4())
        for channel in (north, south):
            await _customers(channel).CreateCustomer(pb.CreateCustomerRequest(customer_id=both), timeout=WAIT_S)
        registered = sale(branch_id=SOUTH, seconds=_now(), customer_id=str(uuid.uuid4()), register_customer=True)
        await _stub(south).CreatePurchase(registered, timeout=WAIT_S)
        await _sold(north, NORTH, registered.purchase.customer_id)
        await eventually(lambda: _alike(world, 252), "both know both")

        # While one is away, the other goes on, and it learns what it has missed.
        await with_south.aclose()
        missed = [str(uuid.uuid4()) for _ in range(120)]
        for customer_id in missed:
            await _customers(north).CreateCustomer(pb.CreateCustomerRequest(customer_id=customer_id), timeout=WAIT_S)
        await _sold(north, NORTH, missed[0])
        south = await with_south.enter_async_context(world.selling("south"))
        await _sold(south, SOUTH, missed[-1])
        await eventually(lambda: _alike(world, 372), "the south knows whom it missed")

        # A position that means nothing here, as after a failover: it begins anew.
        query(world.databases["south"], "UPDATE other_cells SET customers_position = 'of another server'")
        last = str(uuid.uuid4())
        await _customers(north).CreateCustomer(pb.CreateCustomerRequest(customer_id=last), timeout=WAIT_S)
        await _sold(south, SOUTH, last)


async def test_nobody_is_passed_over(purchases_db: str) -> None:
    """In whatever order transactions commit; while one is open, those after it wait with it."""
    first, second = str(uuid.uuid4()), str(uuid.uuid4())
    async with pool(purchases_db, "purchases_service") as opened, opened.connection() as connection:

        async def listed(after: new_customers.Position | None) -> tuple[set[str], new_customers.Position]:
            found: set[str] = set()
            while True:
                async with connection.transaction():
                    page = await new_customers.page(connection, after, 1)
                found.update(customer_id for customer_id, _ in page.customers)
                after = page.position
                if page.as_of:
                    return found, after

        found, position = await listed(None)
        assert not found
        with psycopg.connect(purchases_db) as slow:
            slow.execute("INSERT INTO customers VALUES (%s)", [first])
            query(purchases_db, f"INSERT INTO customers VALUES ('{second}')")
            found, position = await listed(new_customers.parse(str(position)))
            assert not found
            slow.commit()
        found, position = await listed(position)
        assert found == {first, second}
        found, _ = await listed(position)
        assert not found
        found, _ = await listed(position._replace(realm="1.00000001.1"))
        assert found == {first, second}


async def _alike(world: World, count: int) -> bool:  # noqa: F811
    north, south = (query(world.databases[name], ALL) for name in ("north", "south"))
    return north == south and len(north) == count


async def _sold(channel: grpc.aio.Channel, branch: int, customer_id: str) -> None:
    request = sale(branch_id=branch, seconds=_now(), customer_id=customer_id)

    async def taken() -> bool:
        with suppress(grpc.aio.AioRpcError):
            return bool(await _stub(channel).CreatePurchase(request, timeout=WAIT_S))
        return False

    await eventually(taken, "the customer is known")


def _customers(channel: grpc.aio.Channel) -> Any:
    return CustomersServiceStub(channel)  # type: ignore[arg-type, unused-ignore]


def _now() -> int:
    return int(datetime.now(UTC).timestamp())
