"""How a branch moves: in steps, each of which is durable before the next one begins.

1. The target says ARRIVING. It takes no sale of the branch, and tells nobody of what comes.
2. What there is is copied, some hundred purchases at a time, while the branch sells; then what was recorded meanwhile,
   until that is little.
3. The source says LEAVING. It has locked out, for a moment, all who record sales: none is under way when it says so,
   and none of the branch is taken afterwards. The statement that records a sale looks itself.
4. The rest is copied, and both are compared.
5. The target says HERE, and takes the branch's sales.
6. The source says LEFT; for an hour it goes on to tell of what it has.

A command that dies, wherever that is, is called again, and goes on. A sale that is sent again finds its key in the
target, as that has all keys before it takes a sale.

No sale is taken by both. The source takes some until step 3, and again only after somebody has taken the move back; the
target takes some from step 5 on. Step 5 comes after 3, by the same command, which holds in `mover` what is its own:
whoever calls the command again puts his own there, and the former can do nothing any more. To take a move back is to
end ARRIVING before LEAVING; only ARRIVING becomes HERE, and only who has ended it makes LEAVING HERE again.
"""

import time
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import psycopg

from purchases_svc.moving import copying
from purchases_svc.moving.copying import Batch, Database, MoveError, Place

# All servers of the target have looked by then (`branches.LOOK_EVERY_S`), so that they do not send tills back.
KNOWN_AFTER_S = 3.0
FEW = 200  # purchases: so many may be left to copy while nobody takes the branch's sales
PASSES_MAX = 1_000
LOCK_TIMEOUT, LOCK_PAUSE_S, LOCK_PATIENCE_S = "50ms", 0.5, 60.0
LISTED_FOR = "1 hour"  # as in the view unlisted_branches

TAKEN_OVER = "another `move` of this branch has been started: it goes on, and this one ends"


class Side(NamedTuple):
    """A cell, and its database, as the owner."""

    name: str
    database: Database


class State(NamedTuple):
    state: str
    other_cell: str


def state(side: Side, branch_id: int) -> State | None:
    row = side.database.execute(
        "SELECT state, other_cell FROM branch_moves WHERE branch_id = %s", [branch_id]
    ).fetchone()
    return State(*row) if row else None


class Move:
    def __init__(
        self,
        branch_id: int,
        source: Side,
        target: Side,
        tell: Callable[[str], object],
        known_after_s: float = KNOWN_AFTER_S,
    ) -> None:
        """`tell` is told each step, before it is done."""
        self._branch, self._source, self._target, self._tell = branch_id, source, target, tell
        self._known_after_s = known_after_s
        self._mover = str(uuid.uuid4())
        self._months: set[Any] = set()

    def run(self) -> None:
        """Move it, or go on with that; nothing, if it has moved.

        Raises:
            MoveError: it cannot be moved, or not now.
            psycopg.Error: a connection is lost, or a database does not do what it is told. To be called again.
        """
        pause = ""
        if state(self._target, self._branch) != State("HERE", self._source.name):
            self._require_movable()
            self._tell(f"{self._target.name} prepares for the branch")
            self._begin()
            known_at = time.monotonic() + self._known_after_s
            self._tell(f"copying, while {self._source.name} sells")
            self._copy_first()
            self._copy_recent(known_at)
            self._tell(f"{self._source.name} takes no more sales")
            self._close_source()
            closed_at = time.monotonic()
            self._tell("copying the rest")
            self._copy_since()
            copying.copy_tills(self._source.database, self._target.database, self._branch)
            self._tell("comparing")
            self._compare()
            self._tell(f"{self._target.name} takes the sales")
            self._open_target()
            pause = f"; nobody took its sales for {time.monotonic() - closed_at:.1f} s"
        self._tell(f"it has left {self._source.name}{pause}")
        self._leave_source()

    def cancel(self) -> None:
        """Take a move back that is not finished: the source takes the branch's sales again.

        Raises:
            MoveError: there is none, or somebody goes on with it at this moment.
        """
        source, target = self._source.database, self._target.database
        source.execute(
            "UPDATE branch_moves SET mover = %s"
            " WHERE branch_id = %s AND other_cell = %s AND state IN ('HERE', 'LEAVING')",
            [self._mover, self._branch, self._target.name],
        )
        ended = target.execute(
            "UPDATE branch_moves SET state = 'LEFT', since = '-infinity', mover = %s, from_realm = NULL"
            " WHERE branch_id = %s AND state = 'ARRIVING' AND other_cell = %s",
            [self._mover, self._branch, self._source.name],
        )
        if state(self._target, self._branch) == State("HERE", self._source.name):
            raise MoveError(f"branch {self._branch} is in {self._target.name} already: move it back")
        if not ended.rowcount and state(self._source, self._branch) != State("LEAVING", self._target.name):
            raise MoveError(f"branch {self._branch} is not on its way from {self._source.name} to {self._target.name}")
        with source.transaction():
            opened = source.execute(
                "UPDATE branch_moves SET state = 'HERE', since = clock_timestamp()"
                " WHERE branch_id = %s AND mover = %s AND state IN ('HERE', 'LEAVING')",
                [self._branch, self._mover],
            )
            if not opened.rowcount:
                raise MoveError(TAKEN_OVER)
            source.execute("DELETE FROM closed_branches WHERE branch_id = %s", [self._branch])

    def _require_movable(self) -> None:
        here, there = state(self._source, self._branch), state(self._target, self._branch)
        if here and here.state == "LEFT":
            raise MoveError(f"branch {self._branch} is not in {self._source.name}, but in {here.other_cell}")
        if here and here.state == "ARRIVING":
            raise MoveError(f"branch {self._branch} is still arriving from {here.other_cell}: finish that first")
        if here and here.state == "LEAVING" and here.other_cell != self._target.name:
            raise MoveError(f"branch {self._branch} is on its way to {here.other_cell}: finish or cancel that")
        if there and there.state != "LEFT" and there != State("ARRIVING", self._source.name):
            raise MoveError(f"{self._target.name} says {there.state} of branch {self._branch}, from {there.other_cell}")

    def _begin(self) -> None:
        """The target closes, and this command is the one that may go on with the move; so the source says, too."""
        target, source = self._target.database, self._source.database

        def close() -> None:
            begun = target.execute(
                f"""
                INSERT INTO branch_moves AS m (branch_id, state, other_cell, mover)
                VALUES (%(branch)s, 'ARRIVING', %(source)s, %(mover)s)
                ON CONFLICT (branch_id) DO UPDATE SET state = 'ARRIVING', other_cell = %(source)s, mover = %(mover)s,
                    since = CASE m.state WHEN 'ARRIVING' THEN m.since ELSE clock_timestamp() END,
                    from_realm = CASE m.state WHEN 'ARRIVING' THEN m.from_realm END
                WHERE m.state = 'ARRIVING' AND m.other_cell = %(source)s
                    OR m.state = 'LEFT' AND m.since < now() - interval '{LISTED_FOR}'
                """,
                {"branch": self._branch, "source": self._source.name, "mover": self._mover},
            )
            if not begun.rowcount:
                raise MoveError(
                    f"branch {self._branch} has left {self._target.name} a moment ago, and who reads there may still be"
                    f" told of it: it can come back after {LISTED_FOR}"
                )
            target.execute("INSERT INTO closed_branches VALUES (%s) ON CONFLICT DO NOTHING", [self._branch])

        _locked_out(target, close)
        with source.transaction():
            begun = source.execute(
                """
                INSERT INTO branch_moves AS m (branch_id, state, other_cell, mover)
                VALUES (%(branch)s, 'HERE', %(target)s, %(mover)s)
                ON CONFLICT (branch_id) DO UPDATE SET other_cell = %(target)s, mover = %(mover)s
                WHERE m.state = 'HERE' OR m.state = 'LEAVING' AND m.other_cell = %(target)s
                """,
                {"branch": self._branch, "target": self._target.name, "mover": self._mover},
            )
            if not begun.rowcount:
                raise MoveError(TAKEN_OVER)

    def _copy_first(self) -> None:
        """From where an earlier call has come to, if transaction ids of the source mean the same as then."""
        source, target = self._source.database, self._target.database
        ((realm, xid),) = source.execute(
            "SELECT transaction_ids_realm(), pg_snapshot_xmin(pg_current_snapshot())::text"
        ).fetchall()
        with self._arriving():
            target.execute(
                "UPDATE branch_moves SET from_realm = %(realm)s, from_xid = %(xid)s::xid8,"
                " copied_time = '-infinity', copied_id = %(nil)s"
                " WHERE branch_id = %(branch)s AND from_realm IS DISTINCT FROM %(realm)s",
                {"realm": realm, "xid": xid, "nil": copying.NIL, "branch": self._branch},
            )
        ((time_, id_),) = target.execute(
            "SELECT nullif(copied_time, '-infinity'), copied_id::text FROM branch_moves WHERE branch_id = %s",
            [self._branch],
        ).fetchall()
        place = Place(time_, id_) if id_ else None
        while place and (batch := copying.after(source, self._branch, place)):
            place = batch.last
            self._add(batch, place)
        with self._arriving():
            target.execute(
                "UPDATE branch_moves SET copied_time = NULL, copied_id = NULL WHERE branch_id = %s", [self._branch]
            )
        copying.copy_till_sales(source, target, self._branch)

    def _copy_recent(self, known_at: float) -> None:
        for _ in range(PASSES_MAX):
            copied = self._copy_since()
            left_s = known_at - time.monotonic()
            if copied <= FEW and left_s <= 0:
                return
            if copied <= FEW:
                time.sleep(min(left_s, LOCK_PAUSE_S))

    def _copy_since(self) -> int:
        """What was recorded since the last time; how many purchases."""
        source, target = self._source.database, self._target.database
        ((xid,),) = source.execute("SELECT pg_snapshot_xmin(pg_current_snapshot())::text").fetchall()
        ((since,),) = target.execute(
            "SELECT from_xid::text FROM branch_moves WHERE branch_id = %s", [self._branch]
        ).fetchall()
        copied = sum(self._add(batch) for batch in copying.since(source, self._branch, since))
        with self._arriving():
            target.execute("UPDATE branch_moves SET from_xid = %s::xid8 WHERE branch_id = %s", [xid, self._branch])
        return copied

    def _add(self, batch: Batch, place: Place | None = None) -> int:
        """Add what is not there yet, with the place to which the first copy has come; returns how many purchases."""
        new = [month for month in batch.months if month not in self._months]
        copying.ensure_months(self._target.database, new)
        self._months.update(new)
        with self._arriving():
            if place:
                self._target.database.execute(
                    "UPDATE branch_moves SET copied_time = %s, copied_id = %s WHERE branch_id = %s",
                    [place.time, place.purchase_id, self._branch],
                )
            return copying.add(self._target.database, batch)

    def _arriving(self) -> "_Arriving":
        return _Arriving(self._target.database, self._branch, self._mover)

    def _close_source(self) -> None:
        source = self._source.database

        def close() -> None:
            closed = source.execute(
                "UPDATE branch_moves SET state = 'LEAVING',"
                " since = CASE state WHEN 'LEAVING' THEN since ELSE clock_timestamp() END"
                " WHERE branch_id = %s AND mover = %s AND state IN ('HERE', 'LEAVING')",
                [self._branch, self._mover],
            )
            if not closed.rowcount:
                raise MoveError(TAKEN_OVER)
            source.execute("INSERT INTO closed_branches VALUES (%s) ON CONFLICT DO NOTHING", [self._branch])

        _locked_out(source, close)

    def _compare(self) -> None:
        if wrong := copying.difference(self._source.database, self._target.database, self._branch):
            with self._arriving():
                pass  # it is this command that has it to take back
            self.cancel()
            raise MoveError(f"{wrong}: nothing is moved, and {self._source.name} takes the sales again")

    def _open_target(self) -> None:
        with self._arriving():
            self._target.database.execute(
                "UPDATE branch_moves SET state = 'HERE', since = clock_timestamp() WHERE branch_id = %s", [self._branch]
            )
            self._target.database.execute("DELETE FROM closed_branches WHERE branch_id = %s", [self._branch])

    def _leave_source(self) -> None:
        self._source.database.execute(
            "UPDATE branch_moves SET state = 'LEFT', since = clock_timestamp()"
            " WHERE branch_id = %s AND state = 'LEAVING' AND other_cell = %s",
            [self._branch, self._target.name],
        )


class _Arriving:
    """A transaction of the target, in which the branch is arriving, and the move is this command's."""

    def __init__(self, database: Database, branch_id: int, mover: str) -> None:
        self._database, self._values = database, [branch_id, mover]
        self._transaction = database.transaction()

    def __enter__(self) -> None:
        self._transaction.__enter__()
        found = self._database.execute(
            "SELECT FROM branch_moves WHERE branch_id = %s AND mover = %s AND state = 'ARRIVING' FOR UPDATE",
            self._values,
        )
        if not found.rowcount:
            error = MoveError(TAKEN_OVER)
            self._transaction.__exit__(MoveError, error, None)
            raise error

    def __exit__(self, *error: Any) -> None:
        self._transaction.__exit__(*error)


def _locked_out(database: Database, close: Callable[[], None]) -> None:
    """Do it while no sale is under way, and none begins: of all branches, for some milliseconds.

    Raises:
        MoveError: somebody else holds the table for long.
    """
    until = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            with database.transaction():
                database.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")  # so long others may have to wait
                database.execute("LOCK TABLE closed_branches IN ACCESS EXCLUSIVE MODE")
                close()
        except psycopg.errors.LockNotAvailable:
            if time.monotonic() > until:
                raise MoveError(
                    f"somebody has held the table closed_branches for {LOCK_PATIENCE_S:.0f} s, such as a dump: call"
                    " this again when that is over"
                ) from None
            time.sleep(LOCK_PAUSE_S)
        else:
            return
