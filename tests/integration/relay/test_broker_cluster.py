"""Three nodes of RabbitMQ, of which any one may be lost."""

import itertools
import json
import time
import uuid
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pika
import pytest
from pika.exceptions import AMQPError

from deploy.local.machine import wait_until
from pos.simulator import simulate
from pos.tills import Tills
from tests.broker_cluster import Node, cluster, leader, url_of
from tests.integration.processes import Processes
from tests.integration.purchase_events import query
from tests.integration.whole.test_whole_path import PATIENCE_S, run_demo

SALES = 1_500
PROBE = "probe"
GOES_ON_WITHIN_S = 10.0  # once the others take messages, which took 0.2 to 1.0 s; counting goes on half a second later
TRIES_MAX = 2  # once the broker can work again: one may be under way just then
TRIES = {  # what each process says when it tries (again)
    "relay": ("connected to the broker", "breaker open: the broker does not take events"),
    "consumer": ("no deliveries; trying again",),
}


@pytest.mark.timeout(600)
def test_a_node_is_lost_in_the_middle_of_the_work(
    purchases_db: str, analytics_db: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """First the one that leads the queue, then, when that is back, the next that does: relay and consumer go on with
    the rest, as soon as the rest can."""
    with cluster(tmp_path / "rabbitmq") as nodes:
        sales = list(itertools.islice(simulate(5), SALES))
        with Processes.all_running(purchases_db, analytics_db, url_of(nodes), tmp_path) as processes:
            with Tills(sales, processes.address["purchases"], seed=5) as tills:
                assert wait_until(lambda: tills.recorded >= SALES // 4, PATIENCE_S)
                lost = leader(nodes)
                assert lost
                lose(lost, nodes, processes, analytics_db, seed=7)
                assert tills.wait(PATIENCE_S)
            assert run_demo(processes, monkeypatch, tmp_path / "one", "--seed", "5", "--limit", str(SALES)) == 0
            lost.start()
            other = leader(nodes)
            assert other and other is not lost
            lose(other, nodes, processes, analytics_db, seed=8)
            assert run_demo(processes, monkeypatch, tmp_path / "two", "--seed", "6", "--limit", str(SALES)) == 0


def lose(lost: Node, nodes: Sequence[Node], processes: Processes, analytics_db: str, seed: int) -> None:
    """Kill the node: once the others can take messages, our processes are there within a try or two, and count what
    was sold since."""
    declare_probe(lost)
    lost.kill()
    begin = time.time()
    sales = list(itertools.islice(simulate(seed), SALES))
    counted = f"SELECT 1 FROM analytics_event_log WHERE event_id > '{uuid.UUID(int=int(begin * 1000) << 80)}' LIMIT 1"
    with Tills(sales, processes.address["purchases"], seed=seed) as tills:
        assert wait_until(lambda: takes_messages([node for node in nodes if node is not lost]), PATIENCE_S)
        able = time.time()
        assert wait_until(lambda: bool(query(analytics_db, counted)), GOES_ON_WITHIN_S)
        print(f"{lost.name} lost: others able after {able - begin:.1f} s, counting after {time.time() - begin:.1f} s")
        assert tills.wait(PATIENCE_S)
    for name, said in TRIES.items():
        tries = [line for line in log_since(processes, name, able) if line["event"] in said]
        assert len(tries) <= TRIES_MAX, tries


def declare_probe(node: Node) -> None:
    """A queue like ours, with the same leader."""
    arguments = {"x-queue-type": "quorum", "x-queue-leader-locator": "client-local"}
    with pika.BlockingConnection(pika.URLParameters(node.url)) as connection:
        channel = connection.channel()
        channel.queue_delete(PROBE)
        channel.queue_declare(PROBE, durable=True, arguments=arguments)


def takes_messages(nodes: Sequence[Node]) -> bool:
    """Whether one of the nodes confirms a message to that queue, by now."""
    parameters = pika.URLParameters(nodes[0].url)
    parameters.socket_timeout = parameters.stack_timeout = parameters.blocked_connection_timeout = 10
    try:
        with pika.BlockingConnection(parameters) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            channel.basic_publish("", PROBE, b"", mandatory=True)
    except AMQPError:
        return False
    return True


def log_since(processes: Processes, name: str, since: float) -> list[dict[str, str]]:
    lines = [json.loads(line) for line in processes.log(name).splitlines() if line.startswith("{")]
    return [line for line in lines if datetime.fromisoformat(line["timestamp"]).timestamp() > since]
