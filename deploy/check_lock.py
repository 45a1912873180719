"""Checks, without any network, that requirements*.txt lock everything that pyproject.toml asks for, with hashes."""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMAND = "uv pip compile --generate-hashes --no-header --no-emit-index-url --no-emit-find-links --python-version 3.11"


def name_of(requirement: str) -> str:
    """`psycopg[binary]>=3.3` → psycopg, in the normal form of package names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement)[0]).lower()


def locked(path: Path) -> set[str]:
    """The packages of a lock file; each must have its version and a hash."""
    entries = re.findall(r"^(\S+==\S+)(.*(?:\n    --hash.*)*)", path.read_text(), re.MULTILINE)
    if unhashed := [entry for entry, hashes in entries if "--hash=sha256:" not in hashes]:
        sys.exit(f"{path.name}: no hashes for {', '.join(unhashed)}")
    return {name_of(entry) for entry, _ in entries}


def main() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, extras = declared["project"], declared["project"]["optional-dependencies"]
    run_time = [*project["dependencies"], *extras["server"], *extras["pages"]]
    build, server = "--group build", "--extra server --extra pages pyproject.toml"
    for lock, asked, what in (
        ("requirements.txt", run_time, server),
        ("requirements-dev.txt", [*run_time, *extras["dev"]], f"--extra dev {server}"),
        ("requirements-plots.txt", [*run_time, *extras["plots"]], f"-c requirements.txt --extra plots {server}"),
        ("requirements-otlp.txt", [*run_time, *extras["otlp"]], f"-c requirements.txt --extra otlp {server}"),
        (
            "requirements-build.txt",
            [*declared["build-system"]["requires"], *declared["dependency-groups"]["build"]],
            build,
        ),
    ):
        if missing := {name_of(entry) for entry in asked} - locked(ROOT / lock):
            sys.exit(f"{lock} lacks {', '.join(sorted(missing))}; run: {COMMAND} {what} -o {lock}")


if __name__ == "__main__":
    main()
