"""The file below a till's journal: SQLite, one process, every change on the disk before anybody hears of it.

A rollback journal and not a log beside it (WAL): of the SQLite that distributions ship, versions before 3.51.3 may lose
what was committed to one, and a till makes a sale in some seconds. `synchronous=EXTRA` syncs all that a power cut could
bring back. What the disk refuses is known to have left nothing: see `Store.append`.
"""

import contextlib
import fcntl
import os
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from pos.journal.rows import (
    APPLICATION_ID,
    META_COLUMNS,
    MIGRATIONS,
    NO_HASH,
    ROW_COLUMNS,
    JournalDamaged,
    JournalError,
    JournalLocked,
    JournalNotWritten,
    JournalOfAnotherTill,
    JournalTooNew,
    Meta,
    New,
    Row,
    Settled,
    State,
    chained,
    letters,
)

FILE, LOCK = "journal.db", "lock"
BUSY_TIMEOUT_S = 1.0  # nobody else has the file, but people do look into it with sqlite3


class Store:
    """The rows. Safe to share between threads; of processes, one has it."""

    def __init__(self, directory: Path, *, branch_id: int, pos_id: str, migrations: Sequence[str] = MIGRATIONS) -> None:
        """Opens it, makes it if there is none, and checks all of it.

        Raises:
            JournalLocked, JournalOfAnotherTill, JournalTooNew, JournalDamaged, JournalNotWritten
        """
        self._directory, self._migrations = directory, migrations
        self._mutex, self._process = threading.RLock(), os.getpid()
        self._in_doubt: set[str] = set()  # keys of sales that the disk refused, and perhaps has
        self._connection: sqlite3.Connection | None = None
        with _disk():
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(directory / LOCK)
        try:
            with _disk():
                self._connection = self._connect()
                self._upgrade(branch_id, pos_id)
            if damage := self.verify():
                raise JournalDamaged(
                    f"the journal in {directory} is damaged: {'; '.join(damage[:3])}. Move the directory aside and keep"
                    " it: its sales can be exported. The till sells on with a new one."
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        with self._mutex:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    # --- what is written ---

    def append(self, new: New) -> Row:
        """Write a sale; when this returns, it is on the disk.

        A disk that refuses may have the sale all the same, as when the last of its syncs fails. Its till was told that
        there is none, and sells it again; so before anything else is written or sent, the row is looked for, and
        made void.

        Raises:
            JournalNotWritten
        """
        try:
            with self._mutex:  # until it is in doubt no more: whoever comes in between would make it void
                with self._transaction() as connection:
                    meta = _meta(connection)
                    sequence = meta.next_sequence
                    receipt_id = f"{letters(meta.epoch)}-{sequence:06d}"
                    fields = (
                        sequence,
                        meta.epoch,
                        new.idempotency_key,
                        receipt_id,
                        new.business_date,
                        new.device_time,
                        new.boot_id,
                        new.boot_ns,
                        meta.clock_offset_ms,
                        new.amount_cents,
                        new.payload(receipt_id),
                    )
                    row = Row(*fields, chained(meta.last_hash, fields), State.WAITING, "", "", "", "")
                    marks = ", ".join("?" * len(row))
                    connection.execute(f"INSERT INTO journal ({ROW_COLUMNS}) VALUES ({marks})", row)
                    connection.execute("UPDATE meta SET next_sequence = ?, last_hash = ?", (sequence + 1, row.hash))
                    self._in_doubt.add(new.idempotency_key)  # until the commit has come back
                self._in_doubt.discard(new.idempotency_key)
                return row
        except JournalNotWritten:
            with contextlib.suppress(JournalError):
                self._recover()
            raise

    def settle(self, settled: Sequence[Settled], *, now: str, only_from: Sequence[State] = (State.WAITING,)) -> int:
        """Note what became of sales; tells of how many. One that is settled already stays as it is.

        Raises:
            JournalNotWritten: they are as they were.
        """
        froms = ", ".join(f"'{state}'" for state in only_from)
        with self._transaction() as connection:
            changed = connection.executemany(
                "UPDATE journal SET state = ?, reason = ?, purchase_id = ?, settled_time = ?, note = ?"
                f" WHERE sequence = ? AND state IN ({froms})",
                [(each.state, each.reason, each.purchase_id, now, each.note, each.sequence) for each in settled],
            )
            return changed.rowcount

    def note_offset(self, clock_offset_ms: int) -> None:
        """By how much the service's clock is ahead of this machine's."""
        with self._transaction() as connection:
            connection.execute("UPDATE meta SET clock_offset_ms = ?", (clock_offset_ms,))

    def begin_epoch(self, first: int, note: str) -> Meta:
        """From now on, numbers are those of a journal of its own, and none below `first`."""
        with self._transaction() as connection:
            first = max(first, _meta(connection).next_sequence)
            connection.execute(
                "UPDATE meta SET epoch = ?, epoch_first = ?, next_sequence = ?, note = ?",
                (str(uuid.uuid4()), first, first, note),
            )
        return self.meta()

    def forget(self, settled_before: str) -> int:
        """Remove what was settled before that time, from the oldest row up to the first that has to stay."""
        with self._transaction() as connection:
            first_kept = connection.execute(
                "SELECT min(sequence) FROM journal WHERE state IN ('waiting', 'refused') OR settled_time >= ?",
                (settled_before,),
            ).fetchone()[0]
            last_gone = connection.execute(
                "SELECT sequence, hash FROM journal WHERE sequence < coalesce(?, sequence + 1)"
                " ORDER BY sequence DESC LIMIT 1",
                (first_kept,),
            ).fetchone()
            if last_gone is None:
                return 0
            connection.execute("UPDATE meta SET kept_from = ?, kept_hash = ?", (last_gone[0] + 1, last_gone[1]))
            return connection.execute("DELETE FROM journal WHERE sequence <= ?", (last_gone[0],)).rowcount

    # --- what is read ---

    def meta(self) -> Meta:
        with self._reading() as connection:
            return _meta(connection)

    def rows(self, states: Sequence[State] = tuple(State), *, after: int = 0, limit: int = -1) -> list[Row]:
        """By sequence number, those in one of these states."""
        wanted = ", ".join(f"'{state}'" for state in states)
        with self._reading() as connection:
            found = connection.execute(
                f"SELECT {ROW_COLUMNS} FROM journal WHERE state IN ({wanted}) AND sequence > ?"
                " ORDER BY sequence LIMIT ?",
                (after, limit),
            )
            rows = (Row(*values) for values in found)
            return [row._replace(state=State(row.state)) for row in rows]

    def last(self) -> Row | None:
        with self._reading() as connection:
            found = connection.execute("SELECT max(sequence) FROM journal WHERE state <> 'void'").fetchone()[0]
        return self.rows(after=found - 1, limit=1)[0] if found is not None else None

    def epochs(self) -> list[tuple[str, int, int]]:
        """Those that have rows, and the current one: each with the first and the last number that are known."""
        with self._reading() as connection:
            meta = _meta(connection)
            found = connection.execute(
                "SELECT epoch, min(sequence), max(sequence) FROM journal WHERE epoch <> ? GROUP BY epoch", (meta.epoch,)
            ).fetchall()
        return [*found, (meta.epoch, meta.epoch_first, meta.next_sequence - 1)]

    def sums(self, state: State) -> tuple[int, int]:
        """How many sales are in a state, and what they come to, in cents."""
        with self._reading() as connection:
            count, cents = connection.execute(
                "SELECT count(*), coalesce(sum(amount_cents), 0) FROM journal WHERE state = ?", (state,)
            ).fetchone()
            return count, cents

    def bytes(self) -> int:
        with self._reading() as connection:
            pages, size = (connection.execute(f"PRAGMA {what}").fetchone()[0] for what in ("page_count", "page_size"))
            free = connection.execute("PRAGMA freelist_count").fetchone()[0]
            return int((pages - free) * size)

    def verify(self) -> list[str]:
        """What is wrong with the rows; empty when each is as it was written, and none is missing."""
        damage: list[str] = []
        try:
            with self._reading() as connection:
                found = [text for (text,) in connection.execute("PRAGMA integrity_check(5)")]
                damage += [text for text in found if text != "ok"]
                meta = _meta(connection)
                rows = self.rows()
        except (JournalError, ValueError) as error:
            return [*damage, str(error)]
        expected, previous = meta.kept_from, meta.kept_hash
        epoch = None
        for row in rows:
            if row.sequence != expected and row.epoch == epoch:
                damage.append(f"sales {expected} to {row.sequence - 1} are missing")
            if chained(previous, row[:11]) != row.hash:
                damage.append(f"sale {row.sequence} is not as it was written, or one before it is missing")
            expected, previous, epoch = row.sequence + 1, row.hash, row.epoch
        if previous != meta.last_hash:
            damage.append(f"the latest sales are missing: the last one is {expected - 1}")
        return damage

    # --- how ---

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Commits at the end. What the disk refuses is rolled back."""
        with self._mutex, _disk():
            connection = self._recover()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException as error:
                if isinstance(error, sqlite3.Error):  # what it remembers may not be what the disk has
                    connection.close()
                    self._connection = None
                elif connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._mutex, _disk():
            yield self._recover()

    def _recover(self) -> sqlite3.Connection:
        """The connection: after trouble, a new one, and what the disk has against what it said made void."""
        if os.getpid() != self._process:
            raise JournalLocked("the journal was opened by another process, of which this one is a fork")
        if self._lock < 0:
            raise JournalError("the journal is closed")
        with self._mutex, _disk():
            if self._connection is None:
                self._connection = self._connect()
            if self._in_doubt and not self._connection.in_transaction:
                try:
                    self._connection.execute("BEGIN IMMEDIATE")
                    for key in self._in_doubt:
                        self._connection.execute(
                            "UPDATE journal SET state = 'void', reason = 'the disk refused it'"
                            " WHERE idempotency_key = ?",
                            (key,),
                        )
                    self._connection.execute("COMMIT")
                except sqlite3.Error:
                    self._connection.close()
                    self._connection = None
                    raise
                self._in_doubt.clear()
            return self._connection

    def _connect(self) -> sqlite3.Connection:
        path = self._directory / FILE
        new = not path.exists()
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            for pragma in ("journal_mode=TRUNCATE", "synchronous=EXTRA", "trusted_schema=OFF"):
                connection.execute(f"PRAGMA {pragma}").fetchall()
            if new:  # SQLite sees to the directory of its rollback journal, and not to that of a new database
                _sync_directory(self._directory)
                _sync_directory(self._directory.parent)
        except BaseException:
            connection.close()
            raise
        return connection

    def _upgrade(self, branch_id: int, pos_id: str) -> None:
        connection = self._connection
        assert connection is not None
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(self._migrations):
            raise JournalTooNew(
                f"the journal in {self._directory} is of version {version}, and this library knows"
                f" {len(self._migrations)} at most: install the later one again, which sends what waits"
            )
        if version == 0 and connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            raise JournalOfAnotherTill(f"{self._directory / FILE} is no till's journal")
        if version < len(self._migrations):
            connection.execute("BEGIN IMMEDIATE")
            for script in self._migrations[version:]:
                for statement in filter(str.strip, script.split(";")):
                    connection.execute(statement)
            if version == 0:
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(
                    f"INSERT INTO meta (one, {META_COLUMNS}) VALUES (1, ?, ?, ?, 1, 1, ?, 1, ?, NULL, '')",
                    (branch_id, pos_id, str(uuid.uuid4()), NO_HASH, NO_HASH),
                )
            connection.execute(f"PRAGMA user_version = {len(self._migrations)}")
            connection.execute("COMMIT")
        meta = _meta(connection)
        if (meta.branch_id, meta.pos_id) != (branch_id, pos_id):
            raise JournalOfAnotherTill(
                f"the journal in {self._directory} is that of branch {meta.branch_id}, till {meta.pos_id}"
            )


def _meta(connection: sqlite3.Connection) -> Meta:
    values = connection.execute(f"SELECT {META_COLUMNS} FROM meta").fetchone()
    if values is None:
        raise JournalDamaged("the journal does not say whose it is")
    return Meta(*values)


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    """Turns what SQLite and the system say into our errors."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        text = f"{error} ({getattr(error, 'sqlite_errorname', type(error).__name__)})"
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise JournalDamaged(f"the journal is damaged: {text}") from error
        raise JournalNotWritten(f"the disk refused: {text}") from error
    except OSError as error:
        raise JournalNotWritten(f"the disk refused: {error}") from error


def _locked(path: Path) -> int:
    """A lock that ends with its process, whatever becomes of that."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise JournalLocked(f"another process has the journal open: {holder or 'it did not say which'}") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()}\n".encode(), 0)
    return descriptor


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
