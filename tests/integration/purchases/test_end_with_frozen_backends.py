"""A process that is told to stop ends, though PostgreSQL's processes that store its sales stand still."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import grpc

from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.integration.conftest import free_address
from tests.integration.processes import Processes
from tests.integration.purchase_events import query
from tests.integration.sales import sale

WRITERS = "FROM pg_stat_activity WHERE application_name = 'purchases write' AND datname = current_database()"


def test_a_service_ends_though_its_backends_are_frozen(purchases_db: str, tmp_path: Path) -> None:
    """Whoever waits for an answer gets one, if only an error."""
    processes = Processes(purchases_db, purchases_db, free_address(), tmp_path)
    processes.environ["PURCHASES_FLUSH_TIMEOUT_S"] = "4"
    processes.start("purchases")
    frozen: list[int] = []
    try:
        processes.wait_ready("purchases")
        with grpc.insecure_channel(processes.address["purchases"]) as channel:
            stub: Any = PurchasesServiceStub(channel)
            stub.CreatePurchase(sale(), timeout=60)
            frozen += [pid for (pid,) in query(purchases_db, f"SELECT pid {WRITERS}")]
            for pid in frozen:
                os.kill(pid, signal.SIGSTOP)
            calls = [stub.CreatePurchase.future(sale(), timeout=60) for _ in range(3)]
            answered = threading.Semaphore(0)
            for call in calls:
                call.add_done_callback(lambda _: answered.release())
            assert processes.stop("purchases") == 0
            for _ in calls:
                assert answered.acquire(timeout=60)
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
        processes.end_all()
    assert len(frozen) > 1
