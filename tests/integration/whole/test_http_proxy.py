"""`http_proxy` is meant for the web: it reaches neither calls between our processes nor the commands."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.processes import ROOT, Processes
from tests.integration.whole.test_whole_path import run_demo

COMMAND_TIMEOUT_S = 120.0


def test_a_dead_proxy_disturbs_nobody(
    purchases_db: str, analytics_db: str, amqp_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Processes.all_running(purchases_db, analytics_db, amqp_url, tmp_path) as processes:
        assert run_demo(processes, monkeypatch, tmp_path / "report", "--limit", "50") == 0
        environ = {**processes.environ, "CONSUMER_TARGET": processes.address["consumer"]}
        for arguments in (
            ("relay_svc", "status"),
            ("analytics_svc", "audit"),
            ("analytics_svc", "quarantine", "list"),
            ("analytics_svc", "report"),
            ("analytics_svc", "rebuild"),
        ):
            done = subprocess.run(
                [sys.executable, "-m", *arguments],
                cwd=ROOT, env=environ, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
