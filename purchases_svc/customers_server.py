"""CustomersService: requests to values, values to responses."""

from datetime import datetime
from typing import Any

from uuid_utils import uuid7

from chassis import wire
from chassis.errors import FieldReason, Violation
from chassis.shares import Shares
from purchases_svc import customers, new_customers
from purchases_svc.errors import CustomerNotFound
from purchases_svc.server import raise_if, reading, require_primary, required_uuid
from retail.purchases.v1 import customers_service_pb2 as customers_pb2
from retail.purchases.v1 import customers_service_pb2_grpc

CUSTOMERS_PER_PAGE = (50, 500)
NEW_CUSTOMERS_PER_PAGE = (500, 1_000)


class CustomersServicer(customers_service_pb2_grpc.CustomersServiceServicer):
    """`retail.purchases.v1.CustomersService`."""

    def __init__(self, shares: Shares, tokens: wire.PageTokens) -> None:
        self._shares, self._tokens = shares, tokens

    async def CreateCustomer(
        self, request: customers_pb2.CreateCustomerRequest, context: Any
    ) -> customers_pb2.CreateCustomerResponse:
        given = request.HasField("customer_id")
        customer_id = required_uuid("customer_id", request.customer_id) if given else str(uuid7())
        async with reading(self._shares, context) as connection:
            created_at = await customers.register(connection, customer_id)
        return customers_pb2.CreateCustomerResponse(customer=_customer(customer_id, created_at))

    async def GetCustomer(
        self, request: customers_pb2.GetCustomerRequest, context: Any
    ) -> customers_pb2.GetCustomerResponse:
        customer_id = required_uuid("customer_id", request.customer_id)
        async with reading(self._shares, context) as connection:
            created_at = await customers.registered_at(connection, customer_id)
        if created_at is None:
            raise CustomerNotFound(f"no customer has the id {customer_id}", metadata={"customer_id": customer_id})
        return customers_pb2.GetCustomerResponse(customer=_customer(customer_id, created_at))

    async def ListCustomers(
        self, request: customers_pb2.ListCustomersRequest, context: Any
    ) -> customers_pb2.ListCustomersResponse:
        violations: list[Violation] = []
        limit = wire.page_size(request.page_size, *CUSTOMERS_PER_PAGE, violations)
        prefix = request.customer_id_prefix
        between = customers.beginning_with(prefix) if prefix else None
        if prefix and not between:
            rule = "must be the beginning of a UUID, such as 7b0d3a52-5"
            violations.append(Violation("customer_id_prefix", rule, FieldReason.NOT_A_UUID))
        raise_if(violations)
        position = self._tokens.read(request)
        after = position[0] if position else None
        async with reading(self._shares, context, "customers") as connection:
            rows = await customers.page(connection, limit=limit + 1, after=after, between=between)
        page = rows[:limit]
        token = self._tokens.issue(request, [page[-1][0]]) if len(rows) > limit else ""
        return customers_pb2.ListCustomersResponse(customers=(_customer(*row) for row in page), next_page_token=token)

    async def ListNewCustomers(
        self, request: customers_pb2.ListNewCustomersRequest, context: Any
    ) -> customers_pb2.ListNewCustomersResponse:
        violations: list[Violation] = []
        limit = wire.page_size(request.page_size, *NEW_CUSTOMERS_PER_PAGE, violations)
        raise_if(violations)
        after = new_customers.parse(request.after_position)
        async with reading(self._shares, context, "customers") as connection:
            require_primary(connection)
            page = await new_customers.page(connection, after, limit)
        response = customers_pb2.ListNewCustomersResponse(
            customers=(_customer(*row) for row in page.customers), position=str(page.position), more=page.as_of is None
        )
        if page.as_of:
            wire.set_timestamp(response.as_of_time, page.as_of)
        return response


def _customer(customer_id: str, created_at: datetime) -> customers_pb2.Customer:
    return customers_pb2.Customer(customer_id=customer_id, create_time=wire.timestamp(created_at))
