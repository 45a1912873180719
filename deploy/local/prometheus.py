"""A private Prometheus in a directory of its own, which reads the pages of given processes and knows the alarms.

    prometheus = Prometheus(directory)
    prometheus.start({"relay": "127.0.0.1:9466"})
    prometheus.get("/api/v1/alerts")
    prometheus.stop()

The program is the one on the PATH, or Debian's, unpacked below .local by deploy/bootstrap.sh.
"""

import json
import os
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.local.machine import Process, StackError, pick_port, spawn, tail, wait_until

ROOT = Path(__file__).resolve().parents[2]
UNPACKED = ROOT / ".local" / "prometheus-server"
ALARMS = ROOT / "deploy" / "prometheus" / "alarms.yaml"
PORT = 29_090
START_TIMEOUT_S = 60.0
GET_TIMEOUT_S = 10.0
KEPT = "7d"

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # on this machine, whatever http_proxy says


def program(name: str) -> Path:
    """`prometheus` or `promtool`; fetched, where it is not there."""
    if found := shutil.which(name):
        return Path(found)
    if not UNPACKED.is_dir():
        fetched = subprocess.run(
            ["sh", ROOT / "deploy" / "bootstrap.sh", "package", UNPACKED, "prometheus"],
            capture_output=True,
            text=True,
            check=False,
        )
        if fetched.returncode:
            raise StackError(
                f"Prometheus is not installed, and could not be fetched:\n{fetched.stdout}{fetched.stderr}"
            )
    return UNPACKED / "usr" / "bin" / name


class Prometheus:
    """One server on a port of the loopback that is its own."""

    def __init__(self, directory: Path, *, log: Path | None = None, alarms: Path = ALARMS, every: str = "5s") -> None:
        """It reads pages and weighs the alarms once per `every`."""
        self.directory, self.log = directory, log or directory / "prometheus.log"
        self._alarms, self._every = alarms, every
        self._port = pick_port(PORT)
        self._process: Process | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def start(self, pages: Mapping[str, str]) -> Process:
        """Start it and wait until it answers; `pages` are addresses of metrics, by the names of their jobs;
        those of one job are separated by commas.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        configuration = self.directory / "prometheus.json"  # JSON is YAML, too
        configuration.write_text(json.dumps(self._configuration(pages), indent=2))
        self._process = spawn(
            [
                program("prometheus"),
                f"--config.file={configuration}",
                f"--storage.tsdb.path={self.directory / 'data'}",
                f"--storage.tsdb.retention.time={KEPT}",
                f"--web.listen-address={self.address}",
            ],
            os.environ,
            self.directory,
            self.log,
        )
        process = self._process
        wait_until(lambda: not process.alive or self._ready(), START_TIMEOUT_S)
        if not self._ready():
            self.stop()
            raise StackError(f"Prometheus did not start; the end of {self.log}:\n{tail(self.log)}")
        return process

    def stop(self) -> None:
        if self._process:
            self._process.end()

    def get(self, path: str, **query: str) -> Any:
        """`data` of an answer of its HTTP API."""
        url = f"http://{self.address}{path}?{urllib.parse.urlencode(query)}"
        with _direct.open(url, timeout=GET_TIMEOUT_S) as reply:
            return json.load(reply)["data"]

    def _configuration(self, pages: Mapping[str, str]) -> dict[str, Any]:
        return {
            "global": {
                "scrape_interval": self._every,
                "scrape_timeout": self._every,
                "evaluation_interval": self._every,
            },
            "rule_files": [str(self._alarms)],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": addresses.split(",")}]}
                for job, addresses in pages.items()
            ],
        }

    def _ready(self) -> bool:
        try:
            with _direct.open(f"http://{self.address}/-/ready", timeout=1):
                return True
        except (urllib.error.URLError, OSError):
            return False
