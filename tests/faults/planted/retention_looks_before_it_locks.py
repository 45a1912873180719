"""Retention looks whether all events of a month are sent, and locks the month afterwards."""

import time
from typing import Any

from tests.faults.planted import replace

FAULTS = ("retention",) * 8
CAUGHT_AS = {"lost", "leftover"}
SLOW_S = 3.0


def prepare(purchases: Any, analytics: Any) -> None:
    """Between the look and the lock a second passes, which sales can hit."""
    purchases.execute(
        """
        CREATE OR REPLACE FUNCTION close_purchases_month(month date) RETURNS void
            LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
        AS $$ BEGIN NULL; END $$
        """
    )
    (body,) = purchases.execute("SELECT pg_get_functiondef('drop_purchases_month(date)'::regprocedure)").fetchone()
    begin = body.index("    IF NOT EXISTS (SELECT FROM pg_constraint")
    end = body.index("    EXECUTE format('SELECT e.status FROM public.unsent_purchases()")
    late = (
        "    PERFORM pg_sleep(1);\n    UPDATE public.chain_settings"
        " SET dropped_before = (month + interval '1 month')::date"
        " WHERE dropped_before < (month + interval '1 month')::date;\n"
    )
    body = body[:begin] + body[end:].replace("    LOCK TABLE", f"{late}    LOCK TABLE", 1)
    purchases.execute(body)


def plant() -> None:
    """A relay that is slow at that moment is no bug; it lets the other one show."""
    from relay_svc import outbox

    slow_until = 0.0

    async def claim(connection: Any, limit: int, position: Any, found: Any) -> Any:
        nonlocal slow_until
        cursor = await connection.execute("SELECT FROM pg_locks WHERE relation = to_regclass('months_lock')")
        if await cursor.fetchall():
            slow_until = time.monotonic() + SLOW_S
        if time.monotonic() < slow_until:
            return outbox.Claim([], position, days_changed=False, waits_for_standby=False)
        return await original(connection, limit, position, found)

    original = replace(outbox, "claim", claim)
