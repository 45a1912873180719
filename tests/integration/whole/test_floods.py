"""What one peer may take of a server's room, and that others get theirs meanwhile."""

import asyncio
import socket
import subprocess
import sys
import threading
import urllib.request
from typing import Any

import grpc
import pytest

from chassis.errors import Overloaded, ShuttingDown
from chassis.in_flight import BYTES_MAX, CALL_BYTES, PEER_BYTES_MAX, InFlight, Stream
from chassis.metrics import CONNECTIONS_MAX, serving_metrics
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.conftest import WAIT_S, eventually
from tests.integration.conftest import free_address
from tests.integration.purchases.test_create_purchase import assert_whole
from tests.integration.purchases.test_limits import is_stuck, locked, outcome, service
from tests.integration.purchases.test_upload_purchases import message, upload
from tests.integration.sales import sale

SALES, NOISE = 25, "x" * 36_000  # in a message, which makes 900,000 bytes
LARGE = SALES * len(NOISE)
STREAMS = 3 * PEER_BYTES_MAX // LARGE


async def test_large_requests_of_one_connection_are_refused_beyond_its_share(purchases_db: str) -> None:
    """Also what the server ignores is in its memory. Another connection's sale is taken in all the same."""
    address = free_address()
    async with service(purchases_db, listen=address) as channel:
        tills: Any = PurchasesServiceStub(channel)
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options=options) as flooding:
            flood: Any = PurchasesServiceStub(flooding)
            with locked(purchases_db, "idempotency_keys"):
                large = [message(0, [sale(purchase_id=NOISE) for _ in range(SALES)]) for _ in range(STREAMS)]
                calls = [asyncio.ensure_future(outcome(upload(flood, [each]))) for each in large]

                async def refused() -> bool:
                    return sum(call.done() for call in calls) >= len(calls) - PEER_BYTES_MAX // LARGE

                await eventually(refused, "all but the connection's share are refused")
                other = asyncio.ensure_future(outcome(tills.CreatePurchase(sale(), timeout=WAIT_S)))
                await eventually(lambda: is_stuck(purchases_db, "WITH input AS"), "sales are on their way")
            assert await other is None
            outcomes = await asyncio.gather(*calls)
    assert {each.reason for each in outcomes if each} == {"OVERLOADED"}
    taken_in = sum(each is None for each in outcomes)
    assert 0 < taken_in <= PEER_BYTES_MAX // LARGE
    assert_whole(purchases_db, 2 + SALES * taken_in)


def test_what_is_in_hand_is_counted() -> None:
    in_flight = InFlight()
    in_flight.enter("a", PEER_BYTES_MAX - CALL_BYTES)
    with pytest.raises(Overloaded, match="this connection"):
        in_flight.enter("a", 1)
    peers = [str(number) for number in range(BYTES_MAX // PEER_BYTES_MAX - 1)]
    for peer in peers:
        in_flight.enter(peer, PEER_BYTES_MAX - CALL_BYTES)
    with pytest.raises(Overloaded, match="all connections"):
        in_flight.enter("b", 1)
    for peer in ("a", *peers):
        in_flight.leave(peer, PEER_BYTES_MAX - CALL_BYTES)
    assert in_flight.idle.is_set() and not in_flight._bytes_of_peer and not in_flight._bytes

    in_flight.enter("a")
    stream = Stream(in_flight, "a")
    for _ in range(10):  # two are in hand at most
        stream.take(PEER_BYTES_MAX // 3)
    stream.close()
    stream.take(PEER_BYTES_MAX)  # comes too late to be counted, or to be given back
    in_flight.leave("a")
    assert not in_flight._bytes_of_peer and not in_flight._bytes

    in_flight.draining.set()
    with pytest.raises(ShuttingDown):
        in_flight.enter("a")


async def test_metrics_cannot_be_held() -> None:
    """Whoever connects and does not ask takes no thread for long, and does not keep others from asking."""
    address = free_address()
    host, _, port = address.rpartition(":")
    async with serving_metrics(address):
        before = threading.active_count()
        idle = [socket.create_connection((host, int(port)), timeout=WAIT_S) for _ in range(100)]
        try:
            for connection in idle:
                connection.send(b"GET /met")

            def scrape() -> bool:
                try:
                    with urllib.request.urlopen(f"http://{address}/metrics", timeout=WAIT_S) as answer:
                        return b"grpc_server_handled_total" in answer.read()
                except OSError:
                    return False

            assert threading.active_count() <= before + CONNECTIONS_MAX + 1
            await eventually(lambda: asyncio.to_thread(scrape), "a scrape is answered while others hold connections")
        finally:
            for connection in idle:
                connection.close()


def test_process_raises_its_limit_of_files() -> None:
    program = (
        "import resource\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))\n"
        "from chassis import lifecycle\n"
        "async def main(stop): print(resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard)\n"
        "lifecycle.run(main)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT_S, check=True)
    assert ended.stdout.strip() == "True"
