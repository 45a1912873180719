"""The quarantine as its operator meets it: over gRPC and on the command line."""

import asyncio
import contextlib
import io
import json
import os
import uuid
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any
from unittest import mock

import grpc
import psycopg
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from prometheus_client import REGISTRY

import purchases_svc.__main__ as purchases
import relay_svc.__main__ as relay
from analytics_svc.__main__ import commands
from analytics_svc.ingest.health import Health
from analytics_svc.ingest.upkeep import Upkeep
from purchases_svc.settings import ServeSettings
from relay_svc.settings import ServeSettings as RelaySettings
from retail.analytics.v1 import quarantine_service_pb2 as pb
from retail.analytics.v1.quarantine_service_pb2_grpc import QuarantineServiceStub
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.conftest import pool
from tests.integration.conftest import free_address, running
from tests.integration.consumers import COUNTED, QUARANTINED, consuming, counts, publish, serving, start
from tests.integration.purchase_events import expected, query, read_models, sold, some_sales
from tests.integration.sales import Refusal, sale

NOWHERE = "127.0.0.1:9"  # the discard port: nobody listens
INSERT = """
    INSERT INTO quarantined_events (event_id, reason, detail, body, properties) VALUES (%s, %s, 'why', %s, %s)
    RETURNING quarantine_id::text
"""


@pytest.fixture
async def stub(analytics_db: str, amqp_url: str, channel: BlockingChannel) -> AsyncIterator[Any]:
    """The service in a consumer that has neither a purchases service nor a relay."""
    async with consuming(analytics_db, amqp_url, purchases_target=NOWHERE, relay_target=NOWHERE) as opened:
        yield QuarantineServiceStub(opened)


def put(
    url: str, body: bytes = b"poison", event_id: str | None = None, reason: str = "UNDECODABLE", properties: str = "{}"
) -> str:
    with psycopg.connect(url) as connection:
        ((quarantine_id,),) = connection.execute(INSERT, [event_id, reason, body, properties]).fetchall()
    return str(quarantine_id)


def reasons(url: str) -> dict[str, str]:
    return dict(query(url, "SELECT quarantine_id::text, reason FROM quarantined_events"))


async def listed(stub: Any, **filters: Any) -> list[list[pb.QuarantinedEvent]]:
    """The pages."""
    pages, token = [], ""
    while True:
        reply = await stub.ListQuarantinedEvents(pb.ListQuarantinedEventsRequest(page_token=token, **filters))
        pages.append(list(reply.quarantined_events))
        if not (token := reply.next_page_token):
            return pages


async def test_list_the_oldest_first(stub: Any, analytics_db: str) -> None:
    """Page by page, of one reason or all; nothing twice, nothing left out."""
    ids = [put(analytics_db, b"%d" % n, reason="TOTAL_MISMATCH" if n % 3 else "UNDECODABLE") for n in range(23)]
    pages = await listed(stub, page_size=5)
    assert [len(page) for page in pages] == [5, 5, 5, 5, 3]
    assert [event.quarantine_id for page in pages for event in page] == ids
    assert [[event.quarantine_id for event in page] for page in await listed(stub, reason="UNDECODABLE")] == [ids[::3]]
    first = pages[0][0]
    assert (first.reason, first.detail, first.body, first.body_size, first.event_id) == (
        "UNDECODABLE",
        "why",
        b"0",
        1,
        "",
    )
    assert [len(page) for page in await listed(stub, page_size=23)] == [23]
    assert await listed(stub, reason="NOTHING") == [[]]


async def test_metrics_tell_the_reasons(analytics_db: str) -> None:
    """How many events are there and why; a reason that is gone disappears."""

    async def ignore(_serving: bool) -> None: ...

    def shown(reason: str) -> float | None:
        return REGISTRY.get_sample_value("analytics_quarantined_events", {"reason": reason})

    async with pool(analytics_db, "analytics_consumer") as opened:
        upkeep = Upkeep(opened, Health(ignore, set()), 0)
        gone = put(analytics_db, reason="TOO_LARGE")
        put(analytics_db, b"1")
        put(analytics_db, b"2")
        await upkeep.run_once()
        assert (shown("UNDECODABLE"), shown("TOO_LARGE")) == (2, 1)
        query(analytics_db, f"DELETE FROM quarantined_events WHERE quarantine_id = '{gone}'")
        await upkeep.run_once()
        assert (shown("UNDECODABLE"), shown("TOO_LARGE")) == (2, None)


async def test_pages_of_large_bodies_are_short(stub: Any, analytics_db: str) -> None:
    """A page fits into an answer, however large the bodies are; what is larger than one is cut."""
    large = [put(analytics_db, bytes([n]) * (1 << 20)) for n in range(4)]
    huge = [put(analytics_db, n * (9 << 20)) for n in (b"x", b"y")]
    pages = await listed(stub)
    assert [[event.quarantine_id for event in page] for page in pages] == [large[:3], [large[3], huge[0]], [huge[1]]]
    assert (len(pages[-1][-1].body), pages[-1][-1].body_size) == (2 << 20, 9 << 20)


async def test_what_is_kept_in_part_is_not_redriven(stub: Any, analytics_db: str) -> None:
    """It stays as it is, with the size that it had, and can be discarded."""
    entry = put(analytics_db, b"the beginning")
    query(analytics_db, "UPDATE quarantined_events SET body_size = 16 << 20")
    reply = await stub.RedriveEvents(pb.RedriveEventsRequest(quarantine_ids=[entry]))
    assert (reply.redriven_count, reply.remaining_count) == (0, 1)
    ((event,),) = await listed(stub)
    assert (event.body, event.body_size, event.detail) == (b"the beginning", 16 << 20, "why")


async def test_all_problems_at_once(stub: Any) -> None:
    """Wrong requests are refused with every problem."""
    for call, request in (
        (stub.RedriveEvents, pb.RedriveEventsRequest(quarantine_ids=["", str(uuid.uuid4()), "7"])),
        (stub.DiscardEvents, pb.DiscardEventsRequest(quarantine_ids=["", str(uuid.uuid4()), "7"])),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request)
        refusal = Refusal(caught.value)
        assert (refusal.code, refusal.fields) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            ["quarantine_ids[0]", "quarantine_ids[2]"],
        )
    for wrong in (pb.RedriveEventsRequest(), pb.RedriveEventsRequest(quarantine_ids=[str(uuid.uuid4())] * 1_001)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.RedriveEvents(wrong)
        assert Refusal(caught.value).fields == ["quarantine_ids"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ListQuarantinedEvents(pb.ListQuarantinedEventsRequest(page_size=-1, reason="no reason"))
    assert Refusal(caught.value).fields == ["page_size", "reason"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ListQuarantinedEvents(pb.ListQuarantinedEventsRequest(page_token="mine"))
    assert Refusal(caught.value).reason == "INVALID_TOKEN"


async def test_redrive_after_the_cause_is_gone(stub: Any, analytics_db: str, channel: BlockingChannel) -> None:
    """What the database refused counts when it no longer does; entries nobody knows are named."""
    query(analytics_db, "ALTER TABLE product_sales_daily ADD CONSTRAINT none CHECK (product_id <> 666)")
    culprits = [sold(lines=((666, 1, Decimal(n)),)) for n in (1, 2)]
    sales = some_sales(20, seed=31)
    publish(channel, *[each.body() for each in [*culprits, *sales]])
    await counts(analytics_db, QUARANTINED, 2)
    await counts(analytics_db, COUNTED, 20)
    ids, unknown = list(reasons(analytics_db)), str(uuid.uuid4())
    request = pb.RedriveEventsRequest(quarantine_ids=[*ids, unknown, unknown.upper(), ids[0].upper()])
    assert await stub.RedriveEvents(request) == pb.RedriveEventsResponse(
        remaining_count=2, unknown_quarantine_ids=[unknown]
    )
    assert set(reasons(analytics_db).values()) == {"APPLY_FAILED"}
    query(analytics_db, "ALTER TABLE product_sales_daily DROP CONSTRAINT none")
    assert await stub.RedriveEvents(request) == pb.RedriveEventsResponse(
        redriven_count=2, unknown_quarantine_ids=[unknown]
    )
    assert read_models(analytics_db) == expected([*culprits, *sales])
    assert query(analytics_db, "SELECT quarantined_count FROM freshness") == [(0,)]
    answer = await stub.RedriveEvents(request)  # the answer was lost, the request comes again
    assert set(answer.unknown_quarantine_ids) == {*ids, unknown}
    assert read_models(analytics_db) == expected([*culprits, *sales])


async def test_redrive_reads_as_the_consumer_does(stub: Any, analytics_db: str) -> None:
    """By the body and by the properties that came with it; what still fails stays, with its reason of today."""
    good = sold("1.00")
    newer = put(analytics_db, good.body(), good.event_id, properties='{"headers": {"schema_version": 2}}')
    broken = put(analytics_db, b"{}", reason="UNSUPPORTED_SCHEMA_VERSION")
    twice = put(analytics_db, b"{}", reason="OUT_OF_FASHION")
    readable = put(analytics_db, good.body(), good.event_id, "OUT_OF_FASHION", '{"type": "PurchaseCreated"}')
    reply = await stub.RedriveEvents(pb.RedriveEventsRequest(quarantine_ids=[newer, broken, twice, readable]))
    assert (reply.redriven_count, reply.remaining_count) == (1, 3)
    assert reasons(analytics_db) == {newer: "UNSUPPORTED_SCHEMA_VERSION", broken: "BROKEN_CONTRACT"}
    assert read_models(analytics_db) == expected([good])
    assert query(analytics_db, "SELECT quarantined_count FROM freshness") == [(2,)]


async def test_good_twin_comes_later(stub: Any, analytics_db: str, channel: BlockingChannel) -> None:
    """An event id counts once: the entry whose id was counted meanwhile goes by redrive, unread, or by discard."""
    sales = [sold("1.00"), sold("2.00"), sold("3.00")]
    publish(channel, *[each.body(total_amount=Decimal("9.99")) for each in sales])
    await counts(analytics_db, QUARANTINED, 3)
    publish(channel, *[each.body() for each in sales[:2]])
    await counts(analytics_db, COUNTED, 2)
    by_event = dict(query(analytics_db, "SELECT event_id::text, quarantine_id::text FROM quarantined_events"))
    first, second, third = (by_event[each.event_id] for each in sales)
    reply = await stub.RedriveEvents(pb.RedriveEventsRequest(quarantine_ids=[first, third]))
    assert (reply.redriven_count, reply.remaining_count) == (1, 1)
    reply = await stub.DiscardEvents(pb.DiscardEventsRequest(quarantine_ids=[second]))  # the purchases are not asked
    assert reply.discarded_count == 1
    assert reasons(analytics_db) == {third: "TOTAL_MISMATCH"}
    assert read_models(analytics_db) == expected(sales[:2])


async def test_another_event_with_a_counted_id(stub: Any, analytics_db: str, channel: BlockingChannel) -> None:
    """It is kept with its reason, and stays when it is tried again: a redrive settles true duplicates only."""
    first, second = sold("1.00"), sold("2.00")
    publish(channel, first.body(), second.body())
    await counts(analytics_db, COUNTED, 2)
    publish(channel, first.body(), first._replace(branch_id=7).body(), second.body())
    await counts(analytics_db, QUARANTINED, 1)
    (kept,) = reasons(analytics_db)
    assert reasons(analytics_db) == {kept: "CONFLICTING_DUPLICATE"}
    put(analytics_db, second.body(), second.event_id, "CONFLICTING_DUPLICATE")
    reply = await stub.RedriveEvents(pb.RedriveEventsRequest(quarantine_ids=list(reasons(analytics_db))))
    assert (reply.redriven_count, reply.remaining_count) == (1, 1)
    assert reasons(analytics_db) == {kept: "CONFLICTING_DUPLICATE"}
    assert read_models(analytics_db) == expected([first, second])


async def test_redriven_twice_at_once(stub: Any, analytics_db: str, channel: BlockingChannel) -> None:
    """Two operators and the queue itself with the same events: each counts once."""
    sales = some_sales(30, seed=32)
    ids = [put(analytics_db, each.body(), each.event_id) for each in sales]
    request = pb.RedriveEventsRequest(quarantine_ids=ids)
    publish(channel, *[each.body() for each in sales[::2]])
    replies = await asyncio.gather(stub.RedriveEvents(request), stub.RedriveEvents(request))
    assert sum(reply.redriven_count for reply in replies) == 30
    assert sum(len(reply.unknown_quarantine_ids) for reply in replies) == 30
    await counts(analytics_db, COUNTED, 30)
    assert read_models(analytics_db) == expected(sales)


async def test_what_is_below_the_floor_can_only_be_discarded(stub: Any, analytics_db: str) -> None:
    """Redrive refuses it, as it may be counted and forgotten; discard needs nobody's word."""
    query(analytics_db, "UPDATE freshness SET log_floor = 'ffffffff-0000-0000-0000-000000000000'")
    late = sold("1.00", event_id="01900000-0000-7000-8000-000000000000")
    ids = [put(analytics_db, late.body(), late.event_id, reason) for reason in ("OLDER_THAN_FLOOR", "APPLY_FAILED")]
    reply = await stub.RedriveEvents(pb.RedriveEventsRequest(quarantine_ids=ids))
    assert (reply.redriven_count, reply.remaining_count) == (0, 2)
    assert reasons(analytics_db) == {ids[0]: "OLDER_THAN_FLOOR", ids[1]: "OLDER_THAN_FLOOR"}
    reply = await stub.DiscardEvents(pb.DiscardEventsRequest(quarantine_ids=ids))
    assert (reply.discarded_count, reasons(analytics_db)) == (2, {})
    assert read_models(analytics_db) == expected([])


async def test_discard_refuses_what_was_sold(
    analytics_db: str, purchases_db: str, amqp_url: str, channel: BlockingChannel
) -> None:
    """An event whose purchase exists stays, though nobody can read it; one refusal names all and removes none."""
    config = ServeSettings(
        database_url=purchases_db, listen=free_address(), metrics_listen="127.0.0.1:0", backlog_months=0
    )
    async with (
        running(lambda stop: purchases.serve(config, stop), config.listen) as tills,
        consuming(analytics_db, amqp_url, purchases_target=config.listen) as opened,
    ):
        stub: Any = QuarantineServiceStub(opened)
        create: Any = PurchasesServiceStub(tills).CreatePurchase
        mine = [(await create(sale())).purchase.purchase_id for _ in range(2)]
        ids = [
            put(analytics_db, b'{"purchase": {"purchase_id" : "%s", \xff' % mine[0].upper().encode()),
            put(analytics_db, b"no purchase"),
            put(analytics_db, b'{"purchase_id":"%s"}' % mine[1].encode(), reason="KILLS_CONSUMER"),
            put(analytics_db, b'{"purchase_id":"%s"}' % str(uuid.uuid4()).encode()),
        ]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.DiscardEvents(pb.DiscardEventsRequest(quarantine_ids=ids))
        refusal = Refusal(caught.value)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PURCHASE_EXISTS")
        assert refusal.fields == ["quarantine_ids[0]", "quarantine_ids[2]"]
        assert len(reasons(analytics_db)) == 4
        unknown = str(uuid.uuid4())
        reply = await stub.DiscardEvents(pb.DiscardEventsRequest(quarantine_ids=[ids[1], unknown, ids[3]]))
        assert reply == pb.DiscardEventsResponse(discarded_count=2, unknown_quarantine_ids=[unknown])
        assert set(reasons(analytics_db)) == {ids[0], ids[2]}


async def test_discard_refuses_what_bears_the_id_of_a_sale(
    analytics_db: str, purchases_db: str, amqp_url: str, channel: BlockingChannel
) -> None:
    """A message of others with a real event's id: it settles that id, so it stays until the sale itself is counted."""
    config = ServeSettings(
        database_url=purchases_db, listen=free_address(), metrics_listen="127.0.0.1:0", backlog_months=0
    )
    no_broker = "amqp://guest:guest@127.0.0.1:1/%2F"  # nothing is sent: the real event never comes
    outbox = RelaySettings(purchases_db, no_broker, listen=free_address(), metrics_listen="127.0.0.1:0")
    async with (
        running(lambda stop: purchases.serve(config, stop), config.listen) as tills,
        running(lambda stop: relay.serve(outbox, stop), outbox.listen),
        consuming(analytics_db, amqp_url, purchases_target=config.listen, relay_target=outbox.listen) as opened,
    ):
        stub: Any = QuarantineServiceStub(opened)
        create: Any = PurchasesServiceStub(tills).CreatePurchase
        event_id = (await create(sale())).consistency_token
        body = b'{"purchase_id":"%s"}' % str(uuid.uuid4()).encode()
        ids = [put(analytics_db, body, event_id), put(analytics_db, body, str(uuid.uuid4()))]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.DiscardEvents(pb.DiscardEventsRequest(quarantine_ids=ids))
        refusal = Refusal(caught.value)
        assert (refusal.reason, refusal.fields) == ("PURCHASE_EXISTS", ["quarantine_ids[0]"])
        query(analytics_db, f"INSERT INTO analytics_event_log (event_id, event_type) VALUES ('{event_id}', 'any')")
        assert (await stub.DiscardEvents(pb.DiscardEventsRequest(quarantine_ids=ids))).discarded_count == 2


async def test_discard_without_the_relay(stub: Any, analytics_db: str) -> None:
    """Its answer is needed where there is an id, and it has not agreed."""
    kept = put(analytics_db, event_id=str(uuid.uuid4()))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.DiscardEvents(pb.DiscardEventsRequest(quarantine_ids=[kept]))
    assert Refusal(caught.value).reason == "RELAY_UNAVAILABLE"
    assert set(reasons(analytics_db)) == {kept}


async def test_discard_without_the_purchases_service(stub: Any, analytics_db: str) -> None:
    """Whoever cannot be asked has not agreed: UNAVAILABLE, nothing is removed, and the request may come again."""
    ids = [put(analytics_db), put(analytics_db, b'{"purchase_id": "%s"}' % str(uuid.uuid4()).encode())]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.DiscardEvents(pb.DiscardEventsRequest(quarantine_ids=ids))
    refusal = Refusal(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "PURCHASES_UNAVAILABLE")
    assert refusal.retry.retry_delay.seconds == 1
    assert set(reasons(analytics_db)) == set(ids)


async def command(target: str, *arguments: str) -> tuple[int, str]:
    """`retail-analytics quarantine …`: its exit code and what it prints."""
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"CONSUMER_TARGET": target}),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        code = await asyncio.to_thread(commands.carry_out, ["quarantine", *arguments])
    return code, printed.getvalue()


async def test_command_line(
    analytics_db: str,
    amqp_url: str,
    channel: BlockingChannel,
    processes: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What an operator does at night: look, try again, and remove what nobody misses."""
    monkeypatch.setenv("COLUMNS", "250")
    address = free_address()
    settings = {"ANALYTICS_DATABASE_URL": analytics_db, "AMQP_URL": amqp_url, "PURCHASES_TARGET": NOWHERE}
    processes.append(start("consume", CONSUMER_LISTEN=address, **settings))
    await serving(address)
    assert await command(address, "list") == (0, "Nothing is in quarantine.\n")
    good = sold("1.00")
    ids = [
        put(analytics_db, b"\x1b[2Jpoison \xff" + b"." * 100),
        put(analytics_db, good.body(), good.event_id, "APPLY_FAILED"),
        put(analytics_db, b"{}", reason="APPLY_FAILED"),
    ]
    code, text = await command(address, "list")
    assert code == 0
    assert all(quarantine_id in text for quarantine_id in ids)
    assert "\x1b" not in text
    assert "112 bytes" in text
    code, text = await command(address, "list", "--json", "--reason", "UNDECODABLE")
    assert (code, json.loads(text)["quarantine_id"], json.loads(text)["body_size"]) == (0, ids[0], 112)
    assert (await command(address, "list", "--json", "--limit", "2"))[1].count("\n") == 2
    code, text = await command(address, "redrive", "--reason", "APPLY_FAILED")
    assert (code, text) == (1, "1 counted, 1 remain in quarantine.\n")
    assert reasons(analytics_db) == {ids[0]: "UNDECODABLE", ids[2]: "BROKEN_CONTRACT"}
    assert await command(address, "redrive", "--all") == (1, "0 counted, 2 remain in quarantine.\n")
    code, text = await command(address, "discard", ids[0], ids[1], ids[2])
    assert (code, text.splitlines()[0]) == (1, "2 discarded.")
    assert f"{ids[1]} is not in quarantine" in text
    assert await command(address, "redrive", "--all") == (0, "0 counted, 0 remain in quarantine.\n")
    for wrong in ((), ("redrive",), ("redrive", "--all", ids[0]), ("discard",), ("list", "--limit", "many")):
        code, text = await command(address, *wrong)
        assert (code, "Usage:" in text) == (2, True), wrong
    code, text = await command(address, "discard", "7")
    assert (code, "must be a UUID" in text, "Traceback" in text) == (1, True, False)
    code, text = await command(NOWHERE, "list")
    assert (code, "UNAVAILABLE" in text, "Traceback" in text) == (1, True, False)
