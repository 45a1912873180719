"""Looks at the running system all the time, faults or not: what it claims must be true at that very moment."""

import threading
from collections.abc import Callable
from datetime import datetime

import psycopg

from tests.faults.findings import UNBALANCED, UNTRUE, WENT_BACK, Findings
from tests.faults.ledger import Ledger

EVERY_S = 0.25


class Sampler:
    """`complete_through_time` never goes back and never claims what it lacks; read models agree with each other."""

    def __init__(self, url: Callable[[], str], set_back: Callable[[], int], ledger: Ledger, findings: Findings) -> None:
        """`url` is where the primary is now; `set_back`, how often a failover may have taken back what was read."""
        self._url, self._set_back, self._ledger, self._findings = url, set_back, ledger, findings
        self._set_back_before = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler")
        self._awaited: list[tuple[float, str]] = []  # acknowledged, and not seen in the read models so far
        self._taken = 0
        self._newest: datetime | None = None
        self.samples = 0
        self.claims = 0  # samples with a complete_through_time

    @property
    def newest(self) -> datetime | None:
        """The latest complete_through_time."""
        return self._newest

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        connection: psycopg.Connection[tuple[object, ...]] | None = None
        while not self._stop.wait(EVERY_S):
            try:
                if connection is None or connection.closed:
                    connection = psycopg.connect(self._url(), connect_timeout=2)
                with connection.transaction():
                    connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
                    self._sample(connection)
            except psycopg.Error:  # it is being killed, or restarted: nobody claims anything
                if connection is not None:
                    connection.close()
        if connection is not None:
            connection.close()

    def _sample(self, connection: "psycopg.Connection[tuple[object, ...]]") -> None:
        """One snapshot. The claim is read first: whoever was acknowledged before it must be in this snapshot."""
        set_back = self._set_back()
        row = connection.execute("SELECT complete_through_at FROM freshness").fetchone()
        if set_back != self._set_back():
            return  # whose claim that is, cannot be told
        self.samples += 1
        if row and isinstance(claim := row[0], datetime):
            self._check_claim(connection, claim)
        self._check_balance(connection)

    def _check_claim(self, connection: "psycopg.Connection[tuple[object, ...]]", claim: datetime) -> None:
        self.claims += 1
        if self._set_back_before != (set_back := self._set_back()):
            self._set_back_before, self._newest = set_back, None
        if self._newest is not None and claim < self._newest:
            self._findings.add(WENT_BACK, f"complete_through_time went from {self._newest} to {claim}")
        self._newest = claim
        fresh = self._ledger.acknowledged_since(self._taken)
        self._taken += len(fresh)
        self._awaited += fresh
        rows = connection.execute(
            "SELECT event_id::text FROM analytics_event_log WHERE event_id = ANY(%(ids)s::uuid[])"
            " UNION SELECT event_id::text FROM quarantined_events WHERE event_id = ANY(%(ids)s::uuid[])",
            {"ids": [event_id for _, event_id in self._awaited]},
        ).fetchall()
        included = {event_id for (event_id,) in rows}
        self._awaited = [(at, event_id) for at, event_id in self._awaited if event_id not in included]
        claimed = claim.timestamp()
        missing = [(at, event_id) for at, event_id in self._awaited if at < claimed]
        if missing:
            at, event_id = missing[0]
            self._findings.add(
                UNTRUE,
                f"complete through {claim} lacks {len(missing)} sales acknowledged up to {claimed - at:.3f} s before,"
                f" such as event {event_id}",
                len(missing),
            )
            self._awaited = [entry for entry in self._awaited if entry not in missing]  # once is enough

    def _check_balance(self, connection: "psycopg.Connection[tuple[object, ...]]") -> None:
        """Every event has its effect, in every table, in the same moment."""
        row = connection.execute(
            "SELECT (SELECT count(*) FROM analytics_event_log), (SELECT coalesce(sum(purchases_count), 0)::bigint"
            " FROM daily_sales_by_branch), (SELECT coalesce(sum(purchases_count), 0)::bigint FROM sales_totals"
            " WHERE branch_id = 0), (SELECT coalesce(sum(purchases_count), 0)::bigint FROM sales_totals"
            " WHERE branch_id > 0)"
        ).fetchone()
        if row and len(set(row)) > 1:
            self._findings.add(
                UNBALANCED,
                "at one moment: {} events, purchases {} by day, {} of the chain, {} of the branches".format(*row),
            )
