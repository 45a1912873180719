"""What the stack asks of the operating system: processes, ports and private files. Linux only, through /proc."""

import fcntl
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "LOCAL_STACK"  # the variable that every process of a stack carries; its value is the owner's directory
KILL_TIMEOUT_S = 10.0  # for a process to vanish after SIGKILL; longer means that it hangs in the kernel
LOCK_TIMEOUT_S = 180.0  # longer than any start or stop lasts
POLL_S = 0.05
LOG_BYTES_MAX = 10 << 20  # a larger log is set aside when its process is started
LOG_LINES_SHOWN = 20
PORT_ATTEMPTS = 3  # a free port may be taken by another program before our server listens on it
# Below those that the kernel hands out to outgoing connections. Tests that run beside others have every other port: one
# that nobody listens on now may be that of a server which is about to start, or to come back.
PRIVATE_PORTS = range(20_000 + (os.environ.get("TEST_PORTS") == "odd"), 30_000, 2)

_children: dict[int, subprocess.Popen[bytes]] = {}  # what this very process has spawned, for the exit codes


class StackError(Exception):
    """Something that a person has to see to; the message says what."""


@dataclass(frozen=True)
class Process:
    """A process by pid and start time: whoever gets the same pid later is another one, and is never signalled."""

    pid: int
    started: int  # clock ticks since boot

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        """The process that has this pid now; None when there is none, or it is dead and merely not yet reaped."""
        fields = _stat(pid)
        if not fields:
            return None
        state, threads, started = fields[0], int(fields[17]), int(fields[19])
        # The first thread may be gone while others still are about to end, and hold the ports until then.
        return None if state in "ZX" and threads <= 1 else cls(pid, started)

    @property
    def alive(self) -> bool:
        if Process.of(self.pid) == self:
            return True
        self.exit_code()  # reaps a child of ours
        return False

    @property
    def parent(self) -> int:
        """The pid that started it; another's when that one has ended."""
        fields = _stat(self.pid)
        return int(fields[1]) if fields else 0

    @property
    def argv(self) -> list[str]:
        """Empty when it has ended meanwhile."""
        with suppress(FileNotFoundError, ProcessLookupError):
            return _read(self.pid, "cmdline").decode(errors="replace").split("\0")[:-1]
        return []

    @property
    def program(self) -> str:
        return Path((self.argv or [""])[0]).name

    @property
    def environ(self) -> dict[str, str]:
        entries = _read(self.pid, "environ").decode(errors="replace").split("\0")
        return dict(entry.split("=", 1) for entry in entries if "=" in entry)

    @property
    def directory(self) -> str:
        """Its working directory."""
        return os.readlink(f"/proc/{self.pid}/cwd")

    def send(self, number: int) -> None:
        if self.alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def ended(self, within_s: float) -> bool:
        return wait_until(lambda: not self.alive, within_s)

    def end(self, politely: int = signal.SIGTERM, patience_s: float = KILL_TIMEOUT_S) -> bool:
        """End it, by force if it does not heed `politely` in time; True when force was needed."""
        self.send(politely)
        if self.ended(patience_s):
            return False
        self.send(signal.SIGKILL)
        if not self.ended(KILL_TIMEOUT_S):
            raise StackError(f"pid {self.pid} does not die")
        return True

    def exit_code(self) -> int | None:
        """Negative for a signal; None while it runs, and where somebody else has started it."""
        return _children[self.pid].poll() if self.pid in _children else None

    def __str__(self) -> str:
        return f"pid {self.pid} ({' '.join(self.argv)[:80]})"


def _read(pid: int, name: str) -> bytes:
    return Path(f"/proc/{pid}/{name}").read_bytes()


def _stat(pid: int) -> list[str] | None:
    try:  # the command's name, in brackets, may hold anything: count from the last bracket
        return _read(pid, "stat").decode(errors="replace").rpartition(") ")[2].split()
    except OSError:
        return None


def find(wanted: Callable[[Process], bool]) -> list[Process]:
    """All processes of this machine that are wanted; those that we may not look into are not ours."""
    found = []
    for entry in os.listdir("/proc"):
        process = Process.of(int(entry)) if entry.isdigit() else None
        with suppress(OSError):  # it ended meanwhile, or is somebody else's
            if process and wanted(process):
                found.append(process)
    return found


def spawn(argv: Sequence[str | Path], environ: Mapping[str, str], directory: Path, log: Path) -> Process:
    """Start a process in a session of its own, so that Ctrl-C in the terminal reaches us and not it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > LOG_BYTES_MAX:
        log.replace(log.with_name(log.name + ".1"))
    with log.open("ab") as output:
        child = subprocess.Popen(
            argv,
            env=environ,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _children[child.pid] = child
    return Process.of(child.pid) or Process(child.pid, 0)  # the latter: it has ended already


def wait_until(condition: Callable[[], bool], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def tail(log: Path) -> str:
    """The end of a log, to show why its process died."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(f"    {line}" for line in lines[-LOG_LINES_SHOWN:])


# --- ports ---


def reserve_port(port: int, host: str = "127.0.0.1") -> socket.socket | None:
    """A socket that keeps the port from the kernel's choice for outgoing connections; None if it is taken already.

    With SO_REUSEADDR, and as long as this one does not listen, a server can take the port all the same. Without
    SO_REUSEPORT, as we would not notice a server that listens with it.
    """
    reserved = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        reserved.bind((host, port))
    except OSError:
        reserved.close()
        return None
    return reserved


def port_is_free(port: int) -> bool:
    with reserve_port(port) or nullcontext() as reserved:
        return reserved is not None


def port_holder(port: int) -> Process | None:
    """The process that uses the TCP port, where we may know."""
    sockets = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()
            if int(fields[1].rpartition(":")[2], 16) == port:
                sockets.add(f"socket:[{fields[9]}]")
    holders = find(lambda process: any(os.readlink(file) in sockets for file in _files(process.pid)))
    return holders[0] if holders else None


def _files(pid: int) -> Iterator[str]:
    return (entry.path for entry in os.scandir(f"/proc/{pid}/fd"))


def pick_port(preferred: int | None = None) -> int:
    """The preferred port when it is free, else any free private one."""
    candidates = [preferred] if preferred else []
    candidates += random.sample(PRIVATE_PORTS, 100)
    for port in candidates:
        if port_is_free(port):
            return port
    raise StackError("no free port found below 30000")


# --- private files ---


def write_private(path: Path, text: str) -> None:
    """Replace the file in one step (never half written), readable by its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    fresh.replace(path)


class Notebook:
    """A few values that must outlive a process, in one private JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, Any]:
        return dict(json.loads(self._path.read_text())) if self._path.exists() else {}

    def write(self, values: Mapping[str, Any]) -> None:
        write_private(self._path, json.dumps(values, indent=2) + "\n")

    def password(self, name: str) -> str:
        """The password of that name, generated when first asked for."""
        return str(self._keep(f"password of {name}", lambda: secrets.token_urlsafe(24)))

    def port(self, name: str, preferred: int | None, *, in_use: bool) -> int:
        """The port of that name; picked anew when another program has taken it while we did not use it."""
        port = int(self._keep(f"port of {name}", lambda: pick_port(preferred)))
        if in_use or port_is_free(port):
            return port
        self.write({**self.read(), f"port of {name}": pick_port(preferred)})
        return self.port(name, preferred, in_use=True)

    def _keep(self, key: str, make: Callable[[], Any]) -> Any:
        values = self.read()
        if key not in values:
            self.write({**values, key: make()})
        return self.read()[key]


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the file's lock; `waiting` is called once if somebody else has it. The kernel frees it with its holder."""
    with path.open("w") as file:
        if not try_lock(file.fileno(), fcntl.LOCK_EX):
            waiting()
            if not wait_until(lambda: try_lock(file.fileno(), fcntl.LOCK_EX), LOCK_TIMEOUT_S):
                raise StackError(f"{path} is still locked by another command after {LOCK_TIMEOUT_S:.0f} s")
        yield


def try_lock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
