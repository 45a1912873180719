"""The package as others install it: what it brings, what it loads, and a sale by the client library alone."""

import asyncio
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import packages_distributions
from pathlib import Path

import grpc
import pytest

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TIMEOUT_S = 300.0
TILLS_MODULES = ("pos", "pos.client", "pos.journal", "pos.upload", "pos.calls", "pos.errors")
COMMANDS = ("retail-purchases", "retail-relay", "retail-analytics", "retail-pos")

SELL = """
import sys
from pos.client import Item, PosClient, Sale, connect

with connect(sys.argv[1]) as channel:
    sale = Sale(receipt_id="4711", branch_id=1, cashier_id=17, pos_id="POS-3", items=[Item(1001, 890)])
    first = PosClient(channel).create_purchase(sale)
    again = PosClient(channel).create_purchase(sale)
    assert first.purchase.purchase_id == again.purchase.purchase_id
    print(first.purchase.purchase_id, again.replayed)
"""


def normal(requirement: str) -> str:
    """`psycopg[binary]>=3.3` → psycopg."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement)[0]).lower()


SERVER = {normal(requirement) for requirement in PROJECT["optional-dependencies"]["server"]}


def run(command: Sequence[str | Path], cwd: str = "/") -> str:
    """What a command prints, called from elsewhere than the checkout."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, env=environ, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_till_loads_nothing_of_the_server() -> None:
    """Neither a database's nor a broker's client, nor anything else of the extra `server`."""
    program = f"import sys, {', '.join(TILLS_MODULES)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = run([sys.executable, "-c", program]).split()
    brought_by = packages_distributions()
    assert {"grpc", "google", "pos", "retail"} <= set(loaded)
    # Several packages put their modules below google; grpc itself looks whether its own others are there.
    foreign = {name for name in loaded if not name.startswith(("google", "grpc_"))}
    assert not {name for name in foreign for it in brought_by.get(name, ()) if normal(it) in SERVER}
    assert not set(loaded) & {"psycopg", "pika", "structlog", "rich", "click"}


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with nothing in it but the wheel, and what that asks for, at the locked versions."""
    directory = tmp_path_factory.mktemp("package")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    run([*pip, "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "-w", directory, ROOT])
    (wheel,) = directory.glob("*.whl")
    run([sys.executable, "-m", "venv", "--without-pip", directory / "venv"])
    python = directory / "venv" / "bin" / "python"
    locked = re.findall(r"^\S+==\S+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    (directory / "locked.txt").write_text("\n".join(locked))
    run([*pip, "--python", python, "install", "--quiet", "-c", directory / "locked.txt", wheel])
    return python


def test_installed_is_what_a_till_needs(empty_environment: Path) -> None:
    """And no more; what is missing for the services' commands is told."""
    program = "from importlib.metadata import distributions as d; print(*{it.metadata['Name'] for it in d()})"
    installed = {normal(name) for name in run([empty_environment, "-c", program]).split()}
    asked = {normal(requirement) for requirement in PROJECT["dependencies"]}
    assert installed - {"typing-extensions"} == asked | {"retail-backbone"}  # grpcio brings it
    assert not installed & SERVER
    for name in COMMANDS:
        done = subprocess.run([empty_environment.with_name(name)], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "retail-backbone[server]" in done.stderr
        assert "Traceback" not in done.stderr


async def test_a_sale_by_what_is_installed(
    empty_environment: Path, purchases_channel: grpc.aio.Channel, purchases_address: str
) -> None:
    """The client library, from the wheel alone, against a running service: recorded once, and known again."""
    said = await asyncio.to_thread(run, [empty_environment, "-c", SELL, purchases_address])
    purchase_id, replayed = said.split()
    assert len(purchase_id) == 36
    assert replayed == "True"
    assert "site-packages" in run([empty_environment, "-c", "import pos, retail; print(pos.__file__)"])
