"""AuditService over gRPC, and the command that asks it."""

import asyncio
import os
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import grpc
import pytest

from analytics_svc.commands import audit as audit_command
from analytics_svc.proof.audit_server import AuditServicer
from analytics_svc.proof.verdicts import Verdict
from analytics_svc.upstream.source import CellSource, Source
from chassis import grpc_server, wire
from retail.analytics.v1 import audit_service_pb2 as pb
from retail.analytics.v1.audit_service_pb2_grpc import AuditServiceStub, add_AuditServiceServicer_to_server
from tests.integration.auditing import FOUR_CELLS, LAST, counted_anew, sweep
from tests.integration.chain import DAYS, FIRST, UTC_ZONE, Chain
from tests.integration.conftest import free_address
from tests.integration.purchase_events import query, read_models
from tests.integration.sales import refusal


@asynccontextmanager
async def serving(chain: Chain, source: Source) -> AsyncIterator[Any]:
    """AuditService over gRPC."""
    host = grpc_server.Server("analytics.retail.example")
    servicer = AuditServicer(chain.pool, chain.url, source)
    address = free_address()
    service = grpc_server.Service(add_AuditServiceServicer_to_server, servicer, "retail.analytics.v1.AuditService")
    async with host.listening(address, [service]), grpc.aio.insecure_channel(address) as channel:
        stub: Any = AuditServiceStub(channel)
        stub.address = address
        yield stub


@pytest.fixture
async def desk(chain: Chain) -> AsyncIterator[Any]:
    async with serving(chain, chain.source) as stub:
        yield stub


async def test_the_service_compares_repairs_and_tells(chain: Chain, desk: Any) -> None:
    """Over gRPC: the comparison's rows, a repair and what it did, and what the audit knows."""
    await chain.sell(40, seed=9)
    recorded = await chain.recorded()
    await chain.apply(recorded[:-3])
    query(chain.url, "UPDATE sales_totals SET items_sum = items_sum + 1 WHERE branch_id = 0")
    request = pb.CompareControlTotalsRequest(first_date=wire.date(FIRST), last_date=wire.date(LAST))
    compared = await desk.CompareControlTotals(request, timeout=1)
    assert (compared.verdict, compared.pending_count) == (pb.AUDIT_VERDICT_PENDING, 3)
    await sweep(chain)
    known = await desk.GetAuditStatus(pb.GetAuditStatusRequest())
    assert known.verdict == pb.AUDIT_VERDICT_DIFFERENT
    assert [(finding.table, finding.key) for finding in known.findings] == [("sales_totals", "branch_id 0")]
    added = 0
    for number in range(DAYS):
        day = wire.date(FIRST + timedelta(days=number))
        rebuilt = await desk.RebuildDay(pb.RebuildDayRequest(sales_date=day))
        added += rebuilt.added_purchase_count
        assert rebuilt.repaired_row_count == (1 if number == 0 else 0)
    assert added == 3
    compared = await desk.CompareControlTotals(request)
    assert (compared.verdict, compared.pending_count, list(compared.findings)) == (pb.AUDIT_VERDICT_AGREED, 0, [])
    assert sum(row.recorded.purchase_count for row in compared.rows) == 40
    await sweep(chain)
    known = await desk.GetAuditStatus(pb.GetAuditStatusRequest())
    assert (known.verdict, known.proven_day_count, known.stale) == (pb.AUDIT_VERDICT_AGREED, DAYS, False)
    assert known.last_cycle_time.seconds > 1_700_000_000
    assert known.last_sweep_time.seconds > 1_700_000_000


async def test_the_command_says_what_the_audit_knows(chain: Chain) -> None:
    """Sums may agree while rows are wrong: the exit code is that of the worse, and old news is none."""
    await chain.sell(20, seed=18)
    await chain.apply(await chain.recorded())

    async def said() -> tuple[int, str]:
        command = [sys.executable, "-m", "analytics_svc", "audit"]
        process = await asyncio.create_subprocess_exec(*command, env=os.environ | env, stdout=asyncio.subprocess.PIPE)
        output, _ = await process.communicate()
        return process.returncode or 0, output.decode()

    async with serving(chain, chain.source) as stub:
        env = {"CONSUMER_TARGET": stub.address}
        assert (await said())[0] == 3  # nobody has looked yet
        await sweep(chain)
        assert (await said())[0] == 0
        query(chain.url, FOUR_CELLS.format("+", FIRST))
        await sweep(chain)
        code, text = await said()
        assert code == 1
        assert f"product_sales_daily, day {FIRST}" in " ".join(text.split())
        query(chain.url, FOUR_CELLS.format("-", FIRST))
        await sweep(chain)
        query(chain.url, "UPDATE audit_status SET compared_at = compared_at - interval '1 day'")
        code, text = await said()
        assert (code, "TOO OLD" in text) == (3, True)


@pytest.mark.parametrize("far", [date.min, date.max])
async def test_a_day_at_the_end_of_the_calendar(chain: Chain, far: date) -> None:
    """However it got there, it is foreign, named and taken out; everything else is audited, by hand, too."""
    await chain.sell(20, seed=12)
    recorded = await chain.recorded()
    await chain.apply([*recorded, recorded[0]._replace(event_id=str(uuid.uuid4()), day=far)])
    found = await sweep(chain)
    assert found.verdict is Verdict.FOREIGN
    assert {row.day for row in found.rows} == {far}
    async with serving(chain, chain.source) as stub:
        asked = []
        real = stub.CompareControlTotals

        class Counting:
            GetAuditStatus = stub.GetAuditStatus

            @staticmethod
            def CompareControlTotals(request: Any, timeout: float) -> Any:  # noqa: N802
                asked.append(request)
                return asyncio.run_coroutine_threadsafe(call(request), loop).result(timeout)

        async def call(request: Any) -> Any:
            return await real(request)

        loop = asyncio.get_running_loop()
        replies = await asyncio.to_thread(audit_command._ask, Counting, None, None)
        assert len(asked) <= 4
        assert {row.verdict for reply in replies for row in reply.rows} == {1, 4}
        rebuilt = await stub.RebuildDay(pb.RebuildDayRequest(sales_date=wire.date(far)))
        assert (rebuilt.foreign_event_count, rebuilt.agreed) == (1, True)
    assert (await sweep(chain)).verdict is Verdict.AGREED
    assert read_models(chain.url) == await counted_anew(chain)


async def test_bad_requests_name_every_field(desk: Any) -> None:
    """Dates are required, in order, and 31 days at most."""
    refused = await refusal(desk.CompareControlTotals(pb.CompareControlTotalsRequest()))
    assert refused.fields == ["first_date", "last_date"]
    request = pb.CompareControlTotalsRequest(first_date=wire.date(FIRST), last_date=wire.date(date(2026, 4, 1)))
    assert (await refusal(desk.CompareControlTotals(request))).fields == ["last_date"]
    assert (await refusal(desk.RebuildDay(pb.RebuildDayRequest()))).fields == ["sales_date"]


async def test_another_zone_and_a_missing_service_are_refused(
    chain: Chain, purchases_channel: grpc.aio.Channel
) -> None:
    """Days of two zones are not compared, nor rebuilt; a purchases service that is away is named."""
    compare = pb.CompareControlTotalsRequest(first_date=wire.date(FIRST), last_date=wire.date(LAST))
    refusals = []
    async with grpc.aio.insecure_channel(free_address()) as nowhere:
        for source in (CellSource(purchases_channel, ZoneInfo("Asia/Tokyo")), CellSource(nowhere, UTC_ZONE)):
            async with serving(chain, source) as stub:
                for call in (
                    stub.CompareControlTotals(compare),
                    stub.RebuildDay(pb.RebuildDayRequest(sales_date=compare.first_date)),
                ):
                    refused = await refusal(call)
                    refusals.append((refused.code, refused.reason))
    zone = (grpc.StatusCode.FAILED_PRECONDITION, "TIME_ZONES_DIFFER")
    away = (grpc.StatusCode.UNAVAILABLE, "PURCHASES_UNAVAILABLE")
    assert refusals == [zone, zone, away, away]
