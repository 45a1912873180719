"""From the till to the owner's numbers, with the real processes, and with those processes killed."""

import itertools
import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import grpc
import pika
import psycopg
import pytest

from deploy.local.machine import wait_until
from pos.__main__ import commands
from pos.simulator import simulate
from pos.tills import Tills
from retail.analytics.v1.analytics_service_pb2 import DailySales, ListDailySalesRequest
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub
from tests.integration.processes import COMMANDS, Processes

EXAMPLE = Path(__file__).parents[3] / "proto" / "events" / "purchase_created.v1.example.json"
KILLS = 8  # each process twice
SALES = 2_400
PATIENCE_S = 120.0


@pytest.fixture
def processes(purchases_db: str, analytics_db: str, amqp_url: str, tmp_path: Path) -> Iterator[Processes]:
    with Processes.all_running(purchases_db, analytics_db, amqp_url, tmp_path) as running:
        yield running


def run_demo(processes: Processes, monkeypatch: pytest.MonkeyPatch, report: Path, *arguments: str) -> int:
    monkeypatch.setenv("PURCHASES_TARGET", processes.address["purchases"])
    monkeypatch.setenv("ANALYTICS_TARGET", processes.address["analytics"])
    monkeypatch.setenv("CONSUMER_TARGET", processes.address["consumer"])
    return commands.carry_out(["demo", *arguments, "--report", str(report)])


def daily_sales(processes: Processes) -> list[DailySales]:
    with grpc.insecure_channel(processes.address["analytics"]) as channel:
        return list(
            AnalyticsServiceStub(channel).ListDailySales(ListDailySalesRequest(), timeout=PATIENCE_S).daily_sales
        )


def test_demo_agrees_and_repeats(processes: Processes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The demo's figures are those of its input, to the cent; running it again changes none."""
    sales = list(itertools.islice(simulate(1), 400))
    reports = []
    for name in ("first", "second"):
        assert run_demo(processes, monkeypatch, tmp_path / name, "--limit", "400") == 0
        reports.append(json.loads((tmp_path / name).read_text(), parse_float=Decimal))
    first, second = reports
    assert first["purchases"] == len(sales)
    assert first["items"] == sum(len(sale.items) for sale in sales)
    assert first["revenue"] * 100 == sum(sale.total_cents for sale in sales)
    assert first["unique_customers"] == len({sale.customer_id for sale in sales if sale.customer_id})
    assert first["duplicates_sent"] > 0
    assert first["control_totals_agree"] is True
    same = first.keys() - {"seconds", "purchases_per_second"}
    assert {key: first[key] for key in same} == {key: second[key] for key in same}


def test_example_event_of_the_specification(processes: Processes, amqp_url: str) -> None:
    """Published by hand, the example counts exactly, its line of two units included; ten times, it counts once."""
    body = EXAMPLE.read_bytes()
    with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for _ in range(10):
            channel.basic_publish("purchases", "purchases.created", body, mandatory=True)
        queue = channel.queue_declare("purchases.created", passive=True)
        assert queue.method.consumer_count == 1

    def counted() -> bool:
        return bool(daily_sales(processes))

    assert wait_until(counted, PATIENCE_S)
    # A second, distinct event behind the ten shows that all of them were worked off.
    other = json.loads(body, parse_float=Decimal)
    text = (
        body.decode()
        .replace(other["event_id"], "019b92cd-80a1-7000-8000-000000000001")
        .replace("2026-01-06T10:14", "2026-01-07T10:14")
        .replace('"2026-01-06"', '"2026-01-07"')
    )
    with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
        connection.channel().basic_publish("purchases", "purchases.created", text.encode())
    assert wait_until(lambda: len(daily_sales(processes)) == 2, PATIENCE_S)
    row = daily_sales(processes)[0]
    assert (row.sales_date.day, row.revenue.value, row.item_count, row.purchase_count) == (6, "142.50", 3, 1)


def test_kill_9_of_each_process_changes_no_number(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, purchases_db: str
) -> None:
    """Whichever process dies in the middle of the work and is started again: nothing is lost, nothing counts twice."""
    sales = list(itertools.islice(simulate(3), SALES))
    with Tills(sales, processes.address["purchases"], seed=3) as tills:
        for kill, name in enumerate(itertools.islice(itertools.cycle(COMMANDS), KILLS), start=1):
            goal = SALES * kill // (KILLS + 1)
            assert wait_until(lambda goal=goal: tills.recorded >= goal, PATIENCE_S)  # type: ignore[misc]
            processes.kill(name)
            processes.start(name)
        assert tills.wait(PATIENCE_S)
    for name in COMMANDS:
        processes.wait_ready(name)
    assert run_demo(processes, monkeypatch, tmp_path / "report", "--seed", "3", "--limit", str(SALES)) == 0
    report = json.loads((tmp_path / "report").read_text(), parse_float=Decimal)
    assert report["purchases"] == SALES
    assert report["revenue"] * 100 == sum(sale.total_cents for sale in sales)
    assert report["control_totals_agree"] is True
    with psycopg.connect(purchases_db) as connection:
        rows = connection.execute("SELECT status, count(*), max(attempts) FROM outbox_events GROUP BY 1").fetchall()
    assert rows == [("SENT", SALES, 0)]


def test_every_process_stops_politely(processes: Processes) -> None:
    """SIGTERM: each ends by itself within its bound, with exit code 0 and no traceback in its log."""
    assert {name: processes.stop(name) for name in COMMANDS} == dict.fromkeys(COMMANDS, 0)
    for name in COMMANDS:
        assert "Traceback" not in processes.log(name)
        assert '"error"' not in processes.log(name).splitlines()[-1]
