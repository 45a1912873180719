"""What the pages name exists: files, links, targets of make, commands and their options. And the README is a page."""

import re
import subprocess
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

import analytics_svc.__main__
import pos.__main__
import purchases_svc.__main__
import relay_svc.__main__
from tests.conftest import ROOT
from tests.documents import PAGES, RUN, SHOWN, blocks, name_of, prose

GROUPS: dict[str, click.Group] = {
    "retail-purchases": purchases_svc.__main__.commands,
    "retail-relay": relay_svc.__main__.commands,
    "retail-analytics": analytics_svc.__main__.commands,
    "retail-pos": pos.__main__.commands,
}
ELSEWHERE = re.compile(r"https?://\S+|google/protobuf/\S+")
FILE = re.compile(r"(?<![\w./*<$-])[\w*][\w./*-]*\.(?:py|sql|md|proto|toml|sh|yaml|binpb)\b(?![\w/])")
FOLDER = re.compile(r"(?:`|^)(\w[\w./-]*/)(?:`| {2})", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
WORDS = re.compile(r"`([^`\n]+)`")


@pytest.fixture(scope="module")
def files() -> set[str]:
    """Those of the repository, with what is new."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(listed.stdout.splitlines())


@pytest.fixture(scope="module")
def folders(files: set[str]) -> set[str]:
    return {f"{parent}/" for file in files for parent in Path(file).parents}


def code_of(page: Path) -> list[str]:
    """Lines of code: those of blocks, a broken one whole, and those that stand in a sentence."""
    in_blocks = "\n".join(block.code for block in blocks(page)).replace("\\\n", " ")
    return [*in_blocks.splitlines(), *WORDS.findall(prose(page))]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_a_page_names_exists(page: Path, files: set[str], folders: set[str]) -> None:
    """By its path, or by the end of it."""
    text = ELSEWHERE.sub("", page.read_text())
    named = set(FILE.findall(text))
    missing = {name for name in named if not any(fnmatch(f"/{file}", f"*/{name}") for file in files)}
    missing |= {name for name in FOLDER.findall(text) if not any(f"/{it}".endswith(f"/{name}") for it in folders)}
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    """To a file, and there to a heading or an anchor."""
    for target in LINK.findall(prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors_in(file.read_text()), target


def anchors_in(text: str) -> set[str]:
    """Those that are written, and those that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return made | set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_that_a_page_names_exists(page: Path) -> None:
    """Targets of make, modules that are run, our commands, and the options that these are given."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in code_of(page):
        assert {it[1] for it in re.finditer(r"(?:^|\$ )make ([a-z-]+)", line)} <= targets, line
        for module in re.findall(r"python3? -m ([\w.]+)", line):
            assert find_spec(module) or module in ("venv", "pip"), line
        for name, rest in re.findall(r"(?<![\w-])(retail-(?:purchases|relay|analytics|pos)) ([^#|&`]*)", line):
            assert not unknown_in(GROUPS[name], rest.split()), line


def unknown_in(command: click.Command, words: list[str]) -> list[str]:
    """The subcommands and options that a command has not got."""
    while isinstance(command, click.Group) and words and re.fullmatch(r"[a-z]+", words[0]):
        if words[0] not in command.commands:
            return words[:1]
        command, words = command.commands[words[0]], words[1:]
    known = {"--help", "-h", "--version"} | {option for it in command.params for option in it.opts}
    return [word for word in re.findall(r"--[\w-]+", " ".join(words)) if word not in known]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_what_it_is(page: Path) -> None:
    """A language; and what looks like something to type, but is not run, says why."""
    found = list(blocks(page))
    for block in found:
        assert block.language in (*RUN, *SHOWN), block
    assert len(re.findall(r"^\s*```", page.read_text(), re.MULTILINE)) == 2 * len(found)


def test_readme_is_a_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
