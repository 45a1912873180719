"""A ban takes effect within seconds: for new calls, on connections that are open, and in streams that are under way."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local.machine import wait_until
from retail.analytics.v1 import analytics_service_pb2
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub
from retail.purchases.v1 import purchases_service_pb2 as pb
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.conftest import WAIT_S
from tests.integration.access.backbone import BANNED, Backbone
from tests.integration.sales import Refusal, sale

LEEWAY_S = 30  # the default
TILL = "/branch/5/till/POS-3"


@pytest.fixture
def chain(chain_with_certificates: Backbone) -> Iterator[Backbone]:
    yield chain_with_certificates
    chain_with_certificates.ban(*BANNED)


def banned(call: Callable[[], Any]) -> bool:
    try:
        call()
    except grpc.RpcError as error:
        return _reason(error) == "UNAUTHENTICATED"
    return False


def _reason(error: Any) -> str:
    return str(Refusal(error).reason)


def test_a_ban_holds_on_an_open_connection_and_is_lifted(chain: Backbone) -> None:
    pair = chain.certificate(TILL)
    with chain.channel("purchases", pair) as channel, chain.channel("purchases", pair) as other:
        stub, other_stub = PurchasesServiceStub(channel), PurchasesServiceStub(other)
        for each in (stub, other_stub):
            each.CreatePurchase(sale(branch_id=5))
        chain.ban(*BANNED, TILL)
        assert wait_until(lambda: banned(lambda: stub.CreatePurchase(sale(branch_id=5))), WAIT_S)
        assert banned(lambda: other_stub.CreatePurchase(sale(branch_id=5)))
        chain.ban(*BANNED)
        assert wait_until(lambda: not banned(lambda: stub.CreatePurchase(sale(branch_id=5))), WAIT_S)


def test_a_list_that_cannot_be_read_changes_nothing(chain: Backbone) -> None:
    with chain.channel("purchases", chain.certificate(BANNED[0])) as channel:
        stub = PurchasesServiceStub(channel)
        before = len(_told(chain))
        chain.bans.unlink()
        assert wait_until(lambda: len(_told(chain)) > before, WAIT_S)
        assert banned(lambda: stub.CreatePurchase(sale()))


def _told(chain: Backbone) -> list[str]:
    return [line for line in chain.log("purchases").splitlines() if "a file cannot be read" in line]


def test_an_upload_ends_with_the_ban(chain: Backbone) -> None:
    """While the stream waits for its next message, too."""
    messages: queue.Queue[pb.UploadPurchasesRequest] = queue.Queue()
    messages.put(pb.UploadPurchasesRequest(uploads=[pb.PurchaseUpload(create_purchase=sale(branch_id=5))]))
    with chain.channel("purchases", chain.certificate(TILL)) as channel:
        replies = PurchasesServiceStub(channel).UploadPurchases(iter(messages.get, None), timeout=WAIT_S)
        assert next(replies).results[0].HasField("created")
        chain.ban(*BANNED, TILL)
        assert banned(lambda: next(replies))


@pytest.mark.parametrize("path", ["/branch/5/manager/anna", "/reader/board"])
def test_a_watcher_that_hears_nothing_is_ended(chain: Backbone, path: str) -> None:
    request = analytics_service_pb2.WatchDailySalesRequest(branch_ids=[5])
    with chain.channel("analytics", chain.certificate(path)) as channel:
        replies = AnalyticsServiceStub(channel).WatchDailySales(request, timeout=WAIT_S)
        ended = threading.Event()
        refusals: list[str] = []

        def watch() -> None:
            try:
                for _ in replies:
                    pass
            except grpc.RpcError as error:
                refusals.append(_reason(error))
            ended.set()

        thread = threading.Thread(target=watch)
        thread.start()
        assert wait_until(lambda: replies.initial_metadata() is not None, WAIT_S)
        chain.ban(*BANNED, path)
        assert ended.wait(WAIT_S)
        thread.join()
        assert refusals == ["UNAUTHENTICATED"]


def test_a_health_watch_is_ended(chain: Backbone) -> None:
    with chain.channel("relay", chain.certificate("/service/monitor")) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        replies = health.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        next(replies)
        chain.ban(*BANNED, "/service/monitor")
        assert banned(lambda: next(replies))


def test_a_key_that_is_withdrawn_ends_its_tokens(chain: Backbone) -> None:
    """Also those that were accepted before, and are remembered."""
    metadata = (("authorization", f"Bearer {chain.issuer.token('reader')}"),)
    with chain.channel("purchases", chain.certificate("/service/gateway")) as channel:
        stub = PurchasesServiceStub(channel)
        stub.ListPurchases(pb.ListPurchasesRequest(), metadata=metadata)
        chain.issuer.publish("another")
        assert wait_until(
            lambda: banned(lambda: stub.ListPurchases(pb.ListPurchasesRequest(), metadata=metadata)), WAIT_S
        )
        chain.issuer.publish()
        assert wait_until(
            lambda: not banned(lambda: stub.ListPurchases(pb.ListPurchasesRequest(), metadata=metadata)), WAIT_S
        )


def test_a_stream_ends_with_its_callers_token(chain: Backbone) -> None:
    """After the leeway for clocks."""
    soon = int(time.time()) - LEEWAY_S + 5
    metadata = (("authorization", f"Bearer {chain.issuer.token('reader', exp=soon)}"),)
    with chain.channel("analytics", chain.certificate("/service/gateway")) as channel:
        request = analytics_service_pb2.WatchDailySalesRequest()
        replies = AnalyticsServiceStub(channel).WatchDailySales(request, timeout=WAIT_S, metadata=metadata)
        assert banned(lambda: list(replies))
