"""`retail-purchases move BRANCH --to CELL`: a branch moves from one cell to another while it sells."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc

from chassis import cells, cli, grpc_client, migrate, tls
from chassis.cells import Cell
from chassis.settings import SettingsError
from purchases_svc.moving import cells_file, protocol
from purchases_svc.moving.copying import MoveError
from purchases_svc.moving.protocol import Move, Side
from purchases_svc.settings import MoveSettings
from retail.purchases.v1 import purchases_service_pb2 as pb
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub

CALL_TIMEOUT_S = 10.0
_ALIKE = {
    "time zones": "SELECT time_zone FROM chain_settings",
    "migrations": "SELECT array_agg(name ORDER BY version) FROM schema_migrations",
}


def run(config: MoveSettings, branch_id: int, to: str, *, cancel: bool) -> None:
    """Move it, or go on with that, and tell each step.

    Raises:
        MoveError: it cannot be moved, or not now.
        SettingsError: the settings are wrong, or not those of these cells.
        psycopg.Error: a database is away; to be called again.
    """
    if not config.cells_file:
        raise SettingsError(["CELLS_FILE: is not set, so there is one cell only"])
    listed = cells.follow(config).value
    if to not in listed.by_name:
        raise SettingsError(
            [f"CELLS_FILE={config.cells_file}: has no cell {to}; list it first, maybe without branches"]
        )
    console = cli.console()
    with ExitStack() as stack:
        target = Side(to, stack.enter_context(migrate.connect(config.target_database_url)))
        moving = protocol.state(target, branch_id)
        of_file = listed.of_branch(branch_id)
        name = moving.other_cell if moving and moving.state in ("ARRIVING", "HERE") else of_file and of_file.name
        if name == to:
            console.print(f"Branch {branch_id} is in {to} already.")
            return
        if name is None or name not in listed.by_name:
            raise MoveError(f"no cell that is listed has branch {branch_id}")
        source = Side(name, stack.enter_context(migrate.connect(config.database_url)))
        for side, setting in ((source, "PURCHASES_DATABASE_URL"), (target, "PURCHASES_TARGET_DATABASE_URL")):
            _require_database(side, listed.by_name[side.name], setting, config)
        for what, question in _ALIKE.items():
            here, there = (side.database.execute(question).fetchone() for side in (source, target))
            if here != there:
                raise MoveError(f"{source.name} and {to} have other {what}: {here} and {there}")
        move = Move(branch_id, source, target, lambda step: console.print(f"Branch {branch_id}: {step}."))
        if cancel:
            move.cancel()
            console.print(f"Branch {branch_id} stays in {name}.")
            return
        move.run()
    _change_file(Path(config.cells_file), branch_id, to)
    console.print(f"Branch {branch_id} is in {to}, and {config.cells_file} says so.")


def _require_database(side: Side, cell: Cell, setting: str, config: MoveSettings) -> None:
    """That a URL is the one of the cell, by what its purchases service says: nobody may copy from or to a wrong one."""
    with grpc_client.connect_blocking(cell.purchases, tls.credentials(config)) as channel:
        stub: Any = PurchasesServiceStub(channel)
        try:
            told = stub.GetCell(pb.GetCellRequest(), timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise MoveError(
                f"cell {cell.name} does not say which database it has: {cell.purchases}: {error.code().name}:"
                f" {error.details()}"
            ) from None
    ((found,),) = side.database.execute(
        "SELECT split_part(realm, '.', 1) || '.' || split_part(realm, '.', 3) FROM transaction_ids_realm() AS realm"
    ).fetchall()
    if (told.cell, told.database_id) != (cell.name, found):
        raise SettingsError([f"{setting}: is not the database of cell {cell.name}, served at {cell.purchases}"])


def _change_file(path: Path, branch_id: int, to: str) -> None:
    """Raises MoveError: somebody else has to do it."""
    try:
        cells_file.replace(path, branch_id, to)
    except (OSError, ValueError) as error:
        raise MoveError(
            f"branch {branch_id} is in {to}, whatever the file says; but the file could not be changed: {error}. Let it"
            f" say so, or call this again"
        ) from None
