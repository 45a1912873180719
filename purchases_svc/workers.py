"""Several processes on one port: the parent starts them, restarts what dies, and passes on the end.

Each is spawned anew, never forked: gRPC does not survive a fork. The kernel spreads connections, not calls, over the
processes that share a port.
"""

import asyncio
import ctypes
import os
import signal
import socket
import sys
import time

import structlog

from chassis.errors import PortTaken
from chassis.grpc_server import DRAIN_TIMEOUT_S
from chassis.lifecycle import Backoff, wait_set

WORKER = "PURCHASES_WORKER"  # a worker's number, from 1; set by the parent only
PARENT = "PURCHASES_WORKERS_PARENT"  # the parent's process id
STEADY_S = 10.0  # who lives that long has started well; who dies before is started again after growing pauses
METRICS_PORT_STEP = 100  # worker 2 answers Prometheus on 9564 where worker 1 is on 9464

log = structlog.get_logger()


def number() -> int | None:
    """Which worker this process is; None when it is no worker."""
    raw = os.environ.get(WORKER)
    return int(raw) if raw else None


def metrics_address(address: str, worker: int | None) -> str:
    """Workers cannot share a port for metrics: each has its own numbers."""
    host, _, port = address.rpartition(":")
    return address if worker is None or port == "0" else f"{host}:{int(port) + (worker - 1) * METRICS_PORT_STEP}"


def die_with_parent() -> None:
    """Have the kernel tell this process to stop when its parent dies: nobody would replace or stop it any more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if str(os.getppid()) != os.environ[PARENT]:  # it died before that
            os.kill(os.getpid(), signal.SIGTERM)


_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def check_free(address: str) -> None:
    """Processes that share a port do not notice a stranger on it, so the parent looks first.

    Raises:
        PortTaken: somebody listens there.
    """
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise PortTaken(f"cannot listen on {address}: {error.strerror}") from error


async def supervise(count: int, listen: str, stop: asyncio.Event) -> None:
    """Keep `count` workers running until `stop`; then let each drain."""
    check_free(listen)
    await asyncio.gather(*(_keep_running(worker, stop) for worker in range(1, count + 1)))


async def _keep_running(worker: int, stop: asyncio.Event) -> None:
    backoff = Backoff(0.1, 5.0)
    while not stop.is_set():
        started = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "purchases_svc",
            "serve",
            env={**os.environ, WORKER: str(worker), PARENT: str(os.getpid())},
            start_new_session=True,  # a Ctrl-C in the terminal reaches the parent only, who passes it on once
        )
        log.info("worker started", worker=worker, pid=process.pid)
        ended, stopping = asyncio.ensure_future(process.wait()), asyncio.ensure_future(stop.wait())
        await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not ended.done():
            await _end(process, ended, worker)
            return
        log.error("worker died; starting it again", worker=worker, exit_code=ended.result())
        if time.monotonic() - started > STEADY_S:
            backoff.reset()
        await wait_set(stop, backoff.next_s())


async def _end(process: asyncio.subprocess.Process, ended: "asyncio.Future[int]", worker: int) -> None:
    process.terminate()
    try:
        await asyncio.wait_for(asyncio.shield(ended), DRAIN_TIMEOUT_S + 5)
    except TimeoutError:
        log.error("worker did not stop in time and is killed", worker=worker)
        process.kill()
        await ended
