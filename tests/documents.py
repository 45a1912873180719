"""The pages for people, and the code blocks in them.

A block's language says what becomes of it: `sh` and `python` are run by `whole/test_documents_run.py`, page by
page, in order, as they stand. What cannot be says so, and why, behind the language, where a reader does not see it:

    ```sh not-run: it ends with Ctrl-C
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT

PAGES = (
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "deploy" / "RUNBOOK.md",
    ROOT / "deploy" / "SECURITY.md",
    ROOT / "deploy" / "kubernetes" / "README.md",
    ROOT / "tests" / "bench" / "README.md",
    ROOT / "tests" / "faults" / "README.md",
)
RUN = ("sh", "python")
SHOWN = ("text", "toml", "mermaid", "js", "sql", "json", "yaml")
NOT_RUN = "not-run:"

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block of code."""

    page: str
    line: int  # of its first line of code
    language: str
    why_not_run: str  # empty: it is run
    code: str

    @property
    def is_run(self) -> bool:
        return self.language in RUN and not self.why_not_run

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for fence in _FENCE.finditer(text):
        language, _, rest = fence[1].partition(" ")
        why_not_run = rest.removeprefix(NOT_RUN).strip() if rest.startswith(NOT_RUN) else ""
        yield Block(name_of(page), text.count("\n", 0, fence.start(2)) + 1, language, why_not_run, fence[2])


def prose(page: Path) -> str:
    """A page without its blocks."""
    return _FENCE.sub("", page.read_text())
