"""The system with its pages, as an operator runs it, and a browser that looks at them."""

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from playwright.async_api import Browser

from deploy.local.machine import wait_until
from pos.client import PosClient, connect
from tests.integration.conftest import free_address
from tests.integration.processes import ROOT, START_TIMEOUT_S, Processes
from tests.pages.browser import browsing


def answers(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


class Site(Processes):
    """All processes, and the pages."""

    def __init__(self, purchases_url: str, analytics_url: str, amqp_url: str, logs: Path) -> None:
        super().__init__(purchases_url, analytics_url, amqp_url, logs)
        self.address |= {"pages": free_address()}
        self.metrics = free_address()
        self.environ |= {
            "PAGES_LISTEN": self.address["pages"],
            "PAGES_METRICS_LISTEN": self.metrics,
            "PAGES_JOURNALS": str(logs / "journals"),
            "CONSUMER_TARGET": self.address["consumer"],
        }

    @property
    def url(self) -> str:
        return f"http://{self.address['pages']}"

    def start(self, name: str) -> None:
        if name != "pages":
            super().start(name)
            return
        with (self._logs / "pages.log").open("ab") as log:
            command = [sys.executable, "-m", "pages_svc", "serve"]
            self._running[name] = subprocess.Popen(command, cwd=ROOT, env=self.environ, stdout=log, stderr=log)

    def wait_ready(self, name: str) -> None:
        if name != "pages":
            super().wait_ready(name)
            return
        assert wait_until(lambda: answers(self.url), START_TIMEOUT_S), f"the pages are not up: {self.log(name)[-2000:]}"

    def metric(self, name: str) -> float:
        with urlopen(f"http://{self.metrics}/metrics", timeout=5) as reply:
            lines = reply.read().decode().splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))

    @property
    def memory_bytes(self) -> int:
        """Of the pages' process, resident."""
        status = Path(f"/proc/{self._running['pages'].pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) * 1024


@pytest.fixture
def site(purchases_db: str, analytics_db: str, amqp_url: str, tmp_path: Path) -> Iterator[Site]:
    with Site.all_running(purchases_db, analytics_db, amqp_url, tmp_path) as running:
        running.start("pages")
        running.wait_ready("pages")
        yield running


@pytest.fixture
def till(site: Site) -> Iterator[PosClient]:
    with connect(site.address["purchases"]) as channel:
        yield PosClient(channel)


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with browsing() as opened:
        yield opened
