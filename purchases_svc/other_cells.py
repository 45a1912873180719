"""Customers whom other cells know, brought here: each cell is asked for those who are new there, every few seconds.

A cell that is away is asked again; whom it knew before is known here, and nobody waits for it. Several servers of this
cell take turns.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import psycopg
import structlog
from prometheus_client import Gauge
from psycopg_pool import PoolTimeout

from chassis import grpc_client, wire
from chassis.cells import Cell, Cells
from chassis.logs import Sampled
from chassis.postgres import Pool
from chassis.tls import Credentials
from retail.purchases.v1 import customers_service_pb2 as pb
from retail.purchases.v1.customers_service_pb2_grpc import CustomersServiceStub

ASK_EVERY_S = 5.0
ASK_TIMEOUT_S = 10.0
CUSTOMERS_AT_ONCE = 1_000

KNOWN = Gauge(
    "purchases_other_cell_known_timestamp_seconds",
    "Up to when customers of another cell are known here; by that cell's clock.",
    ["cell"],
)

log = structlog.get_logger()
_away = Sampled("warning", "another cell's customers are not known anew")


class OtherCells:
    def __init__(
        self, pool: Pool, cell: str, listed: Callable[[], Cells], service_config: str, credentials: Credentials | None
    ) -> None:
        """This is `cell`, of those that are `listed`."""
        self._pool, self._cell, self._listed = pool, cell, listed
        self._service_config, self._credentials = service_config, credentials
        self._channels: dict[str, grpc.aio.Channel] = {}  # by address

    async def follow(self) -> None:
        """Until cancelled."""
        try:
            while True:
                others = [cell for cell in self._listed().by_name.values() if cell.name != self._cell]
                await asyncio.gather(*map(self._look, others))
                await asyncio.sleep(ASK_EVERY_S)
        finally:
            for channel in self._channels.values():
                await channel.close()

    async def _look(self, other: Cell) -> None:
        try:
            await self._bring(other)
        except (grpc.aio.AioRpcError, psycopg.Error, PoolTimeout) as error:
            _away(other.name, cell=other.name, error=error)

    async def _bring(self, other: Cell) -> None:
        position = await self._take_turn(other.name)
        while position is not None:
            request = pb.ListNewCustomersRequest(after_position=position, page_size=CUSTOMERS_AT_ONCE)
            try:
                reply = await self._stub(other).ListNewCustomers(request, timeout=ASK_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.INVALID_ARGUMENT or not position:
                    raise
                reply = pb.ListNewCustomersResponse(more=True)  # it is another service's: begin anew
            if not await self._store(other.name, position, reply):
                return  # another server of this cell has its turn now
            position = reply.position if reply.more else None

    def _stub(self, other: Cell) -> Any:
        if other.purchases not in self._channels:
            self._channels[other.purchases] = grpc_client.connect(
                other.purchases, self._service_config, self._credentials
            )
        return CustomersServiceStub(self._channels[other.purchases])  # type: ignore[arg-type, unused-ignore]

    async def _take_turn(self, cell: str) -> str | None:
        """The position to ask with; None while it was asked a moment ago."""
        async with self._pool.connection() as connection:
            await connection.execute("INSERT INTO other_cells (cell) VALUES (%s) ON CONFLICT DO NOTHING", [cell])
            cursor = await connection.execute(
                "SELECT extract(epoch FROM known_at)::float8 FROM other_cells WHERE cell = %s AND known_at IS NOT NULL",
                [cell],
            )
            for (known_at,) in await cursor.fetchall():
                KNOWN.labels(cell).set(known_at)
            cursor = await connection.execute(
                "UPDATE other_cells SET asked_at = clock_timestamp() WHERE cell = %(cell)s AND asked_at NOT BETWEEN"
                " clock_timestamp() - %(pause_s)s * interval '1 second' AND clock_timestamp()"
                " RETURNING customers_position",
                {"cell": cell, "pause_s": ASK_EVERY_S / 2},
            )
            rows = await cursor.fetchall()
        return rows[0][0] if rows else None

    async def _store(self, cell: str, position: str, reply: Any) -> bool:
        """Customers and position together; False when somebody else has come further meanwhile."""
        created = [wire.parse_timestamp(customer.create_time) for customer in reply.customers]
        async with self._pool.connection() as connection, connection.transaction():
            moved = await connection.execute(
                "UPDATE other_cells SET customers_position = %(new)s, asked_at = clock_timestamp(),"
                " known_at = coalesce(%(as_of)s, known_at) WHERE cell = %(cell)s AND customers_position = %(old)s",
                {
                    "cell": cell,
                    "old": position,
                    "new": reply.position,
                    "as_of": wire.parse_timestamp(reply.as_of_time) if reply.HasField("as_of_time") else None,
                },
            )
            if not moved.rowcount:
                return False
            await connection.execute(
                "INSERT INTO customers (customer_id, created_at)"
                " SELECT * FROM unnest(%s::uuid[], %s::timestamptz[]) ORDER BY 1 ON CONFLICT DO NOTHING",
                [[customer.customer_id for customer in reply.customers], created],
            )
        return True
