"""Two processes that share the tests: each file is run by the one that takes it first."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

TESTS = """
import os, pytest

@pytest.mark.parametrize("n", (1, 2))
def test(n):
    with open(os.environ["RAN"], "a") as file:
        print(__name__, n, file=file)
"""


def test_from_the_end_what_nobody_has_taken(tmp_path: Path) -> None:
    tests, taken, ran = tmp_path / "tests", tmp_path / "taken", tmp_path / "ran"
    tests.mkdir()
    for name in "abcd":
        (tests / f"test_{name}.py").write_text(TESTS)
    places = [taken.joinpath(*(tests / f"test_{name}.py").parts[1:]) for name in "abcd"]
    places[2].parent.mkdir(parents=True)
    places[2].touch()
    environ = os.environ | {"TEST_FILES_TAKEN": str(taken), "TEST_ORDER": "from the end", "RAN": str(ran)}
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert "6 passed" in done.stdout, done.stdout + done.stderr
    assert ran.read_text().splitlines() == [f"test_{name} {n}" for name in "dba" for n in (1, 2)]
    assert all(place.exists() for place in places)
