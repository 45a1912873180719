"""How many calls a caller may make: a bucket of tokens for each, in one number (GCRA, as networks have it)."""

import time

AT_ONCE_S = 2.0  # of calls that were not made may be made at once
CALLERS_MAX = 10_000  # remembered, 300 bytes each; more are looked through for those who have been quiet


class Rates:
    """For each caller when its calls so far will have been paid off, at so many a second."""

    def __init__(self, per_s: float) -> None:
        self._each_s = 1 / per_s
        self._paid_at: dict[str, float] = {}

    @property
    def callers(self) -> int:
        """How many are remembered."""
        return len(self._paid_at)

    def pause_s(self, caller: str, *, will_wait: bool = False) -> float:
        """0, and the call is counted; or for how many seconds the caller has to wait. If it will, the call is counted,
        too, and made then; if not, it is not."""
        now = time.monotonic()
        paid_at = max(self._paid_at.get(caller, now), now)
        pause_s = max(paid_at + self._each_s - now - AT_ONCE_S, 0.0)
        if pause_s and not will_wait:
            return pause_s
        if len(self._paid_at) >= CALLERS_MAX and caller not in self._paid_at:
            self._forget_quiet(now)
        self._paid_at[caller] = paid_at + self._each_s
        return pause_s

    def _forget_quiet(self, now: float) -> None:
        """Those who have paid are as if they had never called. Should nobody have, the first of all is let off."""
        self._paid_at = {caller: paid_at for caller, paid_at in self._paid_at.items() if paid_at > now}
        if len(self._paid_at) >= CALLERS_MAX:
            del self._paid_at[next(iter(self._paid_at))]
