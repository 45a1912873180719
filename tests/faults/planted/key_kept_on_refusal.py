"""A sale that is refused leaves its idempotency key behind."""

from typing import Any

from tests.faults.planted import replace

FAULTS = ("till.clock",) * 3
CAUGHT_AS = {"leftover", "refused", "wrong_answer"}


def plant() -> None:
    from purchases_svc import flush

    async def insert(connection: Any, purchases: Any, *more: Any) -> Any:
        refused = await original(connection, purchases, *more)
        for purchase in (purchases[n] for n in refused):
            await connection.execute(
                "INSERT INTO idempotency_keys VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
                [purchase.sale.idempotency_key, purchase.purchase_id, purchase.sale.purchase_time, purchase.event_id],
            )
        return refused

    original = replace(flush, "insert", insert)
