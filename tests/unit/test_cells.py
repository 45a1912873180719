"""The file that says which cells a chain has."""

import re

import pytest

from chassis import cells

TWO = """
[north]
branches = [7, "100-199"]
purchases = "127.0.0.1:50051"
relay = "127.0.0.1:50053"

[south-2]
branches = ["8-99", 200]
purchases = "127.0.0.1:51051"
relay = "dns:///localhost:51053"
"""


def test_a_branch_is_in_the_cell_that_lists_it() -> None:
    said = cells.parse(TWO)
    where = {
        branch: found and found.name
        for branch in (1, 7, 8, 99, 100, 199, 200, 201)
        for found in [said.of_branch(branch)]
    }
    assert where == {
        1: None, 7: "north", 8: "south-2", 99: "south-2", 100: "north", 199: "north", 200: "south-2", 201: None,
    }  # fmt: skip
    assert said.by_name["south-2"].relay == "dns:///localhost:51053"
    assert said.has("north", 7) and not said.has("south-2", 7) and not said.has("north", 1)


def test_without_a_file_one_cell_has_all_branches() -> None:
    said = cells.only("127.0.0.1:1", "127.0.0.1:2")
    assert list(said.by_name) == [cells.DEFAULT]
    assert said.has(cells.DEFAULT, 1) and said.has(cells.DEFAULT, cells.BRANCH_MAX)


def test_every_problem_is_named_at_once() -> None:
    wrong = """
        spare = 3
        [North]
        branches = [0, "9-8", true, 1.5, "7-7", 2147483648]
        purchases = "nowhere"
        relai = "127.0.0.1:1"
        [south]
        branches = [5, "3-6", "7-20"]
        purchases = "far:50051"
        relay = "127.0.0.1:2"
    """
    with pytest.raises(ValueError, match="spare") as raised:
        cells.parse(wrong, reaches=lambda address: ["far"] if "far" in address else [])
    said = str(raised.value)
    for part in (
        "spare: must be a table",
        "North: its name must be",
        "North: relai is not known",
        "North: branches: 0 is no branch",
        "'9-8' is no branch",
        "True is no branch",
        "1.5 is no branch",
        "2147483648 is no branch",
        "North: purchases must be host:port",
        "North: relay must be host:port",
        "branch 5 is in south twice",
        "branch 7 is in North and in south",
        "south: purchases: far is beyond this machine",
    ):
        assert part in said, part


@pytest.mark.parametrize(
    ("said", "problem"), [("", "1 to 1,000 cells"), ("[a", "Expected"), ("[a]\nx=1\nx=2", "twice|overwrite")]
)
def test_what_is_no_file_of_cells_is_refused(said: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.compile(problem)):
        cells.parse(said)
