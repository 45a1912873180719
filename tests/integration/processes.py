"""The four processes as an operator runs them, each with a port of its own; to be killed and started again."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from chassis.tls import Credentials
from deploy.healthcheck import is_serving
from deploy.local.machine import wait_until
from tests.integration.conftest import free_address

ROOT = Path(__file__).parent.parent.parent
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0

COMMANDS = {
    "purchases": ("purchases_svc", "serve"),
    "relay": ("relay_svc", "serve"),
    "consumer": ("analytics_svc", "consume"),
    "analytics": ("analytics_svc", "serve"),
}


class Processes:
    """The system on given databases and a given broker."""

    credentials: Credentials | None = None  # of whoever asks how they are

    def __init__(self, purchases_url: str, analytics_url: str, amqp_url: str, logs: Path) -> None:
        self.address = {name: free_address() for name in COMMANDS}
        self._logs = logs
        self.environ = {
            **os.environ,
            "PURCHASES_BACKLOG_MONTHS": "0",  # days of tests stay where they are
            "PURCHASES_DATABASE_URL": purchases_url,
            "ANALYTICS_DATABASE_URL": analytics_url,
            "AMQP_URL": amqp_url,
            "PURCHASES_TARGET": self.address["purchases"],
            "ANALYTICS_TARGET": self.address["analytics"],
            "RELAY_TARGET": self.address["relay"],
            **{f"{name.upper()}_LISTEN": address for name, address in self.address.items()},
            **{f"{name.upper()}_METRICS_LISTEN": "127.0.0.1:0" for name in COMMANDS},
        }
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    @classmethod
    @contextmanager
    def all_running(cls, purchases_url: str, analytics_url: str, amqp_url: str, logs: Path) -> Iterator[Self]:
        """All of them, from when they are ready until the end, whatever happens."""
        processes = cls(purchases_url, analytics_url, amqp_url, logs)
        try:
            processes.start_all()
            yield processes
        finally:
            processes.end_all()

    def start_all(self) -> None:
        for name in COMMANDS:
            self.start(name)
        for name in COMMANDS:
            self.wait_ready(name)

    def start(self, name: str) -> None:
        with (self._logs / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, *self.program(name)],
                cwd=ROOT,
                env=self.environ | self.identity(name),
                stdout=log,
                stderr=log,
            )

    def program(self, name: str) -> list[str]:
        """What Python is to run."""
        return ["-m", *COMMANDS[name]]

    def identity(self, name: str) -> dict[str, str]:
        """The settings with a process's certificates."""
        return {}

    def wait_ready(self, name: str) -> None:
        ready = wait_until(lambda: is_serving(self.address[name], self.credentials), START_TIMEOUT_S)
        assert ready, f"{name} is not up: {self.log(name)[-2000:]}"

    def died(self, name: str) -> bool:
        """Whether it has ended by itself."""
        return self._running[name].poll() is not None

    def kill(self, name: str) -> None:
        """kill -9."""
        process = self._running.pop(name)
        process.kill()
        process.wait(STOP_TIMEOUT_S)

    def stop(self, name: str) -> int:
        """SIGTERM; the exit code."""
        process = self._running.pop(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(STOP_TIMEOUT_S)

    def log(self, name: str) -> str:
        return (self._logs / f"{name}.log").read_text()

    def end_all(self) -> None:
        for name in list(self._running):
            self.kill(name)
