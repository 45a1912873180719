"""Grafana with the dashboard, beside the local stack: where it is installed, as nothing of ours brings it.

It keeps what it needs in a directory of its own, asks one Prometheus, and lets whoever reaches it on this machine look.
"""

import os
import shutil
from pathlib import Path

from deploy.local.machine import Process, pick_port, spawn

FILES = Path(__file__).resolve().parents[1] / "grafana"
HOMES = ("/usr/share/grafana", "/opt/homebrew/share/grafana", "/usr/local/share/grafana")
PORT = 29_300


def home() -> Path | None:
    """Where it is installed, with the pages that it serves; None where it is not."""
    program = shutil.which("grafana")
    around = [Path(program).resolve().parents[1]] if program else []
    return next((it for it in (*around, *map(Path, HOMES)) if (it / "conf" / "defaults.ini").exists()), None)


class Grafana:
    """One server on a port of the loopback that is its own."""

    def __init__(self, installed: Path, directory: Path, log: Path) -> None:
        self._installed, self.directory, self._log = installed, directory, log
        self._port = pick_port(PORT)
        self._process: Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/d/retail-backbone"

    def environ(self, prometheus: str) -> dict[str, str]:
        """What it is told; `prometheus` is host:port."""
        return {
            "PROMETHEUS": f"http://{prometheus}",
            "DASHBOARDS": str(FILES / "dashboards"),
            "GF_PATHS_PROVISIONING": str(FILES / "provisioning"),
            "GF_PATHS_DATA": str(self.directory),
            "GF_PATHS_LOGS": str(self.directory / "log"),
            "GF_SERVER_HTTP_ADDR": "127.0.0.1",
            "GF_SERVER_HTTP_PORT": str(self._port),
            "GF_AUTH_ANONYMOUS_ENABLED": "true",
            "GF_AUTH_DISABLE_LOGIN_FORM": "true",
            "GF_ANALYTICS_REPORTING_ENABLED": "false",
            "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        }

    def start(self, prometheus: str) -> None:
        """Start it; it answers some seconds later."""
        self.directory.mkdir(parents=True, exist_ok=True)
        program = shutil.which("grafana") or str(self._installed / "bin" / "grafana")
        command = [program, "server", "--homepath", str(self._installed)]
        self._process = spawn(command, {**os.environ, **self.environ(prometheus)}, self.directory, self._log)

    def stop(self) -> None:
        if self._process:
            self._process.end()
