"""The table of what chains need is plain multiplication of what a purchase cost."""

import json
from pathlib import Path

import pytest

from tests.bench import capacity
from tests.bench.capacity import BUSY, CORES, COUNTING, RECORDING, RELAYING, REST, costs, main, need
from tests.bench.pipeline.whole import LOAD

US = {
    LOAD: 500.0,
    "purchases": 100.0,
    "relay": 20.0,
    "consumer": 40.0,
    "analytics": 1.0,
    "RabbitMQ": 30.0,
    RECORDING: 90.0,
    RELAYING: 10.0,
    COUNTING: 50.0,
    REST: 20.0,
}


def report(*rates: tuple[float, float, float]) -> dict[str, object]:
    """Trials: asked, recorded and counted a second; what a purchase cost is told apart by the rate."""
    trials = [
        {
            "asked_per_s": asked,
            "recorded_per_s": recorded,
            "counted_per_s": counted,
            "cpu_us": {name: us + asked for name, us in US.items()},
        }
        for asked, recorded, counted in rates
    ]
    machine = {"cores": 2, "processor": "a processor"}
    return {"details": {"machine": machine, "pipeline": {"whole": [{"trials": trials}]}}}


def test_costs_are_those_of_the_highest_rate_that_was_sustained() -> None:
    found = costs(report((1.0, 1.0, 1.0), (2.0, 2.0, 2.0), (3.0, 3.0, 2.0)))
    assert found["purchases"] == 102.0
    assert LOAD not in found


@pytest.mark.parametrize(("branches", "sales_per_s"), capacity.STEPS)
def test_no_server_has_more_to_do_than_it_bears(branches: int, sales_per_s: int) -> None:
    found = need(branches, sales_per_s, US)
    assert found.cell_cores <= CORES
    assert found.cells == 1 or found.cell_cores * found.cells > CORES * (found.cells - 1)
    assert found.purchases_cores == pytest.approx(sales_per_s * 100e-6 / BUSY)
    assert found.cells * found.cell_cores == pytest.approx(sales_per_s * 110e-6 / BUSY)


def test_the_command_tells_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert main([str(file)]) == 1
    file.write_text(json.dumps({"details": {}}))
    assert main([str(file)]) == 1
    assert "pipeline" in capsys.readouterr().err
    file.write_text(json.dumps(report((1_000.0, 1_000.0, 1_000.0))))
    assert main([str(file)]) == 0
    said = capsys.readouterr().out
    assert all(f"| {branches:,} |" in said for branches, _ in capacity.STEPS)
