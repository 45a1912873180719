"""`python -m tests.faults.crashing relay_svc serve`: a service as it is, that can be told to die at a step.

The services know nothing of this: their functions are wrapped from outside before they start. While the file that
FAULT_FILE names does not exist, nothing happens; `relay.after_confirm:3` in it means to die (SIGKILL, no clean-up) when
that step is reached for the third time from then on. FAULT=relay.after_confirm:3 arms it from the start.

A step whose function is gone or renamed is an error at the start: a fault that cannot happen proves nothing.
"""

import asyncio
import ctypes
import functools
import importlib
import inspect
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
PENDING_S = 0.003  # how long after the start of a call "during" it is


class Step(NamedTuple):
    """A place to die: before, during or after a call of a function."""

    module: str
    function: str  # `name` or `Class.name`
    when: str  # before | during | after
    only_if: Callable[[Any], bool] = lambda _: True  # looks at what the call returned; only for `after`


STEPS: dict[str, dict[str, Step]] = {
    "purchases": {
        "before_commit": Step("purchases_svc.flush", "insert", "before"),
        "during_commit": Step("purchases_svc.flush", "insert", "during"),
        "after_commit": Step("purchases_svc.flush", "insert", "after"),
        "before_upload": Step("purchases_svc.upload", "Uploads._record", "before"),
        "after_upload": Step("purchases_svc.upload", "Uploads._record", "after"),
        "in_partition": Step("purchases_svc.partitions", "Partitions._call", "during"),
        "after_partition": Step("purchases_svc.partitions", "Partitions._call", "after"),
    },
    "relay": {
        "after_claim": Step("relay_svc.outbox", "claim", "after", lambda claim: bool(claim.events)),
        "after_publish": Step("relay_svc.publisher", "_send", "after"),
        "after_confirm": Step("relay_svc.publisher", "Publisher.publish", "after"),
        "after_mark": Step("relay_svc.outbox", "mark_sent", "after"),
        "after_remember": Step("relay_svc.committed", "remember", "after"),
        "after_commit": Step("relay_svc.relay", "Relay._run_window", "after", lambda step: step.claimed > 0),
    },
    "consumer": {
        "after_decode": Step("analytics_svc.ingest.events", "decode", "after"),
        "after_apply": Step("analytics_svc.ingest.settling", "apply", "after"),
        "after_commit": Step("analytics_svc.ingest.settling", "Settler.settle", "after"),
        "again": Step("analytics_svc.ingest.trials", "begin", "after"),
        "alone": Step("analytics_svc.ingest.settling", "Settler._settle_alone", "during"),
        "rebuild_proof": Step("analytics_svc.proof.rebuild", "_prove", "after"),
        "rebuild_store": Step("analytics_svc.proof.parts", "store", "before"),
        "rebuild_stored": Step("analytics_svc.proof.parts", "store", "after"),
        "keeper_list": Step("analytics_svc.proof.keeper", "Keeper._list", "during"),
        "keeper_store": Step("analytics_svc.proof.keeper", "store", "before"),
        "keeper_stored": Step("analytics_svc.proof.keeper", "store", "after"),
    },
    "analytics": {},
    "retention": {
        "in_drop": Step("purchases_svc.retention", "_drop", "during"),
        "after_drop": Step("purchases_svc.retention", "_drop", "after"),
    },
    "audit": {
        "audit_proof": Step("analytics_svc.proof.auditor", "Auditor._prove", "after"),
        "audit_store": Step("analytics_svc.proof.parts", "store", "before"),
    },
    "rebuild": {
        "after_proof": Step("analytics_svc.proof.rebuild", "_prove", "after"),
        "before_store": Step("analytics_svc.proof.parts", "store", "before"),
        "in_ranges": Step("analytics_svc.proof.rebuild", "_rebuild_range", "after"),
    },
}
PROCESSES = {
    ("purchases_svc", "serve"): "purchases",
    ("purchases_svc", "partitions"): "retention",
    ("relay_svc", "serve"): "relay",
    ("analytics_svc", "consume"): "consumer",
    ("analytics_svc", "prove"): "audit",
    ("analytics_svc", "serve"): "analytics",
    ("analytics_svc", "rebuild"): "rebuild",
}


class Trigger:
    """Which step is armed, and how often it still has to be reached."""

    def __init__(self, file: str | None, armed: str | None) -> None:
        self._file = Path(file) if file else None
        self._text = ""
        self._step, self._left = "", 0
        if armed:
            self._arm(armed)

    def reached(self, step: str) -> None:
        if self._file:  # read each time: it may have been disarmed, or armed anew
            try:
                text = self._file.read_text()
            except FileNotFoundError:
                text = ""
            if text != self._text:
                self._arm(text)
        if step == self._step:
            self._left -= 1
            if self._left <= 0:
                self._die(step)

    def _arm(self, text: str) -> None:
        """`service.step:count`; empty: nothing is armed."""
        self._text = text
        step, _, count = text.strip().partition(":")
        self._step, self._left = step.partition(".")[2], int(count or 1)

    def _die(self, step: str) -> None:
        if self._file:
            self._file.unlink(missing_ok=True)  # gone means that it happened; the next process lives
        print(f'{{"crashing": "{step}"}}', flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def wrap(name: str, step: Step, trigger: Trigger) -> None:
    """Replace the step's function by one that asks the trigger. Raises AttributeError if there is none."""
    owner: Any = importlib.import_module(step.module)
    *path, attribute = step.function.split(".")
    for part in path:
        owner = getattr(owner, part)
    original = inspect.getattr_static(owner, attribute)
    if not inspect.isfunction(original):  # methods are functions of their class
        raise TypeError(f"{step.module}.{step.function} is no function")

    @functools.wraps(original)
    async def asynchronous(*args: Any, **kwargs: Any) -> Any:
        if step.when == "before":
            trigger.reached(name)
        if step.when == "during":
            asyncio.get_running_loop().call_later(PENDING_S, trigger.reached, name)
        result = await original(*args, **kwargs)
        if step.when == "after" and step.only_if(result):
            trigger.reached(name)
        return result

    @functools.wraps(original)
    def synchronous(*args: Any, **kwargs: Any) -> Any:
        if step.when == "before":
            trigger.reached(name)
        result = original(*args, **kwargs)
        if step.when == "after" and step.only_if(result):
            trigger.reached(name)
        return result

    setattr(owner, attribute, asynchronous if inspect.iscoroutinefunction(original) else synchronous)


def main() -> None:
    package, *arguments = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a rig that is killed leaves no services behind
    service = importlib.import_module(f"{package}.__main__")
    if planted := os.environ.get("PLANTED"):
        importlib.import_module(f"tests.faults.planted.{planted}").plant()
    if (package, arguments[0]) == ("analytics_svc", "consume"):  # which starts another process of ours
        prove: Any = importlib.import_module("analytics_svc.commands.prove")
        prove.COMMAND = (sys.executable, "-m", __spec__.name, package, "prove")
    trigger = Trigger(os.environ.get("FAULT_FILE"), os.environ.get("FAULT"))
    for name, step in STEPS[PROCESSES[package, arguments[0]]].items():
        wrap(name, step, trigger)
    sys.argv = [package, *arguments]
    service.main()


if __name__ == "__main__":
    main()
