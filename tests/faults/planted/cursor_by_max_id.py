"""The relay's cursor passes over transactions that were still in progress when it looked."""

from typing import Any

from tests.faults.planted import replace

FAULTS = ("till.clock",) * 12
CAUGHT_AS = {"late", "not_quiet", "lost"}  # a sweep finds them, half a minute later at most


def plant() -> None:
    from relay_svc import outbox

    def everything_in(snapshot: str) -> Any:
        return original(snapshot)._replace(in_progress=())

    original = replace(outbox, "_everything_in", everything_in)
