"""A caller has so many calls a second, and twice as many at once; others have theirs."""

from types import SimpleNamespace

import pytest

from chassis import rates
from chassis.rates import AT_ONCE_S, CALLERS_MAX, Rates

PER_S = 50


class Clock:
    now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(rates, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def taken(asked: Rates, caller: str, calls: int) -> int:
    return sum(asked.pause_s(caller) == 0 for _ in range(calls))


def test_what_may_be_made_at_once_and_then_each_second(clock: Clock) -> None:
    asked = Rates(PER_S)
    assert taken(asked, "a", 1_000) == pytest.approx(PER_S * AT_ONCE_S, abs=1)
    assert taken(asked, "b", 10) == 10
    clock.now += 1
    assert taken(asked, "a", 1_000) == pytest.approx(PER_S, abs=1)


def test_the_pause_is_long_enough_and_not_longer(clock: Clock) -> None:
    asked = Rates(PER_S)
    taken(asked, "a", 1_000)
    pause_s = asked.pause_s("a")
    clock.now += pause_s * 0.9
    assert asked.pause_s("a") > 0
    clock.now += pause_s * 0.2
    assert asked.pause_s("a") == 0


def test_ten_thousand_callers_are_remembered_and_no_more(clock: Clock) -> None:
    """Those who were quiet for a while are as new ones."""
    asked = Rates(PER_S)
    for number in range(10 * CALLERS_MAX):
        asked.pause_s(f"caller {number}")
        clock.now += 0.000_1
        assert asked.callers <= CALLERS_MAX
    assert taken(asked, "caller 1", 1_000) == pytest.approx(PER_S * AT_ONCE_S, abs=1)


def test_all_at_the_same_moment_are_bounded_too(clock: Clock) -> None:
    asked = Rates(PER_S)
    for number in range(CALLERS_MAX + 10):
        asked.pause_s(f"caller {number}")
    assert asked.callers == CALLERS_MAX


def test_who_waits_waits_behind_itself(clock: Clock) -> None:
    """Messages of a stream: each later than the one before."""
    asked = Rates(PER_S)
    taken(asked, "a", 1_000)
    pauses = [asked.pause_s("a", will_wait=True) for _ in range(3)]
    assert pauses == pytest.approx([pauses[0] + n / PER_S for n in range(3)])
