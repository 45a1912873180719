"""The cells of a local chain, and the file that tells every process of them. The first has the name of an only one."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from chassis import cells
from deploy.local.machine import StackError, write_private
from deploy.local.services import CELLS_MAX, CELLS_SETTING, Program

CELL_SETTING, FILE_SETTING = "CELL", "CELLS_FILE"


def count(settings: Mapping[str, str]) -> int:
    said = settings.get(CELLS_SETTING) or "1"
    if said not in map(str, range(1, CELLS_MAX + 1)):
        raise StackError(f"{CELLS_SETTING}={said}: must be 1 to {CELLS_MAX}, how many cells there are on this machine")
    return int(said)


def name(number: int) -> str:
    return cells.DEFAULT if number == 1 else f"cell-{number}"


def environ(program: Program, file: Path | None) -> dict[str, str]:
    """What a process is told of cells, where there are several."""
    if file is None:
        return {}
    return {FILE_SETTING: str(file), CELL_SETTING: name(program.cell) if program.per_cell else ""}


def spread(number: int) -> list[list[range]]:
    """The branches of so many cells: the first two digits decide, so that those of any chain get into all of them. What
    has more than four digits is in one.
    """
    parts = [range(branch, branch + 1) for branch in range(1, 100)]
    parts += [range(ten, ten + 10) for ten in range(100, 1_000, 10)]
    parts += [range(hundred, hundred + 100) for hundred in range(1_000, 10_000, 100)]
    parts.append(range(10_000, cells.BRANCH_MAX + 1))
    return [parts[first::number] for first in range(number)]


def write(file: Path, programs: Sequence[Program], settings: Mapping[str, str]) -> None:
    """List the cells where they are found now. A file that is there already says which branch is where: some may have
    been moved, and their sales with them.
    """
    found = {(program.kind, program.cell): program.target(settings) for program in programs}
    number = max(cell for _, cell in found)
    try:
        listed = cells.parse(file.read_text())
        branches: list[Sequence[range]] = [listed.by_name[name(cell)].branches for cell in range(1, number + 1)]
    except FileNotFoundError:
        branches = [*spread(number)]
    except (ValueError, KeyError) as error:
        raise StackError(f"{file} does not list the {number} cells: {error}\nMend it, or remove it.") from None
    said = "".join(
        _table(name(cell), parts, *(found[kind, cell] for kind in ("purchases", "relay")))
        for cell, parts in enumerate(branches, 1)
    )
    if not file.exists() or file.read_text() != said:
        write_private(file, said)


def _table(cell: str, parts: Sequence[range], purchases: str, relay: str) -> str:
    branches = ", ".join(str(part.start) if len(part) == 1 else f'"{part.start}-{part.stop - 1}"' for part in parts)
    return f'[{cell}]\nbranches = [{branches}]\npurchases = "{purchases}"\nrelay = "{relay}"\n\n'
