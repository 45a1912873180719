"""A till's journal while its process dies, and while its disk fails, at each system call: what strace makes happen.

What is promised: whoever was given a receipt has his sale in the journal, whole and once; whoever was told that there
is none has no sale there, not even later.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pos.client import Item
from pos.journal import Journal
from pos.journal.rows import State
from pos.journal.store import Store
from tests.conftest import ROOT

# What changes the disk, or tells a caller that it did. Between two of them, the disk is the same wherever one dies.
CALLS = ("openat", "pwrite64", "fdatasync", "fsync", "ftruncate", "unlink", "close", "write")

OPEN = """
import sys
from pathlib import Path
from pos.client import Item
from pos.journal import Journal, JournalNotWritten
from pos.journal.rows import Settled, State
from pos.journal.store import Store

def sell(journal):
    try:
        print("receipt", journal.record_sale([Item(1001, 890)], cashier_id=17).receipt_id, flush=True)
    except JournalNotWritten as refused:
        print("no-receipt", flush=True)

directory = Path(sys.argv[1])
"""
BEGIN, END = "print('begin', flush=True)\n", "print('end', flush=True)\n"
FIRST = OPEN + BEGIN + "journal = Journal(directory, branch_id=1, pos_id='POS-3')\nsell(journal)\n" + END
RECORD = (
    OPEN
    + "journal = Journal(directory, branch_id=1, pos_id='POS-3')\nsell(journal)\n"
    + BEGIN
    + "sell(journal)\n"
    + END
    + "sell(journal)\n"
)
ACKNOWLEDGE = (
    OPEN
    + "with Journal(directory, branch_id=1, pos_id='POS-3') as journal:\n    sell(journal); sell(journal)\n"
    + "store = Store(directory, branch_id=1, pos_id='POS-3')\n"
    + BEGIN
    + "try:\n    store.settle([Settled(1, State.STORED, purchase_id='one')], now='2026-01-01')\n"
    + "    print('settled', flush=True)\nexcept JournalNotWritten:\n    print('not-settled', flush=True)\n"
    + END
)


# Forks for each program that it is sent, and says which process that is; the fork waits to be traced and sent on. To
# start an interpreter for each, with all that a till imports, would take ten times as long.
FORKS = (
    OPEN.partition("def sell")[0]
    + """
import ctypes, json, os, signal, traceback
for line in sys.stdin:
    program, directory, output = json.loads(line)
    if not (pid := os.fork()):
        os.dup2(os.open(output, os.O_CREAT | os.O_WRONLY), 1)
        ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # anybody may trace it, where Linux asks
        os.kill(os.getpid(), signal.SIGSTOP)
        sys.argv[1:] = [directory]
        try:
            exec(program, {})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
)


class Forks:
    """Runs programs with strace."""

    def __init__(self) -> None:
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # a line, a write
        command = [sys.executable, "-B", "-c", FORKS]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def traced(self, program: str, directory: Path, *options: str) -> tuple[int, list[str]]:
        """Run it; its exit code, and what it printed."""
        output = directory.with_suffix(".printed")
        pid = self._ask(json.dumps([program, str(directory), str(output)]))
        command = ["strace", "-f", *options, "-p", str(pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
            assert strace.stderr is not None
            attached = strace.stderr.readline()
            os.kill(pid, signal.SIGCONT)
            code = self._answer()
            said = strace.communicate(timeout=60)[1]
        assert attached.rstrip().endswith("attached"), attached + said
        return code, output.read_text().splitlines()

    def _ask(self, line: str) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    if shutil.which("strace") is None:
        pytest.fail("strace is not installed: install it with the machine's package manager", pytrace=False)
    forks = Forks()
    yield forks
    forks.end()


def calls(forks: Forks, program: str, directory: Path, kinds: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Each call between begin and end: its kind, and the how many-th of that kind it is since the program began."""
    output = directory.parent / "calls"
    code, printed = forks.traced(program, directory, "-o", str(output), "-e", f"trace={','.join(kinds)},write")
    assert code == 0 and "end" in printed
    seen: Counter[str] = Counter()
    inside = False
    for line in output.read_text(errors="replace").splitlines():
        if not (match := re.match(r"\d+ +(\w+)\(", line)):
            continue
        kind = match[1]
        seen[kind] += 1
        if '"begin' in line:
            inside = True
        elif '"end' in line:
            return
        elif inside and kind in kinds:
            yield kind, seen[kind]


def receipts(printed: Sequence[str]) -> list[str]:
    return [line.split()[1] for line in printed if re.fullmatch("receipt [A-Z]{4}-[0-9]{6}", line)]


def examine(directory: Path, printed: Sequence[str], *, died: bool) -> None:
    """The journal opens, is whole, has what has a receipt, nothing that was refused, and sells on."""
    given = receipts(printed)
    with Journal(directory, branch_id=1, pos_id="POS-3") as journal:
        assert journal.verify() == []
        rows = {row.receipt_id: row for row in journal._store.rows()}
        live = [number for number, row in rows.items() if row.state is not State.VOID]
        assert set(given) <= set(live)
        # A process that dies after the sale is on the disk and before it says so has one receipt to print: the last.
        assert len(live) - len(given) <= died
        if len(live) > len(given):
            last = journal.status().last
            assert last is not None and last.receipt_id == live[-1] not in given
        assert len({row.idempotency_key for row in rows.values()}) == len(rows)
        assert journal.record_sale([Item(1001, 890)], cashier_id=17).receipt_id not in rows


@pytest.mark.timeout(600)
@pytest.mark.parametrize("program", [FIRST, RECORD, ACKNOWLEDGE], ids=["first", "record", "acknowledge"])
def test_kill_at_every_call(forks: Forks, program: str, tmp_path: Path) -> None:
    deaths = 0
    for n, (kind, number) in enumerate(calls(forks, program, tmp_path / "all", CALLS)):
        directory = tmp_path / str(n)
        inject = f"inject={kind}:signal=KILL:when={number}"
        code, printed = forks.traced(program, directory, "-e", f"trace={kind}", "-e", inject)
        assert code == -9 or code == 137, (kind, number, code, printed)
        deaths += 1
        examine(directory, printed, died=True)
        if "settled" in printed:
            with Journal(directory, branch_id=1, pos_id="POS-3") as journal:
                assert journal._store.rows()[0].state is State.STORED
    assert deaths > 10


@pytest.mark.timeout(600)
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from-then-on"])
def test_disk_that_refuses(forks: Forks, error: str, lasting: bool, tmp_path: Path) -> None:
    """At each write and each sync of a sale: the till is told, sells on once the disk works, and no sale is twice."""
    refused = 0
    for n, (kind, number) in enumerate(calls(forks, RECORD, tmp_path / "all", ("pwrite64", "fdatasync", "ftruncate"))):
        if kind == "ftruncate" and error == "ENOSPC":
            continue  # cutting a file off needs no room
        directory = tmp_path / str(n)
        inject = f"inject={kind}:error={error}:when={number}{'+' if lasting else ''}"
        code, printed = forks.traced(RECORD, directory, "-e", f"trace={kind}", "-e", inject)
        assert code == 0 and printed[-1].split()[0] in ("receipt", "no-receipt"), (kind, number, printed)
        refused += "no-receipt" in printed
        if not lasting:
            assert len(receipts(printed)) >= 2, "it does not sell on"
        # A disk that stays broken takes the till's word with it: it ended with a sale in doubt, which may be there all
        # the same. Whoever starts the till again is shown it.
        examine(directory, printed, died=lasting)
    assert refused > 5


def test_a_sale_that_the_disk_has_against_its_word_is_void(forks: Forks, tmp_path: Path) -> None:
    """The last sync of a commit fails when the row is there already."""
    syncs = [number for kind, number in calls(forks, RECORD, tmp_path / "all", ("fdatasync",)) if kind == "fdatasync"]
    inject = f"inject=fdatasync:error=EIO:when={syncs[-1]}"
    _, printed = forks.traced(RECORD, tmp_path / "one", "-e", "trace=fdatasync", "-e", inject)
    assert [line.split()[0] for line in printed] == ["receipt", "begin", "no-receipt", "end", "receipt"]
    store = Store(tmp_path / "one", branch_id=1, pos_id="POS-3")
    assert [row.state for row in store.rows()] == [State.WAITING, State.VOID, State.WAITING]
    assert store.verify() == []
    store.close()


def test_two_processes(tmp_path: Path) -> None:
    """The second is told who has it; kill -9 of the first lets it go at once."""
    program = (
        OPEN + "journal = Journal(directory, branch_id=1, pos_id='POS-3')\nprint('open', flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "journal")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "open\n"
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, input="", timeout=60, check=False)
        assert second.returncode == 1 and f"another process has the journal open: process {first.pid}" in second.stderr
        first.kill()
    third = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, input="", timeout=60, check=False)
    assert third.stdout == "open\n", third.stderr


def test_a_fork_does_not_touch_it(tmp_path: Path) -> None:
    program = OPEN + (
        "import os\njournal = Journal(directory, branch_id=1, pos_id='POS-3')\n"
        "if os.fork() == 0:\n    sell_in_fork = True\n    try:\n        journal.status()\n"
        "    except Exception as error:\n        print(type(error).__name__, flush=True)\n    os._exit(0)\n"
        "os.wait()\nsell(journal)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True, env=os.environ)
    assert done.stdout.startswith("JournalLocked\nreceipt "), done
