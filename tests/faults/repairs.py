"""Rebuilds of read models that are right: they must find nothing to repair, whatever happens meanwhile."""

import datetime
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from zoneinfo import ZoneInfo

import grpc
from google.type import date_pb2

from retail.analytics.v1.audit_service_pb2 import RebuildDayRequest
from retail.analytics.v1.audit_service_pb2_grpc import AuditServiceStub
from tests.faults.ledger import Ledger
from tests.faults.system import ROOT, TIME_ZONE, Instance, System

DAY_TIMEOUT_S = 30.0
EVERYTHING_TIMEOUT_S = 90.0
PATIENCE_S = 60.0  # of an operator who tries again, as what a rebuild needs may be away
PAUSE_S = 1.0
DAYS_BACK = 5  # sales are sold on these days, too


class Repairs:
    """What a rebuild says of rows that were wrong goes into the ledger: there are none."""

    def __init__(self, system: System, ledger: Ledger) -> None:
        self._system, self._ledger = system, ledger

    def day(self, consumer: Instance, chance: random.Random) -> bool:
        """Rebuild one of the last days; whether it was done in the end."""
        today = datetime.datetime.now(ZoneInfo(TIME_ZONE)).date()
        day = today - datetime.timedelta(days=chance.randrange(DAYS_BACK))
        return self._insist(lambda: self._try_day(consumer, day))

    def _try_day(self, consumer: Instance, day: datetime.date) -> bool:
        request = RebuildDayRequest(sales_date=date_pb2.Date(year=day.year, month=day.month, day=day.day))
        with consumer.identities.channel(consumer.address) as channel:
            try:
                done = AuditServiceStub(channel).RebuildDay(request, timeout=DAY_TIMEOUT_S)
            except grpc.RpcError as error:
                if error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
                    self._ledger.write("wrong", number=0, why=f"RebuildDay: {error.code().name} {error.details()}")
                return False
        if done.repaired_row_count or done.foreign_event_count:
            why = f"RebuildDay of {day} repaired {done.repaired_row_count} rows, and found foreign events"
            self._ledger.write("wrong", number=0, why=f"{why}: {done.foreign_event_count}")
        return True

    @contextmanager
    def day_meanwhile(self, consumer: Instance, chance: random.Random) -> Iterator[None]:
        """Have a day rebuilt during the block, and until it is done."""
        rebuilding = threading.Thread(target=self.day, args=[consumer, random.Random(chance.random())], daemon=True)
        rebuilding.start()
        yield
        rebuilding.join(PATIENCE_S)

    def everything(self, like: Instance, fault: str = "") -> bool:
        """Rebuild all days that are complete, as an operator would; with `fault`, it is killed there instead."""
        wanted = -signal.SIGKILL if fault else 0
        return self._insist(lambda: self._try_everything(like, fault) == wanted)

    def _try_everything(self, like: Instance, fault: str) -> int:
        """The exit code, negative for a signal."""
        environ = {name: value for name, value in like.environ.items() if name != "FAULT_FILE"}
        done = subprocess.run(
            [sys.executable, "-m", "tests.faults.crashing", "analytics_svc", "rebuild"],
            env=environ | ({"FAULT": fault} if fault else {}),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=EVERYTHING_TIMEOUT_S,
            check=False,
        )
        wrong = re.search(r"([\d,]+) rows were wrong", done.stdout)
        if (wrong and wrong.group(1) != "0") or "nobody recorded" in done.stdout:
            self._ledger.write("wrong", number=0, why=f"a rebuild of everything says: {done.stdout}")
        self._ledger.write("rebuild", code=done.returncode, said=(done.stdout + done.stderr)[-2000:])
        return done.returncode

    def _insist(self, attempt: Callable[[], bool]) -> bool:
        """Try until it is done, or the run ends."""
        deadline = time.monotonic() + PATIENCE_S
        while not attempt():
            if time.monotonic() > deadline or self._system.ending.wait(PAUSE_S):
                return False
        return True
