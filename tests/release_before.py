"""The release before, whose commit `deploy/previous` names: its files, in a folder of their own.

Its processes run with the packages of this checkout's virtual environment.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT

NAMED = ROOT / "deploy" / "previous"
HOW_TO_GET_IT = "`git fetch --unshallow` brings the history; CI has to clone with it (fetch-depth: 0)"


class Release(NamedTuple):
    """A folder with all files of a release."""

    name: str
    root: Path

    def environ(self) -> dict[str, str]:
        """What Python needs to run this release and no other, whatever is installed."""
        return {"PYTHONPATH": os.pathsep.join([str(self.root), str(self.root / "generated")])}

    def prove(self) -> None:
        """A process that is started so runs this release's code."""
        code = "import chassis, purchases_svc, retail; print(chassis.__file__, purchases_svc.__file__, retail.__path__)"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.root,
            env={**os.environ, **self.environ()},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.count(f"{self.root}{os.sep}") == 3, done.stdout


PRESENT = Release("present", ROOT)


def unpack(directory: Path) -> Release:
    """The release before, below the directory.

    A clone without its history gets that one commit, if it can. If not, the test is left out, and says how to get it:
    what is not there cannot be tried. In a clone with all history, a commit that is missing is a fault.
    """
    commit = NAMED.read_text().splitlines()[-1].strip()
    if not _known(commit):
        shallow = _git("rev-parse", "--is-shallow-repository").stdout.decode().strip()
        if shallow == "true":
            _git("fetch", "--quiet", "--depth=1", "origin", commit)
        elif shallow == "false":
            pytest.fail(f"deploy/previous names {commit}, which is no commit of this repository", pytrace=False)
    if not _known(commit):
        pytest.skip(f"the release before, {commit[:7]}, is not in this clone: {HOW_TO_GET_IT}")
    archive = _git("archive", "--format=tar", commit)
    subprocess.run(["tar", "-x", "-C", directory], input=archive.stdout, check=True, timeout=60)
    return Release(commit[:7], directory)


def _known(commit: str) -> bool:
    return _git("cat-file", "-e", f"{commit}^{{commit}}").returncode == 0


def _git(*arguments: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False, timeout=60)
