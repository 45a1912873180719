"""The gRPC face: requests to values, values to responses. Errors are raised; `chassis.grpc_guard` maps them."""

import asyncio
import datetime
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any
from zoneinfo import ZoneInfo

from google.protobuf import message

from chassis import identity, wire
from chassis.errors import (
    DatabaseUnavailable,
    FieldReason,
    InvalidRequest,
    Overloaded,
    TransactionConflict,
    Violation,
)
from chassis.grpc_server import CALL_TIMEOUT_S
from chassis.parts import in_parts
from chassis.postgres import Connection, Pool, on_standby
from chassis.shares import Shares
from purchases_svc import (
    branches,
    cell_status,
    control_totals,
    messages,
    pages,
    recorded_days,
    tills,
    windows,
)
from purchases_svc.errors import PurchaseNotFound
from purchases_svc.record import Recorder
from purchases_svc.upload import Uploads
from retail.purchases.v1 import (
    purchases_service_pb2,
    purchases_service_pb2_grpc,
)

UPLOAD_BYTES_MAX = 1 << 20  # of a message of UploadPurchases, which brings hundreds of sales at once
CALLS_OF_CONNECTION_MAX = 32  # at once: some 10 ms of work, and enough for thousands of sales a second
PURCHASES_PER_PAGE = (50, 500)  # by default, at most
CONTROL_TOTALS_PER_PAGE = (500, 1_000)
CONTROL_TOTALS_DAYS_MAX = 31
INCOMPLETE_TILLS_MAX = 100
BRANCH_IDS_MAX = 1_000
CUSTOMER_IDS_MAX = 1_000
READ_KINDS = 4  # three of lists, each of which may take long, and all reads of one thing:
ONE = "one"
PROOF = ("retail-purpose", "proof")  # metadata of an audit's or a repair's export
EXPORT_WAIT_S = 1.0  # for an export to begin: one whose reader left a moment ago is still being ended


class PurchasesServicer(purchases_service_pb2_grpc.PurchasesServiceServicer):
    """`retail.purchases.v1.PurchasesService`."""

    def __init__(
        self,
        recorder: Recorder,
        uploads: Uploads,
        shares: Shares,
        export_pool: Pool,
        tokens: wire.PageTokens,
        zone: ZoneInfo,
    ) -> None:
        """`export_pool` has a connection for each export that may run at once, and one for the proof alone."""
        self._recorder, self._uploads = recorder, uploads
        self._shares, self._tokens, self._zone = shares, tokens, zone
        self._export_pool = export_pool
        self._exports, self._proof = asyncio.Semaphore(export_pool.max_size - 1), asyncio.Semaphore(1)

    async def CreatePurchase(
        self, request: purchases_service_pb2.CreatePurchaseRequest, context: Any
    ) -> purchases_service_pb2.CreatePurchaseResponse:
        sale = self._recorder.ours(messages.parse_sale(request))
        recorded = await self._recorder.record(sale, identity.current().name)
        return messages.answer(request, recorded)

    async def GetPurchase(
        self, request: purchases_service_pb2.GetPurchaseRequest, context: Any
    ) -> purchases_service_pb2.GetPurchaseResponse:
        purchase_id = required_uuid("purchase_id", request.purchase_id)
        async with reading(self._shares, context) as connection:
            purchase = await pages.by_id(connection, purchase_id, identity.current().branch_id)
        if purchase is None:
            raise PurchaseNotFound(f"no purchase has the id {purchase_id}", metadata={"purchase_id": purchase_id})
        return purchases_service_pb2.GetPurchaseResponse(purchase=messages.to_purchase(purchase))

    async def ListPurchases(
        self, request: purchases_service_pb2.ListPurchasesRequest, context: Any
    ) -> purchases_service_pb2.ListPurchasesResponse:
        violations: list[Violation] = []
        limit = wire.page_size(request.page_size, *PURCHASES_PER_PAGE, violations)
        branch_id = request.branch_id if request.HasField("branch_id") else None
        if branch_id is not None:
            wire.check_id("branch_id", branch_id, violations)
        customer_id = None
        if request.HasField("customer_id"):
            customer_id = wire.parse_uuid(request.customer_id)
            if customer_id is None:
                violations.append(Violation("customer_id", wire.UUID_RULE, FieldReason.NOT_A_UUID))
        start, end = (_optional_time(request, field, violations) for field in ("start_time", "end_time"))
        raise_if(violations)
        position = self._tokens.read(request)
        before = (datetime.datetime.fromisoformat(position[0]), position[1]) if position else None
        async with reading(self._shares, context, "purchases") as connection:
            purchases, more = await pages.page(
                connection,
                limit=limit,
                before=before,
                branch_id=branch_id,
                customer_id=customer_id,
                start=start,
                end=end,
            )
        token = ""
        if more:
            last = purchases[-1]
            token = self._tokens.issue(request, [last.sale.purchase_time.isoformat(), last.purchase_id])
        return purchases_service_pb2.ListPurchasesResponse(
            purchases=map(messages.to_purchase, purchases), next_page_token=token
        )

    async def ListControlTotals(
        self, request: purchases_service_pb2.ListControlTotalsRequest, context: Any
    ) -> purchases_service_pb2.ListControlTotalsResponse:
        violations: list[Violation] = []
        limit = wire.page_size(request.page_size, *CONTROL_TOTALS_PER_PAGE, violations)
        first, last = (_required_date(request, field, violations) for field in ("first_date", "last_date"))
        if first and last and not 0 <= (last - first).days < CONTROL_TOTALS_DAYS_MAX:
            rule = f"must not be before first_date, nor make the range longer than {CONTROL_TOTALS_DAYS_MAX} days"
            violations.append(Violation("last_date", rule, FieldReason.BAD_RANGE))
        if len(request.branch_ids) > BRANCH_IDS_MAX:
            rule = f"must have at most {BRANCH_IDS_MAX:,} branches"
            violations.append(Violation("branch_ids", rule, FieldReason.TOO_MANY))
        else:
            for index, branch_id in enumerate(request.branch_ids):
                wire.check_id(f"branch_ids[{index}]", branch_id, violations)
        end = _optional_time(request, "end_time", violations)
        raise_if(violations)
        assert first and last
        position = self._tokens.read(request)
        after = (datetime.date.fromisoformat(position[0]), position[1]) if position else None
        async with reading(self._shares, context, "control totals") as connection:
            require_primary(connection)
            rows = await control_totals.control_totals(
                connection,
                first=first,
                last=last,
                branch_ids=request.branch_ids,
                after=after,
                limit=limit + 1,
                end=end,
            )
            stored_range = await control_totals.stored_range(connection)
            read_at, complete_from = await control_totals.read_marks(connection, self._zone)
        page = rows[:limit]
        response = purchases_service_pb2.ListControlTotalsResponse(
            control_totals=map(_control_totals, page), time_zone=self._zone.key, read_time=wire.timestamp(read_at)
        )
        if len(rows) > limit:
            response.next_page_token = self._tokens.issue(request, [page[-1].day.isoformat(), page[-1].branch_id])
        if stored_range:
            response.earliest_sales_date.CopyFrom(wire.date(stored_range[0]))
            response.latest_sales_date.CopyFrom(wire.date(stored_range[1]))
        if complete_from:
            response.complete_from_date.CopyFrom(wire.date(complete_from))
        return response

    async def ListRecordedDays(
        self, request: purchases_service_pb2.ListRecordedDaysRequest, context: Any
    ) -> purchases_service_pb2.ListRecordedDaysResponse:
        after = recorded_days.parse(request.after_position)
        async with reading(self._shares, context, "control totals") as connection:
            require_primary(connection)
            recorded = await recorded_days.since(connection, after)
        return purchases_service_pb2.ListRecordedDaysResponse(
            sales_dates=map(wire.date, recorded.days),
            position=str(recorded.position),
            as_of_time=wire.timestamp(recorded.as_of),
            time_zone=self._zone.key,
        )

    async def ReportTill(
        self, request: purchases_service_pb2.ReportTillRequest, context: Any
    ) -> purchases_service_pb2.ReportTillResponse:
        told = messages.parse_report(request)
        ours = self._recorder.branches
        ours.require_ours(told.till.branch_id)
        async with reading(self._shares, context) as connection:
            if move := (await branches.closed(connection, [told.till.branch_id])).get(told.till.branch_id):
                raise ours.refusal(told.till.branch_id, move) or TransactionConflict("the branch moves; try again")
            state = await tills.report(connection, told)
        return purchases_service_pb2.ReportTillResponse(
            state=messages.to_till_state(state),
            server_time=wire.timestamp(datetime.datetime.now(datetime.UTC)),
            time_zone=self._zone.key,
        )

    async def GetTillState(
        self, request: purchases_service_pb2.GetTillStateRequest, context: Any
    ) -> purchases_service_pb2.GetTillStateResponse:
        till, epoch = messages.parse_till(request)
        self._recorder.branches.require_ours(till.branch_id)
        async with reading(self._shares, context) as connection:
            states = [await tills.state(connection, till, epoch)] if epoch else await tills.states(connection, till)
        return purchases_service_pb2.GetTillStateResponse(states=map(messages.to_till_state, states))

    async def ListIncompleteTills(
        self, request: purchases_service_pb2.ListIncompleteTillsRequest, context: Any
    ) -> purchases_service_pb2.ListIncompleteTillsResponse:
        async with reading(self._shares, context, "control totals") as connection:
            found = await tills.troubles(connection, older_than=tills.GAP_AGE, conflicts_for=tills.CONFLICTS_TOLD)
        return purchases_service_pb2.ListIncompleteTillsResponse(
            incomplete_tills=map(messages.to_incomplete_till, found[:INCOMPLETE_TILLS_MAX]), total_size=len(found)
        )

    @in_parts(purchases_service_pb2.UploadPurchasesRequest)
    async def UploadPurchases(
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[purchases_service_pb2.UploadPurchasesResponse]:
        async with aclosing(self._uploads.answer(request_iterator, identity.current().name)) as responses:
            async for response in responses:
                yield response

    async def ExportPurchases(
        self, request: purchases_service_pb2.ExportPurchasesRequest, context: Any
    ) -> AsyncIterator[purchases_service_pb2.ExportPurchasesResponse]:
        violations: list[Violation] = []
        first, last = (_required_date(request, field, violations) for field in ("first_date", "last_date"))
        if first and last and last < first:
            violations.append(Violation("last_date", "must not be before first_date", FieldReason.BAD_RANGE))
        customer_ids = [wire.parse_uuid(text) for text in request.customer_ids[:CUSTOMER_IDS_MAX]]
        for n, customer_id in enumerate(customer_ids):
            if customer_id is None:
                violations.append(Violation(f"customer_ids[{n}]", wire.UUID_RULE, FieldReason.NOT_A_UUID))
        if len(request.customer_ids) > CUSTOMER_IDS_MAX:
            rule = f"must have at most {CUSTOMER_IDS_MAX:,} customers"
            violations.append(Violation("customer_ids", rule, FieldReason.TOO_MANY))
        raise_if(violations)
        assert first and last
        asked = [customer_id for customer_id in customer_ids if customer_id]
        async with self._exporting(context) as connection:
            bounds = await control_totals.stored_range(connection)
            if bounds is None:
                return
            # A range may be as long as the calendar; only days with sales take time.
            last = min(last, bounds[1])
            day = await control_totals.next_day(connection, max(first, bounds[0]), last)
            while day:
                async with aclosing(pages.export_day(connection, day, asked)) as purchases:
                    async for purchase in purchases:
                        yield purchases_service_pb2.ExportPurchasesResponse(
                            event_id=purchase.event_id, purchase=messages.to_purchase(purchase)
                        )
                day = await control_totals.next_day(connection, day + windows.DAY, last)

    async def GetCell(
        self, request: purchases_service_pb2.GetCellRequest, context: Any
    ) -> purchases_service_pb2.GetCellResponse:
        async with reading(self._shares, context, "control totals") as connection:
            status = await cell_status.read(connection)
        return purchases_service_pb2.GetCellResponse(
            cell=self._recorder.branches.cell,
            database_id=status.database_id,
            purchase_count=status.purchases,
            byte_count=status.bytes,
            sales_per_second=status.sales_per_s,
            moves=(
                purchases_service_pb2.BranchMove(
                    branch_id=move.branch_id,
                    state=purchases_service_pb2.BranchState.Value(f"BRANCH_STATE_{move.state}"),
                    other_cell=move.other_cell,
                    since_time=wire.timestamp(move.since),
                )
                for move in status.moves
            ),
        )

    @asynccontextmanager
    async def _exporting(self, context: Any) -> AsyncIterator[Connection]:
        """A connection of the few for exports: one lasts as long as its reader reads, and must hold up no other call.

        The proof has one that no other reader takes. That it is the proof is what it says of itself.

        Raises:
            Overloaded: all are taken, and none got free for a moment.
        """
        for_proof = PROOF in (context.invocation_metadata() or ()) and not self._proof.locked()
        turn = self._proof if for_proof else self._exports
        try:
            async with asyncio.timeout(EXPORT_WAIT_S):
                await turn.acquire()
        except TimeoutError:
            most = self._export_pool.max_size - 1
            raise Overloaded(f"{most} exports are running, which is the most; try again later") from None
        try:
            async with self._export_pool.connection() as connection:
                yield connection
        finally:
            turn.release()


@asynccontextmanager
async def reading(shares: Shares, context: Any, kind: str = ONE) -> AsyncIterator[Connection]:
    """A transaction whose statements end when the caller's deadline does, so that nobody's query lingers."""
    remaining = context.time_remaining()
    timeout_s = CALL_TIMEOUT_S if remaining is None else min(max(remaining, 0.001), CALL_TIMEOUT_S)
    async with shares.connection(kind, timeout_s) as connection, connection.transaction():
        await connection.execute(
            "SELECT set_config('statement_timeout', %s, true)", [str(max(int(timeout_s * 1000), 1))]
        )
        yield connection


def require_primary(connection: Connection) -> None:
    """What a standby lacks, the audit would call invented, and a repair would take out."""
    if on_standby(connection):
        raise DatabaseUnavailable("a standby cannot tell what is recorded by now; ask the primary")


def _control_totals(row: control_totals.ControlTotals) -> purchases_service_pb2.ControlTotals:
    return purchases_service_pb2.ControlTotals(
        sales_date=wire.date(row.day),
        branch_id=row.branch_id,
        purchase_count=row.purchase_count,
        purchase_with_customer_count=row.purchase_with_customer_count,
        item_count=row.item_count,
        revenue=wire.decimal(row.revenue),
    )


def raise_if(violations: list[Violation]) -> None:
    if violations:
        raise InvalidRequest(violations)


def required_uuid(field: str, text: str) -> str:
    parsed = wire.parse_uuid(text)
    if parsed is None:
        raise InvalidRequest([Violation(field, wire.UUID_RULE, FieldReason.NOT_A_UUID)])
    return parsed


def _required_date(request: message.Message, field: str, violations: list[Violation]) -> datetime.date | None:
    if not request.HasField(field):
        violations.append(Violation(field, "is required", FieldReason.REQUIRED))
        return None
    return wire.parse_date(request, field, violations)


def _optional_time(request: message.Message, field: str, violations: list[Violation]) -> datetime.datetime | None:
    if not request.HasField(field):
        return None
    moment = wire.parse_timestamp(getattr(request, field))
    if moment is None:
        violations.append(Violation(field, wire.TIME_RULE, FieldReason.NOT_A_TIME))
    return moment
