"""Dying at a system call: strace counts what a running process sends and writes, and kills it at the n-th."""

import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from deploy.local.machine import StackError, wait_until
from tests.faults.system import Instance

SYSCALLS = ("sendto", "sendmsg", "write", "writev")
ATTACH_S = 0.3  # for strace to have all threads


def _strace(pid: int, output: str, calls: Sequence[str], inject: str | None = None) -> "subprocess.Popen[bytes]":
    if shutil.which("strace") is None:
        raise StackError("strace is not installed: install it with the machine's package manager")
    command = ["strace", "-f", "-qq", "-o", output, "-p", str(pid), "-e", f"trace={','.join(calls)}"]
    if inject:
        command += ["-e", f"inject={','.join(calls)}:{inject}"]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, start_new_session=True
    )


def _end(tracer: "subprocess.Popen[bytes]") -> None:
    """Its tracee goes on."""
    tracer.terminate()
    tracer.wait(10)


def kill_at_syscall(
    instance: Instance,
    n: int,
    within_s: float,
    work: Callable[[], object] = lambda: None,
    calls: Sequence[str] = SYSCALLS,
) -> bool:
    """Whether the process died at its n-th send or write while `work` was done, or within that time afterwards.

    strace counts by thread and by kind of call; a process that makes fewer lives on.
    """
    process = instance.process
    assert process is not None
    tracer = _strace(process.pid, "/dev/null", calls, f"signal=SIGKILL:when={n}")
    try:
        time.sleep(ATTACH_S)
        work()
        return wait_until(lambda: process.poll() is not None, within_s)
    finally:
        _end(tracer)


def count_syscalls(instance: Instance, work: Callable[[], object]) -> Counter[str]:
    """How many sends or writes of each kind the busiest thread makes, while `work` is done."""
    assert instance.process is not None
    output = Path(instance.directory) / "strace"
    tracer = _strace(instance.process.pid, str(output), SYSCALLS)
    try:
        time.sleep(ATTACH_S)
        work()
    finally:
        _end(tracer)
    by_thread: Counter[tuple[str, str]] = Counter()
    for line in output.read_text(errors="replace").splitlines():
        thread, _, call = line.partition(" ")
        by_thread[thread, call.strip().partition("(")[0]] += 1
    busiest: Counter[str] = Counter()
    for (_, name), count in by_thread.items():
        busiest[name] = max(busiest[name], count)
    return busiest
