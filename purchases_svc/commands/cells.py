"""`retail-purchases cells`: what each cell of the chain has, and how it is."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import grpc
from rich.table import Column, Table

from chassis import cells, cli, grpc_client, tls
from chassis.cells import Cell, Cells
from chassis.tls import Credentials
from purchases_svc.settings import CellsCommandSettings
from retail.purchases.v1 import purchases_service_pb2 as purchases_pb
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from retail.relay.v1 import outbox_service_pb2 as relay_pb
from retail.relay.v1.outbox_service_pb2_grpc import OutboxServiceStub

CALL_TIMEOUT_S = 10.0


class Seen(NamedTuple):
    """A cell, and what its services say: None for one that does not answer."""

    cell: Cell
    purchases: purchases_pb.GetCellResponse | None
    relay: relay_pb.GetOutboxStatusResponse | None
    problems: list[str]


def run(config: CellsCommandSettings, *, as_json: bool) -> bool:
    """Print them; True if all is well."""
    listed = listed_in(config)
    seen = _told_apart(ask(listed, tls.credentials(config)))
    if as_json:
        cli.console().print_json(json.dumps([_as_json(each) for each in seen]))
    else:
        _show(seen)
    return not any(each.problems for each in seen)


def listed_in(config: CellsCommandSettings) -> Cells:
    """What the file says; without one, the only cell.

    Raises:
        SettingsError: it makes no sense.
    """
    if config.cells_file:
        return cells.follow(config).value
    return cells.only(config.purchases_target, config.relay_target)


def ask(listed: Cells, credentials: Credentials | None) -> list[Seen]:
    """All cells at once; who does not answer is told of among the problems."""
    with ExitStack() as channels:
        asked = []
        for cell in listed.by_name.values():
            purchases, relay = (
                channels.enter_context(grpc_client.connect_blocking(target, credentials))
                for target in (cell.purchases, cell.relay)
            )
            has: Any = PurchasesServiceStub(purchases).GetCell
            outbox: Any = OutboxServiceStub(relay).GetOutboxStatus
            asked.append(
                (
                    cell,
                    has.future(purchases_pb.GetCellRequest(), timeout=CALL_TIMEOUT_S),
                    outbox.future(relay_pb.GetOutboxStatusRequest(), timeout=CALL_TIMEOUT_S),
                )
            )
        return [_seen(listed, *each) for each in asked]


def _seen(listed: Cells, cell: Cell, has: Any, outbox: Any) -> Seen:
    answers: list[Any] = []
    problems = []
    for who, call in ((f"purchases at {cell.purchases}", has), (f"relay at {cell.relay}", outbox)):
        try:
            answers.append(call.result())
        except grpc.RpcError as error:
            answers.append(None)
            problems.append(f"{who}: {error.code().name}: {error.details()}")
    purchases, relay = answers
    if purchases and purchases.cell != cell.name:
        problems.append(f"purchases at {cell.purchases} is of cell {purchases.cell}")
    if relay and relay.breaker_state != relay_pb.BREAKER_STATE_CLOSED:
        problems.append(f"relay at {cell.relay} does not publish: {relay.breaker_reason}")
    if relay and relay.failed_count:
        problems.append(f"relay at {cell.relay} has given up {relay.failed_count:,} events")
    moves = purchases.moves if purchases else ()
    problems.extend(filter(None, (_of_move(listed, cell, move) for move in moves)))
    return Seen(cell, purchases, relay, problems)


def _of_move(listed: Cells, cell: Cell, move: purchases_pb.BranchMove) -> str | None:
    since = f"{move.since_time.ToDatetime():%Y-%m-%d %H:%M} UTC"
    if move.state == purchases_pb.BRANCH_STATE_LEAVING:
        return f"branch {move.branch_id} has been leaving for {move.other_cell} since {since}: nobody takes its sales"
    if move.state == purchases_pb.BRANCH_STATE_ARRIVING:
        return f"branch {move.branch_id} has been arriving from {move.other_cell} since {since}"
    here = listed.of_branch(move.branch_id) == cell
    if move.state == purchases_pb.BRANCH_STATE_HERE and not here:
        return f"branch {move.branch_id} is here since {since}, and the file does not say so"
    if move.state == purchases_pb.BRANCH_STATE_LEFT and here:
        return f"branch {move.branch_id} is in {move.other_cell} since {since}, and the file says that it is here"
    return None


def _told_apart(seen: Sequence[Seen]) -> list[Seen]:
    """Two cells with one database would record each other's branches."""
    told: list[Seen] = []
    for each in seen:
        its = each.purchases.database_id if each.purchases else None
        same = [other for other in told if its and other.purchases and other.purchases.database_id == its]
        problems = [f"has the database of cell {other.cell.name}" for other in same]
        told.append(each._replace(problems=each.problems + problems))
    return told


def _show(seen: Sequence[Seen]) -> None:
    numbers = ("purchases", "size MiB", "sales/s", "waiting", "the oldest for")
    table = Table("cell", "branches", *(Column(name, justify="right") for name in numbers), "state")
    for each in seen:
        has, outbox = each.purchases, each.relay
        table.add_row(
            each.cell.name,
            _branches(each.cell),
            f"~{has.purchase_count:,}" if has else "?",
            f"{has.byte_count / 2**20:,.1f}" if has else "?",
            f"{has.sales_per_second:,.1f}" if has else "?",
            f"{outbox.new_count:,}" if outbox else "?",
            f"{_lag_s(outbox):,.0f} s" if outbox else "?",
            "\n".join(each.problems) or "well",
        )
    cli.console().print(table)


def _branches(cell: Cell) -> str:
    if cell.branches == (range(cells.BRANCH_MAX + 1),):
        return "all"
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in cell.branches)


def _lag_s(outbox: relay_pb.GetOutboxStatusResponse) -> float:
    """For so long the oldest event waits to be published."""
    return outbox.oldest_pending_age.ToTimedelta().total_seconds() if outbox.HasField("oldest_pending_age") else 0.0


def _as_json(each: Seen) -> dict[str, Any]:
    has, outbox = each.purchases, each.relay
    return {
        "cell": each.cell.name,
        "branches": _branches(each.cell),
        "purchases_address": each.cell.purchases,
        "relay_address": each.cell.relay,
        "purchase_count_estimate": has.purchase_count if has else None,
        "byte_count": has.byte_count if has else None,
        "sales_per_second": has.sales_per_second if has else None,
        "waiting_count": outbox.new_count if outbox else None,
        "oldest_waiting_seconds": _lag_s(outbox) if outbox else None,
        "moves": [_move_as_json(move) for move in has.moves] if has else None,
        "problems": each.problems,
    }


def _move_as_json(move: purchases_pb.BranchMove) -> dict[str, Any]:
    return {
        "branch_id": move.branch_id,
        "state": purchases_pb.BranchState.Name(move.state).removeprefix("BRANCH_STATE_"),
        "other_cell": move.other_cell,
        "since": move.since_time.ToJsonString(),
    }
