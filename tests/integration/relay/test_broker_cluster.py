"""Three nodes of RabbitMQ, of which any one may be lost."""

import itertools
from pathlib import Path

import pytest

from deploy.local.machine import wait_until
from pos.simulator import simulate
from pos.tills import Tills
from tests.broker_cluster import cluster, leader, url_of
from tests.integration.processes import all_processes
from tests.integration.whole.test_whole_path import PATIENCE_S, run_demo

SALES = 1_500


@pytest.mark.timeout(600)
def test_a_node_is_lost_in_the_middle_of_the_work(
    purchases_db: str, analytics_db: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """First the one that leads the queue, then, when that is back, another: relay and consumer go on with the rest."""
    with cluster(tmp_path / "rabbitmq") as nodes:
        sales = list(itertools.islice(simulate(5), SALES))
        with all_processes(purchases_db, analytics_db, url_of(nodes), tmp_path) as processes:
            with Tills(sales, processes.address["purchases"], seed=5) as tills:
                assert wait_until(lambda: tills.recorded >= SALES // 4, PATIENCE_S)
                lost = leader(nodes)
                assert lost
                lost.kill()
                assert tills.wait(PATIENCE_S)
            assert run_demo(processes, monkeypatch, tmp_path / "one", "--seed", "5", "--limit", str(SALES)) == 0
            lost.start()
            other = leader(nodes)
            assert other and other is not lost
            other.kill()
            assert run_demo(processes, monkeypatch, tmp_path / "two", "--seed", "6", "--limit", str(SALES)) == 0
