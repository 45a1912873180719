"""Connection pools with explicit limits, what their sessions rely on, and what PostgreSQL's errors mean to a caller."""

import asyncio
import os
import select
import socket
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

import psycopg
import structlog
from prometheus_client import Counter, Gauge, Histogram
from psycopg import AsyncConnection, sql
from psycopg.abc import PQGen
from psycopg.errors import Diagnostic
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from chassis.errors import DatabaseUnavailable, DeadlineExceeded, Overloaded, ServiceError, TransactionConflict
from chassis.lifecycle import Backoff, wait_set

CONNECT_TIMEOUT_S = 5
POOL_WAIT_S = 5.0  # a caller that waits longer for a connection gets OVERLOADED, or DATABASE_UNAVAILABLE if it is away
RECONNECT_EVERY_S = 0.2  # while connections are missing
IDLE_IN_TRANSACTION_MS = 30_000  # a stuck transaction holds back vacuum and locks; nothing of ours needs longer
TCP_OPTIONS = {  # a peer that vanished is noticed within seconds, not after the kernel's quarter of an hour
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}

SESSION = {  # what statements and their answers mean, whatever the defaults of server, database and role
    "search_path": "public",
    "client_encoding": "UTF8",
    "timezone": "UTC",
    "datestyle": "ISO, MDY",  # the only one in which psycopg reads times
    "intervalstyle": "postgres",
    "bytea_output": "hex",
    "standard_conforming_strings": "on",
    "transform_null_equals": "off",
    "array_nulls": "on",
    "default_transaction_isolation": "read committed",  # who waited for a lock sees what it guarded
    "default_transaction_deferrable": "off",
}
CANCEL_TIMEOUT_S = 0.5  # for a statement to end that was cancelled, while the server runs

SERVER_TCP = {  # the same for the server: a host of ours that vanished holds its rows for ten seconds, not for hours
    "tcp_keepalives_idle": "4",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10000",
}

# The names are OpenTelemetry's for pools of any database.
CONNECTIONS_MAX = Gauge("db_client_connection_max", "Connections of a pool, when all are there.", ["pool"])
CONNECTIONS = Gauge(
    "db_client_connection_count", "Connections of a pool that are there: idle or used.", ["pool", "state"]
)
PENDING = Gauge("db_client_connection_pending_requests", "Who waits for a connection of a pool.", ["pool"])
WAIT_SECONDS = Histogram(
    "db_client_connection_wait_time_seconds",
    "Time to get a connection of a pool.",
    ["pool"],
    buckets=(0.001, 0.01, 0.1, 1, 5),
)
TIMEOUTS = Counter("db_client_connection_timeouts_total", "Who waited for a connection in vain.", ["pool"])

Connection = AsyncConnection[TupleRow]
T = TypeVar("T")
log = structlog.get_logger()


class SharedSessions(psycopg.NotSupportedError):
    """Between us and the server, a pooler gives one session to several clients in turn."""


class PoolBusy(PoolTimeout):
    """The database is there, and others have all of its connections."""


class _Connection(Connection):
    """A connection that ends when it is of no use any more, although it lives.

    - The server has taken back what it promised: a commit that waits for a standby and is cancelled ends in success,
      with a warning. It is there on this server, but lost if that is. So that is TransactionResolutionUnknown, as
      when the connection had been lost in mid-commit: whoever asked for it has to find out.
    - The server takes no writes (any more), because it is a standby or was made read-only: a connection that is opened
      in its place may lead to one that does.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._taken_back = ""
        self.add_notice_handler(self._hear)

    async def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        """All that is sent and received goes through here."""
        try:
            result = await super().wait(gen, *args, **kwargs)
        except psycopg.errors.ReadOnlySqlTransaction:
            await self.close()
            raise
        except psycopg.errors.FeatureNotSupported as error:
            if not on_standby(self):
                raise
            await self.close()
            raise psycopg.errors.ReadOnlySqlTransaction(str(error)) from error
        except psycopg.Error:
            await self._end_if_taken_back()
            raise
        except BaseException:  # cancelled; and psycopg has cancelled the statement, perhaps in its wait for the standby
            if self._taken_back:
                await self.close()
            raise
        await self._end_if_taken_back()
        return result

    def _hear(self, warning: Diagnostic) -> None:
        # The function is the same in every language that the server may speak.
        if warning.source_function == "SyncRepWaitForLSN":
            self._taken_back = str(warning.message_primary)

    async def _end_if_taken_back(self) -> None:
        if self._taken_back:
            log.error("a commit may be lost with this server", warning=self._taken_back)
            await self.close()
            raise psycopg.errors.TransactionResolutionUnknown(self._taken_back)


def on_standby(connection: Connection) -> bool:
    """Whether the server is in recovery, as it has said last."""
    return connection.pgconn.parameter_status(b"in_hot_standby") == b"on"


class Pool(AsyncConnectionPool[Connection]):
    """A pool that hands out no connection which the server has ended, say by a restart: only calls in flight fail."""

    _lent = 0
    pending = 0  # who waits for a connection, or for a turn to ask for one

    def measure(self) -> None:
        """Have metrics of it, under its name."""
        CONNECTIONS_MAX.labels(self.name).set(self.max_size)
        CONNECTIONS.labels(self.name, "used").set_function(lambda: self._lent)
        CONNECTIONS.labels(self.name, "idle").set_function(lambda: self.get_stats()["pool_available"])
        PENDING.labels(self.name).set_function(lambda: self.pending)
        self._wait_seconds, self._timeouts = WAIT_SECONDS.labels(self.name), TIMEOUTS.labels(self.name)

    async def getconn(self, timeout: float | None = None) -> Connection:
        self.pending += 1
        try:
            with self._wait_seconds.time():
                return await self._living(timeout)
        except PoolTimeout:
            self._timeouts.inc()
            raise
        finally:
            self.pending -= 1

    async def _living(self, timeout: float | None) -> Connection:
        connection = await self._getconn(timeout)
        while _has_ended(connection):
            try:
                await connection.close()
            finally:
                await self.putconn(connection)  # which replaces it
            connection = await self._getconn(timeout)
        return connection

    async def putconn(self, conn: Connection) -> None:
        self._lent -= 1
        await super().putconn(conn)
        if self._pool and self._pool[-1] is conn:
            self._pool.rotate(1)  # the next to be lent: its server process has all at hand, the others have to fetch it

    def is_complete(self) -> bool:
        """Whether all its connections are there, lent or not: as far as we know, the database is."""
        return self._lent + self.get_stats()["pool_available"] >= self.max_size

    async def _getconn(self, timeout: float | None) -> Connection:
        """While connections are missing, ask again and again: each time that somebody asks, one attempt to connect is
        made, and nobody is told when the server is back.
        """
        until = time.monotonic() + (self.timeout if timeout is None else timeout)
        while True:
            left_s = max(until - time.monotonic(), 0.001)
            complete = self.is_complete()  # what is given back comes to the next in turn
            try:
                connection = await super().getconn(left_s if complete else min(left_s, RECONNECT_EVERY_S))
            except PoolTimeout as error:
                if time.monotonic() < until:
                    continue
                if complete and self.is_complete():
                    raise PoolBusy(f"all {self.max_size} connections are in use") from error
                raise
            else:
                self._lent += 1
                return connection


@contextmanager
def patience(connection: Connection, seconds: float) -> Iterator[None]:
    """Cut the connection off when the block takes longer. What waits for it gets an OperationalError.

    PostgreSQL's own limits end a statement only while PostgreSQL runs: a process of it that is frozen, on a disk that
    hangs, say, keeps its connection alive and answers nothing, no cancellation either.
    """
    giving_up: list[asyncio.Task[None]] = []
    loop = asyncio.get_running_loop()
    timer = loop.call_later(seconds, lambda: giving_up.append(loop.create_task(_give_up(connection))))
    try:
        yield
    finally:
        timer.cancel()
        for task in giving_up:
            task.cancel()


async def _give_up(connection: Connection) -> None:
    """Cancel, then cut off. A process that waits for a standby does not notice that its client is gone: without the
    first, each attempt would leave one behind, until there is no connection left for anybody.
    """
    backend = connection.info.backend_pid
    with suppress(psycopg.Error):
        await connection.cancel_safe(timeout=CANCEL_TIMEOUT_S)
    await asyncio.sleep(CANCEL_TIMEOUT_S)
    log.warning("a connection was cut off: the database did not answer", backend=backend)
    with socket.socket(fileno=os.dup(connection.fileno())) as ours:
        ours.shutdown(socket.SHUT_RDWR)


def _has_ended(connection: Connection) -> bool:
    """Whether there is something to read: unasked, a server sends but its last words. Costs no round trip."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))


@asynccontextmanager
async def open_pool(
    url: str,
    *,
    role: str,
    application_name: str,
    size: int,
    statement_timeout_s: float,
    settings: Mapping[str, str] | None = None,
    transaction_timeout_s: float | None = None,
) -> AsyncIterator[Pool]:
    """A pool of `size` autocommit connections: a transaction is opened where it is visible, or there is none.

    Every connection takes on `role`, so that a process has no more rights than its job needs, whoever logs in.
    `settings` are PostgreSQL's own, for each connection, beside and before SESSION. Opening does not wait for the
    server; use `wait_until_up`. `transaction_timeout_s` ends a transaction however it idles, from PostgreSQL 17 on: in
    a pipeline the server takes us for busy, and no other limit of it ends us while we are frozen, with locks held.
    """

    wanted = {
        **SESSION,
        **SERVER_TCP,
        "role": role,
        "statement_timeout": str(int(statement_timeout_s * 1000)),
        "lock_timeout": "0",  # a wait for a lock is bounded by the statement's time, or where it is set
        "idle_in_transaction_session_timeout": str(IDLE_IN_TRANSACTION_MS),
        "synchronous_commit": "on",  # acknowledged means durable
        **(settings or {}),
    }

    async def configure(connection: Connection) -> None:
        await connection.execute(set_all(wanted))
        if transaction_timeout_s:
            await connection.execute(_TRANSACTION_TIMEOUT, [str(int(transaction_timeout_s * 1000)), False])

    kwargs: dict[str, Any] = {
        "autocommit": True,
        "application_name": application_name,
        "connect_timeout": CONNECT_TIMEOUT_S,
        **TCP_OPTIONS,
    }
    pool = Pool(
        url,
        connection_class=_Connection,
        min_size=size,
        max_size=size,
        kwargs=kwargs,
        configure=configure,
        timeout=POOL_WAIT_S,
        reconnect_timeout=0,  # no long series of attempts: every caller that needs a connection starts a new one
        name=application_name,
        open=False,
    )
    pool.measure()
    await pool.open(wait=False)
    try:
        yield pool
    finally:
        await pool.close(timeout=5)


# Servers before 17 have none.
_TRANSACTION_TIMEOUT = sql.SQL(
    "SELECT set_config('transaction_timeout', %s, %s) WHERE current_setting('server_version_num')::int >= 170000"
)


async def end_within(connection: Connection, seconds: float) -> None:
    """Have the server end the transaction that has just begun, if it takes longer, whatever becomes of this process."""
    await connection.execute(_TRANSACTION_TIMEOUT, [str(int(seconds * 1000)), True])


def set_all(settings: Mapping[str, str]) -> sql.Composed:
    """The statement that sets each of them for the session."""
    return sql.SQL("; ").join(sql.SQL("SET {} = {}").format(sql.Identifier(n), v) for n, v in settings.items())


async def wait_until_up(pool: Pool, stop: asyncio.Event, check: sql.SQL | None = None) -> bool:
    """Wait until the database answers (to `check`, if given), or until `stop` is set; True when it answers.

    Raises:
        SharedSessions: it can be reached, but our connections are no sessions of it.
    """
    backoff, url = Backoff(0.1, 2.0), pool.conninfo
    assert isinstance(url, str)
    while not stop.is_set():
        try:
            async with pool.connection() as connection:
                await connection.execute(check or sql.SQL("SELECT 1"))
                await _require_session(connection, url)
            return True
        except SharedSessions:
            raise
        except (psycopg.Error, PoolTimeout) as error:
            log.warning("database is not ready", error=error)
            await wait_set(stop, backoff.next_s())
    return False


async def _require_session(connection: Connection, url: str) -> None:
    """Settings, prepared statements, locks and LISTEN are a session's. Behind a pooler, see whether we have one.

    A pooler is known by the process id that it makes up. In session mode, we hear what another client announces; in
    transaction mode, whoever listens has given its session back by then. No clock decides: a server may be slow.
    """
    cursor = await connection.execute("SELECT pg_backend_pid()")
    if await cursor.fetchone() == (connection.info.backend_pid,):
        return
    channel, heard = f"session_{uuid.uuid4().hex}", list[psycopg.Notify]()
    if not on_standby(connection):  # which cannot listen
        connection.add_notify_handler(heard.append)
        await connection.execute(f"LISTEN {channel}")
        async with await AsyncConnection.connect(url, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S) as other:
            await other.execute(f"SET LOCAL synchronous_commit = off; NOTIFY {channel}")  # also with the standby away
        await connection.execute("SELECT")  # whose answer comes after all that was announced before
        await connection.execute(f"UNLISTEN {channel}")
        connection.remove_notify_handler(heard.append)
        if heard:
            return
    raise SharedSessions(
        "there is a pooler before PostgreSQL whose clients share sessions: connect directly, or let it pool sessions"
    )


# What a connection that breaks, or a server that starts, stops or runs out of room, raises. A retry may succeed.
UNAVAILABLE = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
    psycopg.errors.ReadOnlySqlTransaction,
    PoolTimeout,
)
CONFLICT = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure, psycopg.errors.LockNotAvailable)


def meaning(error: Exception) -> ServiceError | None:
    """What to tell a caller; None when it is a bug of ours."""
    match error:
        case psycopg.errors.QueryCanceled():
            return DeadlineExceeded("the database did not answer within the call's time")
        case (
            psycopg.errors.DeadlockDetected()
            | psycopg.errors.SerializationFailure()
            | psycopg.errors.LockNotAvailable()
        ):
            return TransactionConflict("concurrent transactions conflicted; try again")
        case psycopg.errors.ReadOnlySqlTransaction():
            return DatabaseUnavailable("the database does not accept writes at the moment")
        case PoolBusy():
            return Overloaded("others are being answered, and the time to wait for a turn is over; try again later")
        case psycopg.OperationalError() | psycopg.InterfaceError() | PoolTimeout():
            return DatabaseUnavailable("the database is not available")
        case _:
            return None
