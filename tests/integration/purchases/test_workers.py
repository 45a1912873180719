"""Several purchases processes on one port."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from deploy.healthcheck import is_serving
from deploy.local.machine import port_is_free, wait_until
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.conftest import ROOT
from tests.integration.conftest import free_address
from tests.integration.purchases.test_create_purchase import assert_whole
from tests.integration.sales import sale

PATIENCE_S = 60.0


class Parent:
    """`PURCHASES_WORKERS=3 python -m purchases_svc serve`."""

    def __init__(self, url: str, log: Path) -> None:
        self.address, self._log = free_address(), log
        self.pages = free_pages()
        self._environ = {
            **os.environ,
            "PURCHASES_DATABASE_URL": url,
            "PURCHASES_LISTEN": self.address,
            "PURCHASES_METRICS_LISTEN": self.pages[0],
            "PURCHASES_WORKERS": "3",
        }
        self.process = self.launch()

    def launch(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "purchases_svc", "serve"], env=self._environ, stdout=log, stderr=log, cwd=ROOT
            )

    def log(self) -> str:
        return self._log.read_text()

    def pids(self) -> list[int]:
        """Of every worker ever started, in order."""
        started = [line for line in self.log().splitlines() if '"worker started"' in line]
        return [int(re.findall(r'"pid": (\d+)', line)[0]) for line in started]

    def serving(self) -> int:
        return self.log().count('"event": "serving"')


def free_pages() -> list[str]:
    """Addresses for the metrics of three workers: each 100 ports above the one before."""
    while True:
        port = int(free_address().rpartition(":")[2])
        if all(map(port_is_free, (port + 100, port + 200))):
            return [f"127.0.0.1:{port + above}" for above in (0, 100, 200)]


@pytest.fixture
def parent(purchases_db: str, tmp_path: Path) -> Iterator[Parent]:
    running = Parent(purchases_db, tmp_path / "log")
    try:
        assert wait_until(lambda: running.serving() == 3, PATIENCE_S), running.log()
        yield running
    finally:
        for pid in running.pids():
            if Path(f"/proc/{pid}/cmdline").exists() and b"purchases_svc" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        running.process.kill()
        running.process.wait(PATIENCE_S)


def sell(address: str, sales: int) -> None:
    """Each over a connection of its own, so that all workers get some."""
    for _ in range(sales):
        with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            request = sale(("1.00",))
            for _ in range(2):  # the retry may come to another worker
                reply = PurchasesServiceStub(channel).CreatePurchase(request, timeout=PATIENCE_S, wait_for_ready=True)
            assert reply.replayed


def test_workers_share_the_port_and_are_replaced(parent: Parent, purchases_db: str) -> None:
    """A worker that dies is started again, and meanwhile the others serve."""
    assert len(set(parent.pids())) == 3
    sell(parent.address, 30)
    os.kill(parent.pids()[0], signal.SIGKILL)
    assert wait_until(lambda: parent.serving() == 4, PATIENCE_S), parent.log()
    assert is_serving(parent.address)
    sell(parent.address, 30)
    assert_whole(purchases_db, 60)


def test_each_worker_has_a_page_of_its_own_and_all_calls_are_in_their_sum(parent: Parent) -> None:
    sell(parent.address, 30)
    answered = r'^grpc_server_handled_total\{grpc_code="OK",grpc_method="CreatePurchase",.*\} (\S+)$'
    pages = [
        urllib.request.urlopen(f"http://{page}/metrics", timeout=PATIENCE_S).read().decode() for page in parent.pages
    ]
    assert sum(float(count) for page in pages for count in re.findall(answered, page, re.MULTILINE)) == 60
    assert all("purchases_flush_sales_bucket" in page for page in pages)


def test_all_drain_on_sigterm(parent: Parent) -> None:
    """The parent passes the end on, waits for everyone, and exits with 0."""
    parent.process.send_signal(signal.SIGTERM)
    assert parent.process.wait(PATIENCE_S) == 0
    assert parent.log().count('"event": "stopped"') == 3
    assert not any(Path(f"/proc/{pid}").exists() for pid in parent.pids())


def test_workers_go_with_their_parent(parent: Parent) -> None:
    """After a kill -9 of the parent no worker is left to hold the port."""
    parent.process.kill()
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in parent.pids()), PATIENCE_S)


def test_second_start_names_the_port(parent: Parent) -> None:
    """Processes that share a port would let a stranger in; the parent looks first and refuses."""
    second = parent.launch()
    assert second.wait(PATIENCE_S) == 1
    assert f"cannot listen on {parent.address}" in parent.log()
