"""`make run CELLS=2` and `make demo CELLS=2`, in a directory of their own: a chain with two cells on one machine."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest

from chassis import cells
from deploy.local import machine
from deploy.local.stack import Stack
from tests.conftest import ROOT
from tests.integration.local_chain import local_chain

SALES = 200
TIMEOUT_S = 200


@pytest.fixture(params=["plaintext", "TLS"])
def stack(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stack]:
    with local_chain(tmp_path, **({"TLS": "1"} if request.param == "TLS" else {})) as stack:
        yield stack


def command(environ: Mapping[str, str], *words: str) -> tuple[int, str]:
    """The exit code of a command of ours, and what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env=environ,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return done.returncode, done.stdout


def demo(environ: Mapping[str, str], report: Path, *arguments: str) -> dict[str, Any]:
    """What it reports; it has to succeed."""
    code, said = command(environ, "pos", "demo", "--limit", str(SALES), "--report", str(report), *arguments)
    assert code == 0, said
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def recorded(stack: Stack) -> dict[str, set[int]]:
    """The branches whose sales are in each cell's database."""
    found = {}
    for service in stack.launcher.services:
        if service.kind == "purchases":
            with psycopg.connect(stack.postgres.url(service.database.name)) as connection:
                rows = connection.execute("SELECT DISTINCT branch_id FROM purchases")
                found[service.name] = {branch for (branch,) in rows}
    return found


def test_two_cells_by_one_command(stack: Stack, tmp_path: Path) -> None:
    """The demo sells in both, also by tills with journals, which it finds again in their cells; what is killed in one
    cell comes back; streams sell in both, too; the audit agrees."""
    environ = stack.client_environ()
    report = tmp_path / "report.json"
    journals = "--journals", str(tmp_path / "tills")
    assert demo(environ, report, *journals)["purchases"] == SALES
    assert recorded(stack) == {"purchases": {1, 3}, "purchases-2": {2, 4}}

    killed = [name for name in stack.processes() if name.endswith("-2")]
    assert killed == ["purchases-2", "relay-2"]
    for name in killed:
        process = stack.processes()[name]
        assert process and not process.end(signal.SIGKILL)
    with stack.changing():
        assert stack.start() == killed

    assert demo(environ, report, *journals)["purchases"] == SALES, "a till went on with its journal"
    said = demo(environ, report, "--streams", "--seed", "2")
    assert (said["purchases"], said["control_totals_agree"]) == (2 * SALES, True)
    audited = ""

    def agreed() -> bool:
        """Not so while the last look of the continuous audit was before the last sale was counted."""
        nonlocal audited
        code, audited = command(environ, "analytics_svc", "audit")
        return code == 0

    assert machine.wait_until(agreed, TIMEOUT_S), audited
    assert f"{2 * SALES:,} purchases recorded" in audited
    assert all(f"Cell {name}: counted up to" in audited for name in ("default", "cell-2"))

    file = stack.launcher.cells_file
    assert file and cells.parse(file.read_text()).by_name.keys() == {"default", "cell-2"}
    with stack.changing():
        stack.stop()
    assert not machine.find(lambda process: process.environ.get(machine.MARK, "").startswith(str(stack.home)))
