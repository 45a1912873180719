"""A short run under fire, as part of CI: every other kind of fault once. The long one is `make faults`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sizes import how_many

ROOT = Path(__file__).parent.parent.parent
FAULTS = how_many("FAULTS")
SEED = 20_260_106
MOST_S = 200 + 7 * FAULTS  # takes a quarter of it on an idle machine


@pytest.mark.timeout(MOST_S + 30)
def test_nothing_is_lost_under_fire(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [
        sys.executable,
        "-m",
        "tests.faults",
        "--faults",
        str(FAULTS),
        "--seed",
        str(SEED),
        "--long",
        "8",
        "--prove",
    ]
    done = subprocess.run(
        [*command, "--report", str(report)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=MOST_S,
        check=False,
    )
    print(done.stdout, done.stderr)  # the table, for whoever looks at a failure
    assert done.returncode == 0
    figures = json.loads(report.read_text())
    assert figures["faults"] == FAULTS
    assert figures["acknowledged"] > 10 * FAULTS
    assert {name: figures[name] for name in ("lost", "doubled", "falsely_sent", "parked_good")} == {
        "lost": 0,
        "doubled": 0,
        "falsely_sent": 0,
        "parked_good": 0,
    }
