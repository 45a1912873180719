"""The relay relies on being called and never looks by itself; and calls get lost."""

from typing import Any

from tests.faults.planted import replace

FAULTS = ("till.clock",) * 3
CAUGHT_AS = {"not_quiet", "lost"}
FOREVER_S = 10_000.0


def plant() -> None:
    from purchases_svc import relay_bell
    from relay_svc import relay, wakeup

    def init(self: Any, pool: Any, poll_every_s: float) -> None:
        original(self, pool, FOREVER_S)

    original = replace(wakeup.Wakeup, "__init__", init)
    replace(relay, "SWEEP_EVERY_S", FOREVER_S)
    # A call that is lost is no bug: whoever waits for it must look all the same.
    replace(relay_bell.RelayBell, "ring", lambda _: None)
