"""The till's open stream against the real service, which is killed, stopped and cut off under it."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import psycopg
import pytest

from pos.client import OpenStream, PosClient, Recorded, Sale, connect
from pos.errors import CustomerUnknown, IdempotencyKeyReused, InvalidSale, OutcomeUnknown, PosError, ReceiptTaken
from pos.simulator import simulate
from tests.conftest import WAIT_S
from tests.faults.proxy import Loop, Proxy
from tests.integration.processes import Processes
from tests.integration.purchases.test_create_purchase import assert_whole

TILLS = 64


@pytest.fixture
def processes(purchases_db: str, tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(purchases_db, "", "", tmp_path)
    try:
        processes.start("purchases")
        processes.wait_ready("purchases")
        yield processes
    finally:
        processes.end_all()


@pytest.fixture
def proxy(processes: Processes) -> Iterator[Proxy]:
    """Between tills and service."""
    loop = Loop()
    host, port = processes.address["purchases"].split(":")
    proxy = Proxy(loop, "purchases", (host, int(port)))
    yield proxy
    proxy.close()
    loop.close()


@pytest.fixture(scope="module")
def sales() -> list[Sale]:
    return list(islice(simulate(7), 2_900))


@contextmanager
def opened(target: str, attempt_timeout_s: float = 5.0) -> Iterator[OpenStream[Recorded]]:
    """Of tills that are patient enough for a busy machine."""
    with (
        connect(target) as channel,
        PosClient(channel, attempt_timeout_s=attempt_timeout_s, total_timeout_s=10 * WAIT_S).open_stream() as stream,
    ):
        yield stream


class Selling:
    """64 tills of a branch sell on one stream."""

    def __init__(self, stream: OpenStream[Recorded], sales: list[Sale]) -> None:
        self.recorded: dict[str, Recorded] = {}
        self._stream = stream
        self._threads = ThreadPoolExecutor(TILLS)
        self._sold = [self._threads.submit(self._sell, sale) for sale in sales]

    def _sell(self, sale: Sale) -> None:
        self.recorded[sale.idempotency_key] = self._stream.record(sale, register_customer=True)

    def wait_for(self, sales: int) -> None:
        until(lambda: len(self.recorded) >= sales or any(sold.done() and sold.exception() for sold in self._sold))

    def finish(self) -> None:
        for sold in self._sold:
            sold.result(10 * WAIT_S)
        self._threads.shutdown()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill(processes: Processes, proxy: Proxy) -> None:
    processes.kill("purchases")
    processes.start("purchases")


def stop(processes: Processes, proxy: Proxy) -> None:
    assert processes.stop("purchases") == 0
    processes.start("purchases")


def cut(processes: Processes, proxy: Proxy) -> None:
    proxy.cut()


def deafen(processes: Processes, proxy: Proxy) -> None:
    proxy.deafen()
    time.sleep(0.5)
    proxy.heal()


@pytest.mark.parametrize("harm", [kill, stop, cut, deafen])
def test_no_sale_is_lost_or_stored_twice(
    processes: Processes,
    proxy: Proxy,
    purchases_db: str,
    sales: list[Sale],
    harm: Callable[[Processes, Proxy], None],
) -> None:
    """64 tills sell on one stream while the service goes and comes back, or the network does: each has its answer."""
    with opened(proxy.address) as stream:
        selling = Selling(stream, sales)
        for done in (200, 700, 1_200):
            selling.wait_for(done)
            harm(processes, proxy)
        selling.finish()
        for sale in sales[::50]:
            assert (
                stream.record(sale, register_customer=True).purchase == selling.recorded[sale.idempotency_key].purchase
            )
    assert_whole(purchases_db, len(sales))
    assert len({each.purchase.purchase_id for each in selling.recorded.values()}) == len(sales)


def test_refused_sales_spare_their_neighbours(processes: Processes, purchases_db: str, sales: list[Sale]) -> None:
    """Each is refused as it is by a call, while others on the stream are stored."""
    first, *others = sales[:200]
    spoilt: list[tuple[Sale, type[PosError]]] = [
        (dataclasses.replace(first, branch_id=0), InvalidSale),
        (dataclasses.replace(first, receipt_id="another"), IdempotencyKeyReused),
        (dataclasses.replace(first, idempotency_key="0b9ad0f8-2f4e-4f4c-8d4b-5f9f7b0c7a55"), ReceiptTaken),
        (
            dataclasses.replace(
                first,
                idempotency_key="1b9ad0f8-2f4e-4f4c-8d4b-5f9f7b0c7a55",
                receipt_id="unknown",
                customer_id="2b9ad0f8-2f4e-4f4c-8d4b-5f9f7b0c7a55",
            ),
            CustomerUnknown,
        ),
    ]
    with opened(processes.address["purchases"]) as stream, connect(processes.address["purchases"]) as channel:
        stream.record(first, register_customer=True)
        selling = Selling(stream, others)
        for sale, expected in spoilt:
            told = []
            for way in (stream.record, PosClient(channel).create_purchase):
                with pytest.raises(expected) as caught:
                    way(sale)
                told.append(caught.value.status)
            assert told[0] == told[1]
        selling.finish()
    assert_whole(purchases_db, 200)


def test_a_sale_that_has_to_wait_holds_up_no_other(processes: Processes, purchases_db: str, sales: list[Sale]) -> None:
    """Somebody holds its customer's row: it passes its deadline again and again, and is stored in the end."""
    bound = next(sale for sale in sales if sale.customer_id)
    others = [sale for sale in sales[:600] if sale.customer_id != bound.customer_id]
    with opened(processes.address["purchases"], attempt_timeout_s=1.0) as stream:
        customer = dataclasses.replace(
            bound, receipt_id="first", idempotency_key="3b9ad0f8-2f4e-4f4c-8d4b-5f9f7b0c7a55"
        )
        stream.record(customer, register_customer=True)
        with psycopg.connect(purchases_db) as holder, ThreadPoolExecutor() as tills:
            holder.execute("SELECT FROM customers WHERE customer_id = %s FOR UPDATE", [bound.customer_id])
            waiting = tills.submit(stream.record, bound)
            Selling(stream, others).finish()
            assert not waiting.done()
            holder.rollback()
            assert waiting.result(WAIT_S).purchase.receipt_id == bound.receipt_id
    assert_whole(purchases_db, len(others) + 2)


def test_closing_while_the_service_is_away(processes: Processes, purchases_db: str, sales: list[Sale]) -> None:
    """It ends in time, and whoever has no answer does not know; sent again later, each sale is stored once."""
    outcomes: dict[str, Recorded | PosError] = {}

    def sell(stream: OpenStream[Recorded], sale: Sale) -> None:
        try:
            outcomes[sale.idempotency_key] = stream.record(sale, register_customer=True)
        except PosError as error:
            outcomes[sale.idempotency_key] = error

    backlog = sales[:400]
    with connect(processes.address["purchases"]) as channel, ThreadPoolExecutor(TILLS) as tills:
        stream = PosClient(channel).open_stream()
        for sale in backlog:
            tills.submit(sell, stream, sale)
        until(lambda: len(outcomes) > 50)
        processes.kill("purchases")
        stream.close(drain_s=0.2)
        until(lambda: len(outcomes) == len(backlog))
        assert {type(each) for each in outcomes.values()} == {Recorded, OutcomeUnknown}
        processes.start("purchases")
        processes.wait_ready("purchases")
        with PosClient(channel, total_timeout_s=WAIT_S).open_stream() as again:
            for sale in backlog:
                recorded = again.record(sale, register_customer=True)
                assert recorded.replayed or isinstance(outcomes[sale.idempotency_key], OutcomeUnknown)
    assert_whole(purchases_db, len(backlog))
    assert threading.active_count() < TILLS
