"""Three nodes of RabbitMQ, of which any one may be lost."""

import itertools
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.local.machine import pick_port, wait_until
from deploy.local.rabbitmq import USER, RabbitMQ
from pos.simulator import simulate
from pos.tills import Tills
from tests.integration.processes import all_processes
from tests.integration.whole.test_whole_path import PATIENCE_S, run_demo

NODES = ("one", "two", "three")
SALES = 1_500
QUEUE = "purchases.created"


class Node(RabbitMQ):
    """One of a cluster: known to the others by its name, to a port mapper that they share."""

    def __init__(self, directory: Path, mapper_port: int, log: Path) -> None:
        self._mapper_port = mapper_port
        settings = {
            "cluster_formation.peer_discovery_backend": "classic_config",
            **{f"cluster_formation.classic_config.nodes.{n}": f"{name}@localhost" for n, name in enumerate(NODES, 1)},
        }
        super().__init__(directory, log=log, settings=settings)

    @property
    def name(self) -> str:
        return f"{self.directory.name}@localhost"

    def kill(self) -> None:
        """The node alone; its port mapper may be the others', too."""
        if self.process:
            self.process.end(signal.SIGKILL)

    def _port(self, name: str, in_use: bool) -> int:
        return self._mapper_port if name == "epmd" else super()._port(name, in_use)

    def _environ(self, running: bool) -> dict[str, str]:
        return {**super()._environ(running), "RABBITMQ_NODENAME": self.name}


@contextmanager
def cluster(directory: Path) -> Iterator[Sequence[Node]]:
    mapper_port = pick_port()
    nodes = [Node(directory / name, mapper_port, directory / f"{name}.log") for name in NODES]
    first = nodes[0]
    for node in nodes:
        node.directory.mkdir(parents=True)
        node.notes.write({f"password of {USER}": first.notes.password(USER), **node.notes.read()})
        (node.directory / ".erlang.cookie").write_text("c" * 64)
        (node.directory / ".erlang.cookie").chmod(0o400)
    try:
        for node in nodes:
            node.launch()
        for node in nodes:
            node.wait()

        def complete() -> bool:
            return all(name in first.ctl("cluster_status", "--formatter", "json") for name in NODES)

        assert wait_until(complete, PATIENCE_S)
        yield nodes
    finally:
        for node in reversed(nodes):
            node.kill()
        for node in nodes:
            node.stop()


def leader(nodes: Sequence[Node], alive: Node) -> Node:
    """The node that leads the queue."""
    for line in alive.ctl("list_queues", "name", "leader").splitlines():
        queue, _, name = line.partition("\t")
        if queue == QUEUE:
            return next(node for node in nodes if node.name == name)
    raise AssertionError("the queue is not there")


@pytest.mark.timeout(600)
def test_a_node_is_lost_in_the_middle_of_the_work(
    purchases_db: str, analytics_db: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """First the one that leads the queue, then, when that is back, another: relay and consumer go on with the rest."""
    with cluster(tmp_path / "rabbitmq") as nodes:
        first = nodes[0]
        hosts = ",".join(node.address for node in nodes)
        url = first.url.replace(first.address, hosts)
        sales = list(itertools.islice(simulate(5), SALES))
        with all_processes(purchases_db, analytics_db, url, tmp_path) as processes:
            with Tills(sales, processes.address["purchases"], seed=5) as tills:
                assert wait_until(lambda: tills.recorded >= SALES // 4, PATIENCE_S)
                lost = leader(nodes, first)
                lost.kill()
                assert tills.wait(PATIENCE_S)
            assert run_demo(processes, monkeypatch, tmp_path / "one", "--seed", "5", "--limit", str(SALES)) == 0
            lost.start()
            other = leader(nodes, lost)
            assert other is not lost
            other.kill()
            assert run_demo(processes, monkeypatch, tmp_path / "two", "--seed", "6", "--limit", str(SALES)) == 0
