"""The larger tests have a short and a long form, and one place tells of all of them."""

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.sizes import SIZES, how_many


def test_each_size_is_of_one_test() -> None:
    used: dict[str, list[str]] = {name: [] for name in SIZES}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for name in re.findall(r'how_many\("(\w+)"\)', path.read_text()) if path != Path(__file__) else ():
            used[name].append(path.name)
    assert all(len(files) == 1 and files[0] in SIZES[name].what for name, files in used.items()), used
    assert all(0 < size.short < size.long for size in SIZES.values())


def test_a_variable_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EVENTS", raising=False)
    assert how_many("EVENTS") in SIZES["EVENTS"]
    monkeypatch.setenv("EVENTS", "7")
    assert how_many("EVENTS") == 7
