"""Metrics and alarms as Prometheus has them: every page is described, every alarm fires for its cause."""

import re
import subprocess
from collections.abc import Iterator, Set
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.local.machine import wait_until
from deploy.local.prometheus import ALARMS, Prometheus, program
from pos.simulator import simulate
from pos.tills import Tills
from tests.conftest import ROOT
from tests.integration.conftest import free_address
from tests.integration.processes import COMMANDS, Processes

UNIT_TESTS = ALARMS.with_name("alarms_test.yaml")
RUNBOOK = ROOT / "deploy" / "RUNBOOK.md"
PAGE = ROOT / "docs" / "metrics.md"
OTHERS = ("python_", "process_", "scrape_", "up")  # those of every program in Python, and Prometheus' own
LABELS = {"grpc_code", "grpc_method", "grpc_service"}
PATIENCE_S = 120.0

# How something is set up, what a caller is told at once, and what no process of ours can measure: sales fail then.
WITHOUT_ALARM = {
    "Users of the broker",
    "Clusters",
    "A country changes its clocks",
    "A move of a branch was interrupted",
    "The disk of a database is full",
    "REBUILD_RUNNING, and nobody runs one",
}

RULES = [rule for group in yaml.safe_load(ALARMS.read_text())["groups"] for rule in group["rules"]]
NAMES = [rule["alert"] for rule in RULES]


def test_alarms_at_their_times() -> None:
    """`promtool` knows nothing of our processes: each alarm is quiet before its time, and fires after it."""
    done = subprocess.run(
        [program("promtool"), "test", "rules", UNIT_TESTS],
        cwd=ALARMS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tests = {test["name"] for test in yaml.safe_load(UNIT_TESTS.read_text())["tests"]}
    assert set(NAMES) <= tests, "an alarm without a test"


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_every_alarm_names_its_section_of_the_runbook(rule: dict[str, Any]) -> None:
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert ROOT / page == RUNBOOK
    headings = re.findall(r"^#+ (.*)$", RUNBOOK.read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert anchor in anchors
    assert rule["labels"]["severity"] in {"page", "ticket"}
    (row,) = re.findall(
        rf"^\| `{rule['alert']}` \| (\w+) \| .+ \| \[.+\]\(#(.+)\) \|$", RUNBOOK.read_text(), re.MULTILINE
    )
    assert row == (rule["labels"]["severity"], anchor), "the runbook's own table of alarms"


def test_every_case_has_an_alarm() -> None:
    """Of the runbook's other cases, but for those that nothing can tell, or that are none."""
    cases = re.findall(r"^### (.*)$", RUNBOOK.read_text().partition("## Other cases")[2], re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", case.lower()).replace(" ", "-"): case for case in cases}
    alarmed = {anchors.get(rule["annotations"]["runbook"].partition("#")[2]) for rule in RULES}
    assert {*cases} - alarmed == WITHOUT_ALARM


class Scraped(Processes):
    """The four processes, with pages for Prometheus at known addresses."""

    def __init__(self, purchases_url: str, analytics_url: str, amqp_url: str, logs: Path) -> None:
        super().__init__(purchases_url, analytics_url, amqp_url, logs)
        self.pages = {name: free_address() for name in COMMANDS}
        self.environ |= {f"{name.upper()}_METRICS_LISTEN": page for name, page in self.pages.items()}


@pytest.fixture
def processes(purchases_db: str, analytics_db: str, amqp_url: str, tmp_path: Path) -> Iterator[Scraped]:
    with Scraped.all_running(purchases_db, analytics_db, amqp_url, tmp_path) as running:
        sell(running, 1, 20)
        yield running


def sell(processes: Processes, seed: int, count: int) -> None:
    with Tills(list(islice(simulate(seed), count)), processes.address["purchases"], seed=seed) as tills:
        assert tills.wait(PATIENCE_S)


def test_every_metric_is_described(processes: Scraped, tmp_path: Path) -> None:
    """docs/metrics.md has exactly what each process tells; a healthy system raises no alarm."""
    prometheus = Prometheus(tmp_path / "prometheus", every="1s")
    prometheus.start(processes.pages)
    try:

        def scraped() -> bool:
            targets = prometheus.get("/api/v1/targets")["activeTargets"]
            return [target["health"] for target in targets] == ["up"] * len(COMMANDS)

        assert wait_until(scraped, PATIENCE_S)
        told = {
            name: {
                entry["metric"]
                for entry in prometheus.get("/api/v1/targets/metadata", match_target=f'{{job="{name}"}}')
                if not entry["metric"].startswith(OTHERS)
            }
            for name in COMMANDS
        }
        assert told == {name: described(name) for name in COMMANDS}
        rules = [rule for group in prometheus.get("/api/v1/rules")["groups"] for rule in group["rules"]]
        assert {rule["name"]: rule["lastError"] for rule in rules if "lastError" in rule} == {}
        used = set(
            re.findall(
                r"\b(?:purchases|relay|analytics|grpc|retail)_[a-z_]+\b", " ".join(rule["query"] for rule in rules)
            )
        )
        assert {name.removesuffix("_total") for name in used - LABELS} <= {
            name.removesuffix("_total") for names in told.values() for name in names
        }
        assert firing(prometheus) == set()
    finally:
        prometheus.stop()


def firing(prometheus: Prometheus) -> Set[str]:
    return {
        alert["labels"]["alertname"]
        for alert in prometheus.get("/api/v1/alerts")["alerts"]
        if alert["state"] == "firing"
    }


def described(process: str) -> Set[str]:
    """The metrics that the page's sections have for a process: every process's, and its own."""
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    rows = sections["Every process"] + sections[process.capitalize()]
    return {name.removesuffix("_total") for name in re.findall(r"^\| `([a-z_]+)", rows, re.MULTILINE)}
