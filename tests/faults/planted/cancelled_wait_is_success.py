"""Nobody heeds PostgreSQL's warning that a commit did not wait for the standby after all."""

from typing import Any

from tests.faults.planted import replace

FAULTS = ("standby.promoted_in_wait",) * 4
CAUGHT_AS = {"lost"}


def plant() -> None:
    from chassis import postgres

    def hear(self: Any, warning: Any) -> None:
        pass

    replace(postgres._Connection, "_hear", hear)
