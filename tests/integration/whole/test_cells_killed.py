"""kill -9 of each part of one cell, while the other sells: its sales, answers and tokens go on; nothing is promised too
early, and nothing is called wrong.
"""

import itertools
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import grpc
import psycopg
import pytest

from chassis import wire
from deploy.local.machine import wait_until
from deploy.local.postgres import Postgres
from deploy.local.stack import Stack
from pos.client import Item, PosClient, Recorded, Sale
from pos.errors import OutcomeUnknown
from retail.analytics.v1 import analytics_service_pb2 as analytics_pb
from retail.analytics.v1 import audit_service_pb2 as audit_pb
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub
from retail.analytics.v1.audit_service_pb2_grpc import AuditServiceStub
from tests.integration.local_chain import local_chain

FIRST, SECOND = 1, 2  # branches: of the cell that is well, and of the one that is not
WAIT_S = 90.0
IMPATIENT_S = 2.0
SALES_MORE = 5
AGREED, PENDING = audit_pb.AUDIT_VERDICT_AGREED, audit_pb.AUDIT_VERDICT_PENDING


class Chain:
    """What runs, and the questions to it. The second cell's database is on a server of its own."""

    def __init__(self, stack: Stack, second: Postgres, calls: ExitStack) -> None:
        self.stack, self.second = stack, second
        targets = stack.client_environ()
        self.purchases = targets["PURCHASES_TARGET"]
        analytics, consumer = (
            calls.enter_context(grpc.insecure_channel(targets[f"{name}_TARGET"])) for name in ("ANALYTICS", "CONSUMER")
        )
        self.analytics: Any = AnalyticsServiceStub(analytics)
        self.audit: Any = AuditServiceStub(consumer)

    def kill(self, name: str) -> None:
        process = self.stack.processes()[name]
        assert process and not process.end(signal.SIGKILL)

    def start(self) -> None:
        with self.stack.changing():
            self.stack.start()

    def read(self, statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.stack.postgres.url("analytics")) as connection:
            return connection.execute(statement).fetchall()  # type: ignore[call-overload, no-any-return, unused-ignore]

    def marks(self) -> dict[str, datetime]:
        return dict(self.read("SELECT cell, complete_through_at FROM cell_marks"))

    def through(self) -> datetime:
        ((moment,),) = self.read("SELECT complete_through_at FROM freshness")
        assert isinstance(moment, datetime)
        return moment

    def compare(self, day: date) -> Any:
        request = audit_pb.CompareControlTotalsRequest(first_date=wire.date(day), last_date=wire.date(day))
        return self.audit.CompareControlTotals(request, timeout=WAIT_S)

    def agrees(self, day: date) -> bool:
        """Not while a cell does not answer."""
        with suppress(grpc.RpcError):
            return bool(self.compare(day).verdict == AGREED)
        return False

    def status(self) -> Any:
        return self.audit.GetAuditStatus(audit_pb.GetAuditStatusRequest(), timeout=WAIT_S)

    def tells_who_holds_it_back(self, cell: str, since: datetime) -> None:
        """Every answer of the query server, the audit, the page of operations and the metrics."""
        answer = self.analytics.GetSalesSummary(analytics_pb.GetSalesSummaryRequest(), timeout=WAIT_S)
        assert answer.furthest_behind_cell == cell
        first, *others = self.status().cell_marks
        assert first.cell == cell and first.complete_through_time.ToDatetime(UTC) < since
        assert answer.complete_through_time == first.complete_through_time
        assert [it.cell for it in others] == ["default"] and others[0].lag.ToTimedelta() < first.lag.ToTimedelta()
        endpoints = self.stack.endpoints()
        until(
            lambda: f"Cell {cell}" in text_of(f"http://{endpoints['pages'][0]}/operations"), "the page names the cell"
        )
        until(lambda: lag_of(cell, endpoints["consumer"][1]) > lag_of("default", endpoints["consumer"][1]), "metrics")

    def nothing_is_wrong(self) -> None:
        status = self.status()
        assert (status.wrong_count, status.foreign_event_count) == (0, 0), status


class Selling:
    """Sells in the first cell while the block runs; each sale is looked for by its token at once."""

    def __init__(self, chain: Chain) -> None:
        self._chain, self._stop = chain, threading.Event()
        self._thread = threading.Thread(target=self._sell, name="selling")
        self.seen = 0  # sales that the read models have shown
        self.trouble: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sell(self) -> None:
        try:
            with PosClient.at(self._chain.purchases) as till:
                while not self._stop.is_set():
                    token = till.create_purchase(a_sale(FIRST, datetime.now(UTC))).consistency_token
                    request = analytics_pb.GetSalesSummaryRequest(branch_id=FIRST, consistency_token=token)
                    counted = self._chain.analytics.GetSalesSummary(request, timeout=WAIT_S).purchase_count
                    assert counted == self.seen + 1
                    self.seen += 1
        except Exception as error:
            self.trouble = error

    def goes_on(self) -> None:
        goal = self.seen + SALES_MORE
        assert wait_until(lambda: self.seen >= goal or self.trouble is not None, WAIT_S), "it sells no more"
        if self.trouble:
            raise self.trouble


_receipts = itertools.count(1)


def a_sale(branch_id: int, at: datetime) -> Sale:
    return Sale(
        receipt_id=f"R{next(_receipts)}",
        branch_id=branch_id,
        cashier_id=1,
        pos_id="POS-1",
        items=[Item(1001, 250)],
        purchase_time=at,
    )


def text_of(url: str) -> str:
    with urllib.request.urlopen(url, timeout=WAIT_S) as reply:
        return str(reply.read().decode())


def lag_of(cell: str, metrics: str) -> float:
    """In seconds; negative while it is not told."""
    lines = dict(line.rsplit(" ", 1) for line in text_of(metrics).splitlines() if not line.startswith("#"))
    return float(lines.get(f'analytics_cell_complete_through_lag_seconds{{cell="{cell}"}}', "-1"))


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    second = Postgres(tmp_path / "the other's postgres")
    second.start()
    try:
        second.ensure_database("purchases", "postgres")
        with ExitStack() as calls:
            url = second.url("purchases")
            stack = calls.enter_context(local_chain(tmp_path, PURCHASES_2_DATABASE_URL=url))
            yield Chain(stack, second, calls)
    finally:
        second.stop()


def until(condition: Callable[[], bool], what: str) -> None:
    assert wait_until(condition, WAIT_S), f"not in time: {what}"


@pytest.mark.timeout(600)
def test_the_other_cell_goes_on(chain: Chain) -> None:
    """Each day below has one sale of the second cell: of the days before, everything is counted."""
    before = datetime(2026, 3, 2, 12, tzinfo=UTC)
    days = [before + timedelta(days=n) for n in range(4)]
    with PosClient.at(chain.purchases) as till, Selling(chain) as selling:
        till.create_purchase(a_sale(SECOND, days[0]))
        selling.goes_on()
        until(lambda: chain.agrees(days[0].date()), "the first sale is counted")

        without_its_relay(chain, till, selling, counted=days[0], late=days[1])
        without_its_service(chain, till, selling, days[2])
        without_its_database(chain, till, selling, days[3])

        for day in days:
            until(lambda day=day: chain.agrees(day.date()), f"{day} agrees")  # type: ignore[misc]
        chain.nothing_is_wrong()


def without_its_relay(chain: Chain, till: PosClient, selling: Selling, *, counted: datetime, late: datetime) -> None:
    """It records, and its sales wait. The time of all stays before the first that waits, and its day is PENDING."""
    chain.kill("relay-2")
    waiting = till.create_purchase(a_sale(SECOND, late)).purchase
    selling.goes_on()
    until(lambda: chain.marks()["default"] > waiting.create_time, "the other cell's mark goes on")
    selling.goes_on()
    assert chain.marks()["cell-2"] < waiting.create_time
    assert chain.through() < waiting.create_time
    chain.tells_who_holds_it_back("cell-2", waiting.create_time)
    compared = chain.compare(late.date())
    assert [(row.branch_id, row.verdict) for row in compared.rows] == [(SECOND, PENDING)]
    assert (compared.verdict, compared.pending_count) == (PENDING, 1)
    assert chain.compare(counted.date()).verdict == AGREED
    chain.nothing_is_wrong()
    chain.start()
    until(lambda: chain.through() > waiting.create_time, "the time goes on")
    assert chain.agrees(late.date())


def without_its_service(chain: Chain, till: PosClient, selling: Selling, day: datetime) -> None:
    """Its tills cannot sell, and get through with the same sale later. Of its days nothing is said meanwhile."""
    chain.kill("purchases-2")
    sale = a_sale(SECOND, day)
    with PosClient.at(chain.purchases, total_timeout_s=IMPATIENT_S) as impatient, pytest.raises(OutcomeUnknown):
        impatient.create_purchase(sale)
    selling.goes_on()
    with pytest.raises(grpc.RpcError) as refused:
        chain.compare(day.date())
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    chain.nothing_is_wrong()
    chain.start()
    stored: Recorded = till.create_purchase(sale)
    assert not stored.replayed
    until(lambda: chain.through() > stored.purchase.create_time, "the time passes its sale")


def without_its_database(chain: Chain, till: PosClient, selling: Selling, day: datetime) -> None:
    """Neither its service nor its relay can say anything: the time of all stands still, and then goes on."""
    last = till.create_purchase(a_sale(SECOND, day)).purchase
    chain.second.kill()
    killed_at = datetime.now(UTC)
    selling.goes_on()
    until(lambda: chain.marks()["default"] > killed_at, "the other cell's mark goes on")
    selling.goes_on()
    assert chain.through() <= chain.marks()["cell-2"] <= killed_at
    chain.nothing_is_wrong()
    chain.second.start()
    until(lambda: chain.through() > killed_at, "the time goes on, past what was sold last")
    assert killed_at > last.create_time
