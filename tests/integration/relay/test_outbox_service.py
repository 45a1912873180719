"""OutboxService, asked over gRPC, on a real outbox."""

import asyncio
import datetime
import json
import random
import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import psycopg
import pytest
from prometheus_client import REGISTRY

import relay_svc.__main__ as relay
from relay_svc import inspection
from relay_svc.settings import ServeSettings
from retail.relay.v1 import outbox_service_pb2 as pb2
from retail.relay.v1.outbox_service_pb2_grpc import OutboxServiceStub
from tests.conftest import WAIT_S, eventually, pool
from tests.integration.conftest import free_address, running
from tests.integration.outbox_events import insert, make_days, new_ids, states, write
from tests.integration.sales import Refusal

if TYPE_CHECKING:
    from retail.relay.v1.outbox_service_pb2_grpc import OutboxServiceAsyncStub

OF_THE_LOG = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[")
UNKNOWN = "00000000-0000-7000-8000-000000000001"


@pytest.fixture
def address() -> str:
    return free_address()


@pytest.fixture
async def stub(purchases_db: str, address: str) -> AsyncIterator["OutboxServiceAsyncStub"]:
    """A relay whose broker is not there: what it reports and repairs does not depend on one."""
    make_days(purchases_db)
    config = ServeSettings(
        database_url=purchases_db,
        amqp_url="amqp://guest:guest@127.0.0.1:1/%2F",
        listen=address,
        metrics_listen="127.0.0.1:0",
    )
    async with running(lambda stop: relay.serve(config, stop), config.listen) as channel:
        yield OutboxServiceStub(channel)


def give_up(url: str, ids: list[str], last_error: str = "too long") -> None:
    with psycopg.connect(url) as connection:
        connection.execute(
            "UPDATE outbox_events SET status = 'FAILED', attempts = 5, last_error = %s, next_attempt_at = 'infinity'"
            " WHERE event_id = ANY(%s::uuid[])",
            [last_error, ids],
        )


def send(url: str, ids: list[str]) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(
            "UPDATE outbox_events SET status = 'SENT', sent_at = now() WHERE event_id = ANY(%s::uuid[])", [ids]
        )


async def committed(
    stub: "OutboxServiceAsyncStub", after: str = "", *, acknowledge: bool = True, position_only: bool = False
) -> tuple[list[str], str, datetime.datetime]:
    """A whole listing: ids, the snapshot to continue with, and the time."""
    request = pb2.ListCommittedEventIdsRequest(
        after_snapshot=after, acknowledge=acknowledge, position_only=position_only
    )
    answers = [answer async for answer in stub.ListCommittedEventIds(request, timeout=WAIT_S)]
    assert all(len(answer.event_ids) <= 1_000 for answer in answers)
    assert not any(answer.snapshot or answer.HasField("as_of_time") for answer in answers[:-1])
    ids = [event_id for answer in answers for event_id in answer.event_ids]
    return ids, answers[-1].snapshot, answers[-1].as_of_time.ToDatetime(datetime.UTC)


async def test_status_counts_and_names_the_reason(stub: "OutboxServiceAsyncStub", purchases_db: str) -> None:
    write(purchases_db, 3, age_s=7200)
    give_up(purchases_db, write(purchases_db, 2))
    send(purchases_db, write(purchases_db, 4))

    async def outage() -> pb2.GetOutboxStatusResponse | None:
        status = await stub.GetOutboxStatus(pb2.GetOutboxStatusRequest(), timeout=WAIT_S)
        return status if status.breaker_state == pb2.BREAKER_STATE_OPEN else None

    status: pb2.GetOutboxStatusResponse = await eventually(outage, "the relay notices that there is no broker")
    assert (status.new_count, status.failed_count) == (3, 2)
    assert 0 <= status.oldest_pending_age.ToTimedelta().total_seconds() < 60
    assert "refused" in status.breaker_reason
    assert status.events_per_second == 0
    assert REGISTRY.get_sample_value("relay_breaker_open") == 1


async def test_metrics_of_the_backlog(purchases_db: str) -> None:
    make_days(purchases_db)
    write(purchases_db, 3, age_s=60)
    give_up(purchases_db, write(purchases_db, 2))
    stop = asyncio.Event()
    async with pool(purchases_db, "purchases_relay") as opened:
        measuring = asyncio.ensure_future(inspection.measure(opened, stop))

        async def measured() -> bool:
            counts = [REGISTRY.get_sample_value("relay_outbox_events", {"status": s}) for s in ("NEW", "FAILED")]
            return counts == [3, 2] and (REGISTRY.get_sample_value("relay_oldest_pending_seconds") or 0) > 0

        await eventually(measured, "the metrics tell what waits")
        stop.set()
        await measuring


async def test_status_of_an_empty_outbox(stub: "OutboxServiceAsyncStub", purchases_db: str) -> None:
    send(purchases_db, write(purchases_db, 2, age_s=60))
    status = await stub.GetOutboxStatus(pb2.GetOutboxStatusRequest(), timeout=WAIT_S)
    assert (status.new_count, status.failed_count) == (0, 0)
    assert not status.HasField("oldest_pending_age")


async def test_status_names_who_holds_back_vacuum(stub: "OutboxServiceAsyncStub", purchases_db: str) -> None:
    """A transaction that only reads, and then idles, is enough. The relay may not look at others' sessions itself."""
    write(purchases_db, 1)
    with psycopg.connect(purchases_db, application_name="forgotten report") as idle:
        idle.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        assert idle.execute("SELECT count(*) FROM outbox_events").fetchone() == (1,)
        pid = idle.info.backend_pid

        async def named() -> pb2.BlockingSession | None:
            status = await stub.GetOutboxStatus(pb2.GetOutboxStatusRequest(), timeout=WAIT_S)
            return status.blocking_session if status.HasField("blocking_session") else None

        blocker: pb2.BlockingSession = await eventually(named, "the session is named")
        assert (blocker.pid, blocker.application_name) == (pid, "forgotten report")
        assert blocker.kind == pb2.BLOCKER_KIND_SESSION
        assert 5 <= blocker.transaction_age.ToTimedelta().total_seconds() < 60


async def test_events_by_page_and_status(stub: "OutboxServiceAsyncStub", purchases_db: str) -> None:
    ids = sorted(write(purchases_db, 25))
    give_up(purchases_db, ids[:7])
    send(purchases_db, ids[20:])

    async def listed(status: pb2.OutboxStatus.ValueType, page_size: int) -> list[pb2.OutboxEvent]:
        events: list[pb2.OutboxEvent] = []
        token = ""
        while True:
            request = pb2.ListOutboxEventsRequest(page_size=page_size, page_token=token, status=status)
            answer = await stub.ListOutboxEvents(request, timeout=WAIT_S)
            assert len(answer.outbox_events) <= page_size
            events += answer.outbox_events
            if not (token := answer.next_page_token):
                return events

    assert [event.event_id for event in await listed(pb2.OUTBOX_STATUS_UNSPECIFIED, 4)] == ids
    assert [event.event_id for event in await listed(pb2.OUTBOX_STATUS_NEW, 13)] == ids[7:20]
    sent = await listed(pb2.OUTBOX_STATUS_SENT, 2)
    assert [event.event_id for event in sent] == ids[20:]
    assert all(event.HasField("send_time") for event in sent)
    failed = await listed(pb2.OUTBOX_STATUS_FAILED, 3)
    assert [(event.event_id, event.attempt_count, event.last_error) for event in failed] == [
        (event_id, 5, "too long") for event_id in ids[:7]
    ]
    assert (failed[0].event_type, failed[0].status) == ("PurchaseCreated", pb2.OUTBOX_STATUS_FAILED)

    request = pb2.ListOutboxEventsRequest(page_size=1, status=pb2.OUTBOX_STATUS_FAILED)
    request.page_token = (await stub.ListOutboxEvents(request)).next_page_token
    request.status = pb2.OUTBOX_STATUS_NEW
    assert (await refused(stub.ListOutboxEvents(request))).reason == "INVALID_TOKEN"
    request = pb2.ListOutboxEventsRequest(page_size=-1, status=9, event_ids=[ids[0], "7"])  # type: ignore[arg-type]
    assert (await refused(stub.ListOutboxEvents(request))).fields == ["page_size", "status", "event_ids[1]"]
    request = pb2.ListOutboxEventsRequest(event_ids=ids[:1] * 501)
    assert (await refused(stub.ListOutboxEvents(request))).fields == ["event_ids"]


async def test_events_by_id(stub: "OutboxServiceAsyncStub", purchases_db: str) -> None:
    """Those of the ids that are there, page by page, and of one status if that is asked for, too."""
    ids = sorted(write(purchases_db, 6))
    give_up(purchases_db, ids[:1])
    request = pb2.ListOutboxEventsRequest(page_size=2, event_ids=[ids[4], UNKNOWN, ids[0].upper(), ids[2]])
    page = await stub.ListOutboxEvents(request)
    assert [event.event_id for event in page.outbox_events] == [ids[0], ids[2]]
    request.page_token = page.next_page_token
    page = await stub.ListOutboxEvents(request)
    assert ([event.event_id for event in page.outbox_events], page.next_page_token) == ([ids[4]], "")
    request = pb2.ListOutboxEventsRequest(status=pb2.OUTBOX_STATUS_FAILED, event_ids=ids)
    assert [event.event_id for event in (await stub.ListOutboxEvents(request)).outbox_events] == ids[:1]
    assert not (await stub.ListOutboxEvents(pb2.ListOutboxEventsRequest(event_ids=[UNKNOWN]))).outbox_events


async def refused(call: Any) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return Refusal(error.value)


async def test_requeue_by_id(stub: "OutboxServiceAsyncStub", purchases_db: str) -> None:
    """Whatever their status; what is NEW already is not counted. One that is not there stops the whole request."""
    new, failed, sent = write(purchases_db, 1), write(purchases_db, 2), write(purchases_db, 1)
    give_up(purchases_db, failed)
    send(purchases_db, sent)
    refusal = await refused(stub.RequeueEvents(pb2.RequeueEventsRequest(event_ids=[*failed, UNKNOWN])))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "EVENT_NOT_FOUND")
    assert UNKNOWN in refusal.status.message
    assert states(purchases_db)[failed[0]] == ("FAILED", 5)
    request = pb2.RequeueEventsRequest(event_ids=[*new, failed[0].upper(), failed[1], *sent, sent[0]])
    assert (await stub.RequeueEvents(request)).requeued_count == 3
    assert (await stub.RequeueEvents(request)).requeued_count == 0
    assert set(states(purchases_db).values()) == {("NEW", 0)}


async def test_requeue_that_says_nothing(stub: "OutboxServiceAsyncStub") -> None:
    cases = [
        (pb2.RequeueEventsRequest(), ["event_ids"]),
        (pb2.RequeueEventsRequest(event_ids=["1", UNKNOWN, "\0"]), ["event_ids[0]", "event_ids[2]"]),
        (pb2.RequeueEventsRequest(event_ids=[UNKNOWN] * 1001), ["event_ids"]),
        (pb2.RequeueEventsRequest(event_ids=[UNKNOWN], all_failed=True), ["event_ids"]),
        (pb2.RequeueEventsRequest(only_lost=True, all_failed=True), ["only_lost"]),
        (pb2.RequeueEventsRequest(only_lost=True), ["event_ids"]),
    ]
    for request, fields in cases:
        refusal = await refused(stub.RequeueEvents(request))
        assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, fields)


async def test_requeue_all_failed(stub: "OutboxServiceAsyncStub", purchases_db: str) -> None:
    ids = write(purchases_db, 2_500)
    give_up(purchases_db, ids[:2_345])
    assert (await stub.RequeueEvents(pb2.RequeueEventsRequest(all_failed=True))).requeued_count == 2_345
    assert set(states(purchases_db).values()) == {("NEW", 0)}
    assert (await stub.RequeueEvents(pb2.RequeueEventsRequest(all_failed=True))).requeued_count == 0


async def test_committed_ids_leave_no_gap(stub: "OutboxServiceAsyncStub", purchases_db: str) -> None:
    """A transaction that commits after a listing is in the next one, though it began before, and with older ids."""
    first = write(purchases_db, 2_300)
    give_up(purchases_db, first[:10])
    send(purchases_db, first[10:20])
    with psycopg.connect(purchases_db) as slow:
        late = new_ids(3, age_s=7200)
        insert(slow, late)
        ids, snapshot, as_of = await committed(stub)
        assert sorted(ids) == sorted(first)
        assert abs((datetime.datetime.now(datetime.UTC) - as_of).total_seconds()) < 20
        second = write(purchases_db, 5)
        ids, snapshot, _ = await committed(stub, snapshot)
        assert sorted(ids) == sorted(second)
        slow.commit()
    ids, snapshot, later = await committed(stub, snapshot)
    assert sorted(ids) == sorted(late)
    assert later > as_of
    assert (await committed(stub, snapshot))[0] == []
    with psycopg.connect(purchases_db) as connection:  # what retention may rely on
        (kept,) = connection.execute("SELECT realm || ':' || after_snapshot FROM outbox_listing").fetchone() or (None,)
    assert kept == snapshot


async def test_committed_ids_under_load(stub: "OutboxServiceAsyncStub", purchases_db: str) -> None:
    """Eight writers whose transactions overlap, some rolled back: the listings together have every event once."""

    async def writer() -> list[str]:
        written: list[str] = []
        async with await psycopg.AsyncConnection.connect(purchases_db) as connection:
            for _ in range(40):
                ids = new_ids(random.randint(1, 5), age_s=random.uniform(0, 60))
                await connection.execute(
                    "INSERT INTO outbox_events (event_id, event_type, aggregate_id, occurred_at, payload_json)"
                    " SELECT id, 'PurchaseCreated', id, now(), '{}' FROM unnest(%s::uuid[]) AS id",
                    [ids],
                )
                await asyncio.sleep(random.uniform(0, 0.02))
                if random.random() < 0.1:
                    await connection.rollback()
                else:
                    await connection.commit()
                    written += ids
        return written

    listed, snapshot, _ = await committed(stub)  # whoever asks for everything may get what is written meanwhile twice
    writers = [asyncio.ensure_future(writer()) for _ in range(8)]
    while not all(task.done() for task in writers):
        ids, snapshot, _ = await committed(stub, snapshot)
        listed += ids
    listed += (await committed(stub, snapshot))[0]
    written = [event_id for task in writers for event_id in task.result()]
    assert sorted(listed) == sorted(written)


async def test_committed_ids_after_a_restore(stub: "OutboxServiceAsyncStub", purchases_db: str) -> None:
    """A snapshot of another server, or of this one's future, says nothing about this one: everything is listed."""
    ids = write(purchases_db, 5)
    _, snapshot, _ = await committed(stub)
    assert (await committed(stub, snapshot))[0] == []
    realm, value = snapshot.split(":", 1)
    other_timeline = ".".join([realm.split(".")[0], "0000000F", realm.split(".")[2]])
    xmin = int(value.split(":")[0])
    for stale in (f"{other_timeline}:{value}", f"{realm}:{xmin + 10**6}:{xmin + 10**6}:", f"1.00000001.5:{value}"):
        assert sorted((await committed(stub, stale))[0]) == sorted(ids)
    with psycopg.connect(purchases_db) as connection:  # an event that came with a dump, from a server far ahead
        connection.execute("UPDATE outbox_events SET created_xid = '99999999999' WHERE event_id = %s", [ids[0]])
    assert (await committed(stub, snapshot))[0] == []
    assert sorted((await committed(stub))[0]) == sorted(ids)


async def test_committed_ids_after_a_restore_that_nothing_else_tells(
    stub: "OutboxServiceAsyncStub", purchases_db: str
) -> None:
    """A disk's snapshot that was put back: the same server and timeline, and its transactions may have passed ours."""
    ids = write(purchases_db, 3)
    _, first, _ = await committed(stub)
    (backup,) = noted(purchases_db)
    _, lost, _ = await committed(stub, first)
    with psycopg.connect(purchases_db) as connection:
        connection.execute("UPDATE outbox_listing SET given_snapshot = %s", [backup[2]])
    ids += write(purchases_db, 3)
    assert sorted((await committed(stub, lost))[0]) == sorted(ids)


async def test_who_only_asks_changes_nothing(stub: "OutboxServiceAsyncStub", purchases_db: str) -> None:
    """What the retention takes as known, only the reader says that it keeps events for."""
    ids = write(purchases_db, 5)
    _, snapshot, _ = await committed(stub, (await committed(stub))[1])
    before = noted(purchases_db)
    assert sorted((await committed(stub, acknowledge=False))[0]) == sorted(ids)
    write(purchases_db, 2)
    assert len((await committed(stub, snapshot, acknowledge=False))[0]) == 2
    listed, position, as_of = await committed(stub, acknowledge=False, position_only=True)
    assert (listed, noted(purchases_db)) == ([], before)
    late = write(purchases_db, 2)
    assert set(late) <= set((await committed(stub, position))[0])
    assert abs((datetime.datetime.now(datetime.UTC) - as_of).total_seconds()) < 20
    assert noted(purchases_db) != before
    for request in ({"after_snapshot": snapshot}, {"acknowledge": True}):
        asked = pb2.ListCommittedEventIdsRequest(position_only=True, **request)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.ListCommittedEventIds(asked, timeout=WAIT_S).read()
        assert Refusal(error.value).fields == ["position_only"]


def noted(url: str) -> list[Any]:
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT realm, after_snapshot, given_snapshot FROM outbox_listing").fetchall()


async def test_committed_ids_of_no_snapshot(stub: "OutboxServiceAsyncStub") -> None:
    values = ("5:3:", "1:5:9", "0:0:", f"{'9' * 20}:{'9' * 20}:")
    for text in ("x", "7", "1:1:", "\0", "é" * 50, *(f"1.00000001.5:{value}" for value in values)):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await committed(stub, text)
        refusal = Refusal(error.value)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TOKEN"), text


async def test_new_ids_are_found_by_index(stub: "OutboxServiceAsyncStub", purchases_db: str) -> None:
    """However many events were sent before."""
    with psycopg.connect(purchases_db) as connection:
        ids = new_ids(20_000)
        insert(connection, ids)
        connection.execute("UPDATE outbox_events SET status = 'SENT'")
    _, snapshot, _ = await committed(stub)
    write(purchases_db, 3)
    with psycopg.connect(purchases_db, autocommit=True) as connection:
        connection.execute("SET enable_seqscan = off")
        value = snapshot.split(":", 1)[1]
        plan = "\n".join(
            line
            for (line,) in connection.execute(
                """
                EXPLAIN SELECT pg_current_snapshot()::text UNION ALL
                SELECT event_id::text FROM outbox_events
                WHERE created_xid >= pg_snapshot_xmax(%(after)s::pg_snapshot)
                    AND created_xid < pg_snapshot_xmax(pg_current_snapshot())
                    OR created_xid = ANY(ARRAY(SELECT pg_snapshot_xip(%(after)s::pg_snapshot)))
                """,
                {"after": value},
            )
        )
    assert "created_xid_event_id_idx" in plan
    assert "Seq Scan" not in plan


async def test_commands(
    stub: "OutboxServiceAsyncStub",
    purchases_db: str,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What an operator calls: the state, the events, and once more with those that were given up."""
    ids = sorted(write(purchases_db, 3))
    give_up(purchases_db, ids[:2])
    monkeypatch.setenv("RELAY_TARGET", address)

    async def said(*arguments: str) -> tuple[int, str]:
        code = await asyncio.to_thread(relay.commands.carry_out, arguments)
        lines = capsys.readouterr().out.splitlines(keepends=True)
        return code, "".join(line for line in lines if not OF_THE_LOG.match(line))  # the relay's, of this process, too

    code, text = await said("status")
    assert code == 1
    assert "given up (FAILED)" in text
    code, text = await said("status", "--json")
    assert (code, json.loads(text)["failedCount"]) == (1, "2")
    code, text = await said("events", "--status", "FAILED", "--json")
    assert (code, [json.loads(line)["eventId"] for line in text.splitlines()]) == (0, ids[:2])
    code, text = await said("events", "--limit", "1")
    assert code == 0
    assert ids[0] in text  # whole, also in 80 columns
    code, text = await said("requeue", ids[0])
    assert (code, text) == (0, "1 requeued.\n")
    code, text = await said("requeue", "--all-failed", "--json")
    assert (code, json.loads(text)) == (0, {"requeued_count": 1})
    code = await asyncio.to_thread(relay.commands.carry_out, ["requeue", UNKNOWN, "--json"])
    output = capsys.readouterr()
    assert code == 1
    assert f"{address}: NOT_FOUND" in output.err
    assert f"{address}: NOT_FOUND" not in output.out  # which a program reads
    assert (await said("requeue"))[0] == 2
