"""The fault rig's hooks still fit the services."""

import pytest

from tests.faults.crashing import STEPS, Trigger, wrap


@pytest.mark.parametrize(("service", "step"), [(service, step) for service, steps in STEPS.items() for step in steps])
def test_step_exists(service: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever renames a function at which faults strike learns it here: put its new name into `crashing.STEPS`."""
    monkeypatch.setattr("tests.faults.crashing.setattr", lambda *_: None, raising=False)
    wrap(step, STEPS[service][step], Trigger(None, None))
