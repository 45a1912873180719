"""The relay waits for the database to call it, and never looks by itself: a call that is lost is never made good."""

from typing import Any

from tests.faults.planted import replace

FAULTS = ("postgres.backend_terminated", "line.cut", "purchases.after_commit", "purchases.after_commit", "kill")
CAUGHT_AS = {"not_quiet", "lost"}
FOREVER_S = 10_000.0


def plant() -> None:
    from relay_svc import relay, wakeup

    def init(self: Any, pool: Any, poll_every_s: float) -> None:
        original(self, pool, FOREVER_S)

    original = replace(wakeup.Wakeup, "__init__", init)
    replace(relay, "SWEEP_EVERY_S", FOREVER_S)
