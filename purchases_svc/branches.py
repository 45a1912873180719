"""Whose sales this cell records: by what its database says of branches that have moved, and else by the file of cells.

What is known here may be a second old, or the file's of longer ago. It only spares the database sales that it would
refuse: each is held against the database's word in the statement that records it (`insert.py`).
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import psycopg
import structlog
from psycopg_pool import PoolTimeout

from chassis.cells import DEFAULT, Cells
from chassis.errors import ServiceError
from chassis.postgres import Connection, Pool
from purchases_svc.errors import BranchMoving, WrongCell

LOOK_EVERY_S = 1.0

log = structlog.get_logger()


class Move(NamedTuple):
    """What the database says of a branch; see the migration."""

    state: str
    other_cell: str


class Branches:
    def __init__(self, cell: str = DEFAULT, listed: Callable[[], Cells] | None = None) -> None:
        """This is `cell`, of those that are `listed`, if there are several."""
        self.cell, self._listed = cell, listed
        self._moves: Mapping[int, Move] = {}

    async def follow(self, pool: Pool) -> None:
        """Keep up with the database's word, until cancelled."""
        while True:
            try:
                async with pool.connection() as connection:
                    self._moves = await moves(connection)
            except (psycopg.Error, PoolTimeout) as error:
                log.warning("which branches have moved is not known anew", error=error)
            await asyncio.sleep(LOOK_EVERY_S)

    def require_ours(self, branch_id: int) -> None:
        """Whether its sales are recorded here, as far as we know.

        Raises:
            WrongCell, BranchMoving
        """
        if (move := self._moves.get(branch_id)) is not None:
            if refusal := self.refusal(branch_id, move):
                raise refusal
        elif self._listed:
            found = self._listed().of_branch(branch_id)
            if found is None:
                raise WrongCell(f"no cell has branch {branch_id}", metadata={"branch_id": str(branch_id)})
            if found.name != self.cell:
                raise self._elsewhere(branch_id, found.name)

    def refusal(self, branch_id: int, move: Move) -> ServiceError | None:
        """Why its sales are not recorded here, if they are not."""
        if move.state == "HERE":
            return None
        if move.state == "ARRIVING":
            return BranchMoving(
                f"branch {branch_id} is being moved here from cell {move.other_cell}; try again",
                metadata={"branch_id": str(branch_id)},
            )
        return self._elsewhere(branch_id, move.other_cell)

    def _elsewhere(self, branch_id: int, name: str) -> WrongCell:
        cell = self._listed().by_name.get(name) if self._listed else None
        if cell is None:
            return WrongCell(
                f"the sales of branch {branch_id} are recorded in cell {name}, whose address is not known here",
                metadata={"cell": name},
            )
        return WrongCell(
            f"the sales of branch {branch_id} are recorded in cell {name}, at {cell.purchases}",
            metadata={"cell": name, "address": cell.purchases},
        )


async def moves(connection: Connection) -> dict[int, Move]:
    cursor = await connection.execute("SELECT branch_id, state, other_cell FROM branch_moves")
    return {branch_id: Move(*move) for branch_id, *move in await cursor.fetchall()}


async def closed(connection: Connection, branch_ids: Iterable[int]) -> dict[int, Move]:
    """Those of the branches whose sales are not taken here. Until the transaction ends, nobody closes another one."""
    cursor = await connection.execute(
        "SELECT branch_id, state, other_cell FROM closed_branches JOIN branch_moves USING (branch_id)"
        " WHERE branch_id = ANY(%s)",
        [sorted(set(branch_ids))],
    )
    return {branch_id: Move(*move) for branch_id, *move in await cursor.fetchall()}
