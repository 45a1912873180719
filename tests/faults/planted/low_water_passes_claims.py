"""The relay notes that nothing waits below a point, though another relay has events from there in hand, and may die."""

from typing import Any

from tests.faults.planted import replace

FAULTS = ("relay.after_claim",) * 6
CAUGHT_AS = {"not_quiet", "lost"}


def plant() -> None:
    from relay_svc import days, outbox, relay

    async def sweep(connection: Any, low_water: Any) -> Any:
        await original(connection, low_water)
        found = outbox._everything_in((await days.open_days(connection)).snapshot)
        await connection.execute("UPDATE outbox_low_water SET xid = %s::xid8", [str(found.xid)])
        return found

    original = replace(outbox, "sweep", sweep)
    replace(relay, "SWEEP_EVERY_S", 0.2)
