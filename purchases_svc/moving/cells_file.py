"""The file of cells, with a branch in another cell."""

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from chassis import cells
from chassis.cells import Cell, Cells


def moved(said: str, branch_id: int, target: str) -> str:
    """What the file has to say. Comments and all else stay, where the branches are a list in their cell's own table.

    Raises:
        ValueError: it makes no sense, or has no such cell.
    """
    listed = cells.parse(said)
    if target not in listed.by_name:
        raise ValueError(f"it has no cell {target}")
    wanted = {cell.name: _without(cell.branches, branch_id) for cell in listed.by_name.values()}
    wanted[target] = _merged([*wanted[target], range(branch_id, branch_id + 1)])
    text = said
    for cell in listed.by_name.values():
        if wanted[cell.name] != cell.branches:
            text = _with_branches(text, cell.name, wanted[cell.name])
    if not _says(text, listed, wanted):
        text = "\n".join(_table(cell, wanted[cell.name]) for cell in listed.by_name.values())
    return text


def _says(text: str, listed: Cells, wanted: dict[str, tuple[range, ...]]) -> bool:
    try:
        found = cells.parse(text).by_name
    except ValueError:
        return False
    return found == {name: cell._replace(branches=wanted[name]) for name, cell in listed.by_name.items()}


def replace(path: Path, branch_id: int, target: str) -> bool:
    """Change the file at once and for good; False when it says so already. Two who change it take turns.

    Raises:
        OSError: it cannot be written.
        ValueError: as `moved`.
    """
    with _locked(path):
        said = path.read_text(encoding="utf-8")
        of_branch = cells.parse(said).of_branch(branch_id)
        if of_branch and of_branch.name == target:
            return False
        new = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with new.open("w", encoding="utf-8") as file:
                os.fchmod(file.fileno(), path.stat().st_mode & 0o777)
                file.write(moved(said, branch_id, target))
                file.flush()
                os.fsync(file.fileno())
            new.rename(path)
        finally:
            new.unlink(missing_ok=True)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock of the file itself, as long as it is the one at that path: whoever changes it puts another one there."""
    while True:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield
                return


def _without(branches: Iterable[range], branch_id: int) -> tuple[range, ...]:
    parts = (
        part
        for each in branches
        for part in ((range(each.start, branch_id), range(branch_id + 1, each.stop)) if branch_id in each else (each,))
    )
    return tuple(part for part in parts if part)


def _merged(branches: Iterable[range]) -> tuple[range, ...]:
    merged: list[range] = []
    for part in sorted(branches, key=lambda part: part.start):
        if merged and merged[-1].stop == part.start:
            merged[-1] = range(merged[-1].start, part.stop)
        else:
            merged.append(part)
    return tuple(merged)


def _with_branches(text: str, name: str, branches: Iterable[range]) -> str:
    own_list = re.compile(rf"(^\[\s*{re.escape(name)}\s*\][^\[]*?^\s*branches\s*=\s*)\[[^\]]*\]", re.MULTILINE)
    return own_list.sub(lambda found: found[1] + _list(branches), text, count=1)


def _list(branches: Iterable[range]) -> str:
    """As the file writes them: [7, "100-199"]."""
    return json.dumps([part.start if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in branches])


def _table(cell: Cell, branches: Iterable[range]) -> str:
    addresses = f"purchases = {json.dumps(cell.purchases)}\nrelay = {json.dumps(cell.relay)}\n"
    return f"[{cell.name}]\nbranches = {_list(branches)}\n{addresses}"
