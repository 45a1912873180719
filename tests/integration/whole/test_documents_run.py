"""What the pages tell people to type, typed: every block of a page, in order, against a system with nothing in it.

`make run`, `make demo` and what else belongs to the local stack is tested in `tests/unit/test_local_stack.py`,
`test_local_servers.py` and `test_whole_path.py`.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local.services import SERVICES
from tests.conftest import ROOT
from tests.documents import PAGES, Block, blocks, name_of
from tests.integration.conftest import free_address
from tests.integration.processes import Processes

PAGE_S = 240.0  # a page takes some seconds

RUN_PAGES = [page for page in PAGES if any(block.is_run for block in blocks(page))]
assert RUN_PAGES


class Documented(Processes):
    """The system whose addresses stand for those that the pages name."""

    def __init__(self, purchases_url: str, analytics_url: str, amqp_url: str, logs: Path) -> None:
        super().__init__(purchases_url, analytics_url, amqp_url, logs)
        self.metrics = {service.name: free_address() for service in SERVICES}
        self.environ |= {f"{name.upper()}_METRICS_LISTEN": address for name, address in self.metrics.items()}
        self.environ["CONSUMER_TARGET"] = self.address["consumer"]

    def here(self, code: str) -> str:
        """The code with our addresses in it."""
        for service in SERVICES:
            code = code.replace(f"127.0.0.1:{service.port}", self.address[service.name])
            code = code.replace(f"127.0.0.1:{service.metrics_port}", self.metrics[service.name])
        return code


@pytest.fixture
def system(purchases_db: str, analytics_db: str, amqp_url: str, tmp_path: Path) -> Iterator[Documented]:
    with Documented.all_running(purchases_db, analytics_db, amqp_url, tmp_path) as running:
        yield running


def as_shell(block: Block) -> str:
    """In one shell for all blocks, so that what one has defined the next can use; it says where it is."""
    code = block.code
    if block.language == "python":
        code = f"{shlex.quote(sys.executable)} - <<'END OF {block}'\n{code}END OF {block}\n"
    return f"echo '--- {block}' >&2\n{code}"


@pytest.mark.parametrize("page", RUN_PAGES, ids=name_of)
def test_the_blocks_of_a_page_run(page: Path, system: Documented, tmp_path: Path) -> None:
    """As they stand, one after the other; the first command that fails fails the test, and is shown."""
    # The commands are those beside this Python, also where the checkout has no .venv. In a folder of its own, a page
    # may write files.
    for name in ("proto", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = "set -euo pipefail\n" + "".join(as_shell(block) for block in blocks(page) if block.is_run)
    done = subprocess.run(
        ["bash", "-c", system.here(script)],
        cwd=tmp_path,
        env=system.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PAGE_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
