"""The purchases service answers a repeat from what it reads, whether or not the standby has it."""

from tests.faults.planted import replace

FAULTS = ("standby.promoted_in_wait",) * 4
CAUGHT_AS = {"lost"}


def plant() -> None:
    from chassis.postgres import Connection
    from purchases_svc import answers

    async def make_durable(connection: Connection) -> None:
        pass

    replace(answers, "make_durable", make_durable)
