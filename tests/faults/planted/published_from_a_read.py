"""The relay publishes what it reads, whether or not the standby has it: the till sells it again, as another event."""

from tests.faults.planted import replace

FAULTS = ("standby.promoted_in_wait",) * 4
CAUGHT_AS = {"invented", "doubled"}


def plant() -> None:
    from chassis.postgres import Connection
    from relay_svc import relay

    async def make_durable(connection: Connection) -> None:
        pass

    replace(relay, "make_durable", make_durable)
