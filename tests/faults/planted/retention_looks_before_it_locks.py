"""Retention looks whether all events of a month are sent, and locks the month afterwards."""

import asyncio
from typing import Any

from tests.faults.planted import replace

FAULTS = ("retention",) * 8
CAUGHT_AS = {"lost", "leftover"}


def prepare(purchases: Any, analytics: Any) -> None:
    purchases.execute(
        """
        CREATE OR REPLACE FUNCTION close_purchases_month(month date, keep_months int) RETURNS void
            LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
        AS $$ BEGIN NULL; END $$
        """
    )
    (body,) = purchases.execute("SELECT pg_get_functiondef('drop_purchases_month(date, int)'::regprocedure)").fetchone()
    begin, end = body.index("    IF NOT EXISTS (SELECT FROM pg_constraint"), body.index("    FOREACH unsent_status")
    late = (
        "    PERFORM pg_sleep(0.7);\n    UPDATE chain_settings SET dropped_before = (month + interval '1 month')::date"
        " WHERE dropped_before < (month + interval '1 month')::date;\n"
    )
    body = body[:begin] + body[end:].replace("    LOCK TABLE", f"{late}    LOCK TABLE", 1)
    purchases.execute(body)


def plant() -> None:
    """A relay that is a little slow is no bug; it gives the other one time to show."""
    from relay_svc import outbox

    async def claim(*arguments: Any) -> Any:
        await asyncio.sleep(0.15)
        return await original(*arguments)

    original = replace(outbox, "claim", claim)
