"""Where RabbitMQ's programs are: installed on this machine, or unpacked below .local by deploy/bootstrap.sh."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from deploy.local.machine import StackError

ROOT = Path(__file__).resolve().parents[2]
UNPACKED = ROOT / ".local" / "rabbitmq-server"

# Debian's own /usr/sbin/rabbitmq-server is passed over: it changes user and directory. The others are Homebrew's.
PLACES = ("/usr/lib/rabbitmq/bin", "/opt/homebrew/sbin", "/usr/local/sbin", "/home/linuxbrew/.linuxbrew/sbin")


@dataclass(frozen=True)
class Programs:
    """A directory that holds rabbitmq-server and rabbitmqctl, and the PATH on which they find their Erlang."""

    directory: Path
    path: str

    @property
    def server(self) -> Path:
        return self.directory / "rabbitmq-server"

    @property
    def ctl(self) -> Path:
        return self.directory / "rabbitmqctl"

    @property
    def epmd(self) -> Path:
        """The port mapper; generic packages have it beside `erl` only."""
        if epmd := shutil.which("epmd", path=self.path):
            return Path(epmd)
        if erl := shutil.which("erl", path=self.path):
            return Path(erl).resolve().parent / "epmd"
        raise StackError("neither `epmd` nor `erl` is on the PATH, though RabbitMQ is installed")


def find() -> Programs | None:
    """What is installed, rather than what was unpacked for want of it."""
    return installed() or unpacked()


def fetch() -> None:
    """Unpack them below .local, once.

    Raises:
        StackError: they could not be fetched.
    """
    command = ["sh", "deploy/bootstrap.sh", "rabbitmq"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StackError(done.stderr.strip())


def installed() -> Programs | None:
    found = [Path(place, "rabbitmq-server") for place in PLACES]
    if on_path := shutil.which("rabbitmq-server"):
        found.append(Path(on_path))
    for server in found:
        if server.exists():
            return Programs(server.parent, os.environ.get("PATH", os.defpath))
    return None


def unpacked(below: Path = UNPACKED) -> Programs | None:
    if not below.is_dir():
        return None
    path = os.pathsep.join([str(below / "usr/lib/erlang/bin"), os.environ.get("PATH", os.defpath)])
    return Programs(below / "usr/lib/rabbitmq/bin", path)
