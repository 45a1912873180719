"""Which cells a chain has: each some of its branches, in a database of purchases of its own, with a relay.

One file says it to every process, and is followed while they run:

    [north]
    branches = [7, "100-199"]
    purchases = "purchases-north:50051"
    relay = "relay-north:50053"

Without the file there is one cell, which has all branches and is called `default`.
"""

import re
import tomllib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from chassis import plaintext
from chassis.followed import Followed
from chassis.settings import setting, target, text
from chassis.tls import TlsSettings

DEFAULT = "default"  # also whose an event is that does not say so
BRANCH_MAX = 2**31 - 1
CELLS_MAX = 1_000
_ADDRESSES = ("purchases", "relay")
_RANGE = re.compile(r"([0-9]{1,10})-([0-9]{1,10})")


def cell_name(raw: str) -> str:
    """It becomes part of headers, metrics' labels and log lines."""
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,31}", raw):
        raise ValueError("must be 1 to 32 small letters, digits and hyphens, a letter first, such as north")
    return raw


class Cell(NamedTuple):
    name: str
    branches: tuple[range, ...]
    purchases: str  # where its purchases service is found
    relay: str  # where its relay is found


class Cells:
    """All cells there are. They have no branch in common."""

    def __init__(self, every: Iterable[Cell]) -> None:
        self.by_name: Mapping[str, Cell] = {cell.name: cell for cell in every}
        self._parts = sorted(_parts(self.by_name.values()))
        self._starts = [start for start, _, _ in self._parts]

    def of_branch(self, branch_id: int) -> Cell | None:
        """None: no cell has it."""
        at = bisect_right(self._starts, branch_id) - 1
        if at < 0 or branch_id >= self._parts[at][1]:
            return None
        return self.by_name[self._parts[at][2]]

    def has(self, cell: str, branch_id: int) -> bool:
        found = self.of_branch(branch_id)
        return found is not None and found.name == cell


def only(purchases: str, relay: str) -> Cells:
    """The one cell of a chain that has no file."""
    return Cells([Cell(DEFAULT, (range(BRANCH_MAX + 1),), purchases, relay)])


def parse(said: str, *, reaches: Callable[[str], Iterable[str]] = lambda _: ()) -> Cells:
    """`reaches` tells which hosts an address reaches that may not be called.

    Raises:
        ValueError: naming everything that is wrong.
    """
    try:
        tables = tomllib.loads(said)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(str(error)) from None
    problems: list[str] = []
    if not 1 <= len(tables) <= CELLS_MAX:
        problems.append(f"must have 1 to {CELLS_MAX:,} cells, each a table with its name")
    cells = [_cell(name, table, reaches, problems) for name, table in tables.items()]
    for (start, stop, one), (other_start, _, other) in pairwise(sorted(_parts(cells))):
        if other_start < stop:
            twice = f"branch {max(start, other_start)} is in "
            problems.append(twice + (f"{one} twice" if one == other else f"{one} and in {other}"))
    if problems:
        raise ValueError("; ".join(problems))
    return Cells(cells)


def _cell(name: str, table: Any, reaches: Callable[[str], Iterable[str]], problems: list[str]) -> Cell:
    own: list[str] = []
    try:
        cell_name(name)
    except ValueError as error:
        own.append(f"its name {error}")
    if not isinstance(table, dict):
        table = {}
        own.append("must be a table")
    own += [f"{key} is not known" for key in table if key not in ("branches", *_ADDRESSES)]
    listed = table.get("branches")
    if not isinstance(listed, list):
        listed = []
        own.append('branches must be a list of numbers and ranges, such as [7, "100-199"], and may be empty')
    branches = []
    for each in listed:
        if (found := _range(each)) is None:
            own.append(f"branches: {each!r} is no branch, and no range such as 100-199, from 1 to {BRANCH_MAX}")
        else:
            branches.append(found)
    for key in _ADDRESSES:
        try:
            address = target(str(table.get(key, "")))
        except ValueError as error:
            own.append(f"{key} {error}")
        else:
            own += [
                f"{key}: {host} is beyond this machine and would be called in plaintext" for host in reaches(address)
            ]
    problems += [f"{name}: {problem}" for problem in own]
    return Cell(name, tuple(branches), str(table.get("purchases")), str(table.get("relay")))


def _range(listed: Any) -> range | None:
    if isinstance(listed, int) and not isinstance(listed, bool):
        first = last = listed
    elif isinstance(listed, str) and (match := _RANGE.fullmatch(listed)):
        first, last = map(int, match.groups())
    else:
        return None
    return range(first, last + 1) if 1 <= first <= last <= BRANCH_MAX else None


def _parts(cells: Iterable[Cell]) -> Iterator[tuple[int, int, str]]:
    for cell in cells:
        yield from ((part.start, part.stop, cell.name) for part in cell.branches)


@dataclass(frozen=True, kw_only=True)
class CellsSettings(TlsSettings):
    cells_file: str = setting(
        "CELLS_FILE",
        text,
        "TOML file",
        "the chain's cells, see docs/scale.md; followed without restart; without it there is one",
        default="",
    )


def own_cell() -> Any:
    """The setting of a process that belongs to one of the cells."""
    meaning = "the name of this process's cell in CELLS_FILE, and on its events"
    return setting("CELL", cell_name, "name", meaning, default=DEFAULT)


@dataclass(frozen=True, kw_only=True)
class CellSettings(CellsSettings):
    """Of a process that belongs to one of them."""

    cell: str = own_cell()


def follow(config: CellsSettings) -> Followed[Cells]:
    """What the file says, now and later.

    Raises:
        SettingsError: there is no such file, or what it says makes no sense.
    """
    certified = bool(config.certificate_file) or config.allow_plaintext == "yes"
    return Followed(
        "CELLS_FILE", config.cells_file, partial(parse, reaches=partial(plaintext.called, certified=certified))
    )
