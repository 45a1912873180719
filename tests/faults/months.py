"""Months at both ends of what is sold: retention drops the oldest, and far back there are some without a partition."""

import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

import psycopg

from deploy.local.machine import StackError
from tests.faults.ledger import Ledger
from tests.faults.system import ROOT, Instance, System
from tests.faults.tills import DAY_US, Tills

MONTH_US = 2_629_746 * 1_000_000  # the mean one
DROP_TIMEOUT_S = 30.0
ATTEMPTS = 5  # of an operator; what retention needs may be away
PAUSE_S = 2.0


class Months:
    """Retention comes from `months` ago, one month after the other; the need for new partitions goes there."""

    def __init__(self, system: System, tills: Callable[[], Tills], ledger: Ledger, months: int) -> None:
        self._system, self._tills, self._ledger = system, tills, ledger
        self._kept = months
        self._newest = 2  # months ago: there is no partition before it
        self._lock = threading.Lock()
        self._dropping = threading.Lock()

    def sell_in_a_new_one(self) -> None:
        """Some tills' clocks have gone back to a month that nobody has sold anything in."""
        with self._lock:
            self._newest += 1
            self._tills().ages_us.append(self._newest * 31 * DAY_US)

    def drop_oldest(self, like: Instance, fault: str = "") -> bool:
        """An operator drops one, while tills still send sales of it; with `fault`, that command is killed first."""
        ages_us = self._tills().ages_us
        with self._dropping:  # two at once would be one, and the other had nothing to drop
            self._kept -= 1
            age_us = (self._kept + 1) * MONTH_US + 15 * DAY_US
            ages_us.append(age_us)
            try:
                self._system.pause(2)
                others = [it for it in self._system.of("purchases") if it.service.cell != like.service.cell]
                return self._drop_in(like, fault) and all(self._drop_in(other) for other in others)
            finally:
                ages_us.remove(age_us)

    def _drop_in(self, like: Instance, fault: str = "") -> bool:
        """In one cell's database."""
        database = like.service.database.name
        before = self._gone_before_us(database)
        died = not fault
        for _ in range(ATTEMPTS):
            self._decide(database)
            died |= self._drop(like, "" if died else fault) < 0
            if died and self._gone_before_us(database) > before:
                return True
            self._system.pause(PAUSE_S)
        return False

    def _decide(self, database: str) -> None:
        """What the owner does before; when the database is away, with the next attempt."""
        with suppress(psycopg.Error), self._system.database(database) as connection:
            row = connection.execute(
                "SELECT extract(epoch FROM date_trunc('month', now(), 'UTC') - make_interval(months => %s))::bigint",
                [self._kept],
            ).fetchone()
            assert row is not None
            self._ledger.write("decided", before_us=int(str(row[0])) * 1_000_000)
            connection.execute("UPDATE chain_settings SET keep_months = %s", [self._kept])

    def _drop(self, like: Instance, fault: str) -> int:
        """The command's exit code, negative for a signal."""
        environ = {name: value for name, value in like.environ.items() if name != "FAULT_FILE"}
        done = subprocess.run(
            [sys.executable, "-m", "tests.faults.crashing", "purchases_svc", "partitions", "--drop"],
            env=environ | ({"FAULT": fault} if fault else {}),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=DROP_TIMEOUT_S,
            check=False,
        )
        self._ledger.write("retention", code=done.returncode, said=(done.stdout + done.stderr)[-1000:])
        return done.returncode

    def _gone_before_us(self, database: str) -> int:
        """Before when everything is dropped, not only closed; the ledger learns it, too.

        Raises:
            StackError: the database is away.
        """
        try:
            with self._system.database(database) as connection:
                row = connection.execute(
                    """
                    SELECT extract(epoch FROM least(dropped_before, earliest))::bigint
                    FROM chain_settings, (
                        SELECT min(to_date(right(inhrelid::regclass::text, 7), 'YYYY_MM')) AS earliest
                        FROM pg_inherits WHERE inhparent = 'purchases'::regclass
                    ) AS months
                    """
                ).fetchone()
        except psycopg.Error as error:
            raise StackError(str(error)) from None
        assert row is not None
        before_us = int(str(row[0])) * 1_000_000
        self._ledger.write("dropped", before_us=before_us, database=database)
        return before_us
