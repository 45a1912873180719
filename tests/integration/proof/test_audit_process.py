"""The audit's own process: it works beside the consumer, comes back when it dies, and never outlives who started it."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from analytics_svc.commands import prove
from analytics_svc.commands.prove import COMMAND, proving
from analytics_svc.settings import ProveSettings
from tests.conftest import ROOT, eventually
from tests.integration.chain import Chain
from tests.integration.purchase_events import query


def provers(parent: int) -> list[int]:
    """The processes of the audit that this one has started."""
    found = []
    for children in Path(f"/proc/{parent}/task").glob("*/children"):
        for pid in map(int, children.read_text().split()):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if command[1:4] == [part.encode() for part in COMMAND[1:]]:
                found.append(pid)
    return found


def settings(chain: Chain, purchases_address: str) -> ProveSettings:
    return ProveSettings(chain.url, purchases_target=purchases_address)


async def looked(chain: Chain) -> bool:
    return query(chain.url, "SELECT compared_at IS NOT NULL FROM audit_status") == [(True,)]


async def test_it_works_and_comes_back(chain: Chain, purchases_address: str) -> None:
    """In a process that is not ours; killed, another one takes its place; it ends with the block."""
    await chain.sell(5, seed=1)
    async with proving(settings(chain, purchases_address)):
        await eventually(lambda: looked(chain), "it compares")
        (first,) = provers(os.getpid())
        os.kill(first, signal.SIGKILL)
        query(chain.url, "UPDATE audit_status SET compared_at = NULL")
        await eventually(lambda: looked(chain), "another one compares")
        assert provers(os.getpid()) != [first]
    assert provers(os.getpid()) == []


async def test_one_that_ran_well_is_started_again_at_once(
    chain: Chain, purchases_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often that was before; each time is counted, and one that dies at once is given more and more time."""
    monkeypatch.setattr(prove, "COMMAND", (sys.executable, "-c", ""))
    pauses: dict[float, list[float]] = {}
    for ran_well_s in (0.0, 3_600.0):
        monkeypatch.setattr(prove, "RAN_WELL_S", ran_well_s)
        before = prove.ENDED._value.get()
        with capture_logs() as logged:

            async def ended(logged: list[Any] = logged) -> bool:
                return len(logged) >= 4

            async with proving(settings(chain, purchases_address)):
                await eventually(ended, "it has ended again and again")
        assert prove.ENDED._value.get() - before == len(logged)
        pauses[ran_well_s] = [entry["pause_s"] for entry in logged]
    assert max(pauses[0.0]) <= 1.0 < max(pauses[3_600.0])


async def test_it_ends_with_a_consumer_that_is_killed(
    chain: Chain, purchases_address: str, processes: list[subprocess.Popen[bytes]]
) -> None:
    """Whoever held the other end of its input is gone, without a word: so is it."""
    processes.append(somebody_who_proves(chain, purchases_address))
    await eventually(lambda: looked(chain), "it compares")
    (prover,) = provers(processes[-1].pid)
    processes[-1].kill()

    async def gone() -> bool:
        return is_gone(prover)

    await eventually(gone, "it has ended")


def somebody_who_proves(chain: Chain, purchases_address: str) -> subprocess.Popen[bytes]:
    program = (
        "import asyncio, sys; from analytics_svc.commands.prove import proving;"
        " from analytics_svc.settings import ProveSettings\n"
        "async def main():\n"
        "    async with proving(ProveSettings(sys.argv[1], purchases_target=sys.argv[2])):\n"
        "        await asyncio.sleep(600)\n"
        "asyncio.run(main())"
    )
    command = [sys.executable, "-c", program, chain.url, purchases_address]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True)


def is_gone(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()
