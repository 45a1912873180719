"""The dashboard: its file is what Grafana's own types hold, and a real Prometheus answers every question in it."""

import json
import math
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy import dashboard
from deploy.local.machine import wait_until
from deploy.local.prometheus import Prometheus
from pos.analytics import AnalyticsClient
from pos.client import connect
from tests.integration.whole.test_alarms import Scraped, sell

PATIENCE_S = 120.0
SHOWN: dict[str, Any] = json.loads(dashboard.FILE.read_text())
PANELS = [panel for panel in SHOWN["panels"] if panel["type"] != "row"]


def questions() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_it_is_what_grafanas_types_hold() -> None:
    """Nothing is lost on the way through them, and nothing is added."""
    plugins.register_default_plugins()
    loaded = Dashboard.from_json(SHOWN)
    assert json.loads(json.dumps(loaded, cls=JSONEncoder)) == SHOWN
    assert len(loaded.panels or ()) == len(SHOWN["panels"])


def test_panels_can_be_told_apart_and_say_what_is_normal() -> None:
    ids = [panel["id"] for panel in SHOWN["panels"]]
    assert len(set(ids)) == len(ids)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert panel["description"].startswith("Normal: "), panel["title"]
        assert {target["refId"] for target in panel["targets"]} == set("ABCDEF"[: len(panel["targets"])])


@pytest.fixture
def processes(purchases_db: str, analytics_db: str, amqp_url: str, tmp_path: Path) -> Iterator[Scraped]:
    with Scraped.all_running(purchases_db, analytics_db, amqp_url, tmp_path) as running:
        yield running


def test_every_question_has_an_answer(processes: Scraped, tmp_path: Path) -> None:
    """While something is sold and somebody asks, none is empty."""
    seeds = count(1)
    with connect(processes.address["analytics"]) as channel:
        owner = AnalyticsClient(channel)
        prometheus = Prometheus(tmp_path / "prometheus", every="1s")
        prometheus.start(processes.pages)
        try:
            unanswered = list(questions())

            def answered() -> bool:
                sell(processes, next(seeds), 5)
                owner.summary()
                unanswered[:] = [expr for expr in unanswered if not values(prometheus, expr)]
                return not unanswered

            assert wait_until(answered, PATIENCE_S), unanswered
            for annotation in SHOWN["annotations"]["list"]:
                values(prometheus, annotation["expr"])  # a healthy system has none, and the question is understood
        finally:
            prometheus.stop()


def values(prometheus: Prometheus, expr: str) -> list[float]:
    """What is known; NaN is what a process does not know yet."""
    answer = prometheus.get("/api/v1/query", query=expr.replace("$__rate_interval", "10s"))
    found = [float(series["value"][1]) for series in answer["result"]]
    return [value for value in found if not math.isnan(value)]
