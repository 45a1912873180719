"""Three nodes of RabbitMQ as one cluster, each of which can be lost and come back.

with cluster(directory) as nodes:
    leader(nodes).kill()
"""

import secrets
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from deploy.local.machine import StackError, pick_port, wait_until, write_private
from deploy.local.rabbitmq import USERS, RabbitMQ

NAMES = ("one", "two", "three")
QUEUE = "purchases.created"
COMPLETE_TIMEOUT_S = 180.0


class Node(RabbitMQ):
    """One of a cluster: known to the others by its name, to a port mapper that they share."""

    def __init__(self, directory: Path, mapper_port: int, log: Path) -> None:
        self._mapper_port = mapper_port
        settings = {
            "cluster_formation.peer_discovery_backend": "classic_config",
            **{f"cluster_formation.classic_config.nodes.{n}": f"{name}@localhost" for n, name in enumerate(NAMES, 1)},
        }
        super().__init__(directory, log=log, settings=settings)

    @property
    def name(self) -> str:
        return f"{self.directory.name}@localhost"

    def stop(self) -> bool:
        """The node alone, in good order; its port mapper may be the others', too."""
        return self.process.end(signal.SIGTERM) if self.process else False

    def kill(self) -> None:
        """The same, as if its machine had lost power."""
        if self.process:
            self.process.end(signal.SIGKILL)

    def end(self) -> None:
        """With its port mapper, when all are to end."""
        super().kill()

    def _port(self, name: str, in_use: bool) -> int:
        return self._mapper_port if name == "epmd" else super()._port(name, in_use)

    def _environ(self, running: bool) -> dict[str, str]:
        return {**super()._environ(running), "RABBITMQ_NODENAME": self.name}


def make_nodes(directory: Path, logs: Path) -> list[Node]:
    """None of them runs yet. All know the same passwords and the same cookie."""
    mapper_port, cookie = pick_port(), secrets.token_hex(32)
    nodes = [Node(directory / name, mapper_port, logs / f"rabbitmq-{name}.log") for name in NAMES]
    passwords = {f"password of {user}": nodes[0].notes.password(user) for user in USERS}
    for node in nodes:
        node.notes.write({**node.notes.read(), **passwords})
        write_private(node.directory / ".erlang.cookie", cookie)
    return nodes


def start(nodes: Sequence[Node]) -> None:
    """All that do not run; done when each knows the others."""
    for node in nodes:
        node.launch()
    for node in nodes:
        node.wait()
    first = nodes[0]

    def complete() -> bool:
        return all(name in first.ctl("cluster_status", "--formatter", "json") for name in NAMES)

    if not wait_until(complete, COMPLETE_TIMEOUT_S):
        raise StackError(f"the nodes have not found each other; see {first.log}")


def url_of(nodes: Sequence[Node], user: str = "local") -> str:
    """Of all of them, in the form that the services take."""
    return nodes[0].url_of(user).replace(nodes[0].address, ",".join(node.address for node in nodes))


def leader(nodes: Sequence[Node]) -> Node | None:
    """The node that leads the queue, as far as those that run know."""
    for alive in (node for node in nodes if node.process):
        with suppress(StackError):
            for line in alive.ctl("list_queues", "name", "leader").splitlines():
                queue, _, name = line.partition("\t")
                if queue == QUEUE:
                    return next((node for node in nodes if node.name == name), None)
    return None


@contextmanager
def cluster(directory: Path) -> Iterator[Sequence[Node]]:
    nodes = make_nodes(directory, directory)
    try:
        start(nodes)
        yield nodes
    finally:
        for node in reversed(nodes):
            node.end()
