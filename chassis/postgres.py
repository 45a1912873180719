"""Connection pools with explicit limits, and what PostgreSQL's errors mean to a caller."""

import asyncio
import os
import select
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg
import structlog
from psycopg import AsyncConnection, sql
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from chassis.errors import DatabaseUnavailable, DeadlineExceeded, ServiceError, TransactionConflict
from chassis.lifecycle import Backoff, wait_set

CONNECT_TIMEOUT_S = 5
POOL_WAIT_S = 5.0  # a caller that waits longer for a connection gets DATABASE_UNAVAILABLE
RECONNECT_EVERY_S = 0.2  # while connections are missing
IDLE_IN_TRANSACTION_MS = 30_000  # a stuck transaction holds back vacuum and locks; nothing of ours needs longer
TCP_OPTIONS = {  # a peer that vanished is noticed within seconds, not after the kernel's quarter of an hour
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}

SESSION = {  # whatever the defaults of server, database and role
    "search_path": "public",
    "datestyle": "ISO",  # the only one in which psycopg reads times
    "timezone": "UTC",
    "default_transaction_isolation": "read committed",  # who waited for a lock sees what it guarded
}

Connection = AsyncConnection[TupleRow]
log = structlog.get_logger()


class Pool(AsyncConnectionPool[Connection]):
    """A pool that hands out no connection which the server has ended, say by a restart: only calls in flight fail."""

    _lent = 0

    async def getconn(self, timeout: float | None = None) -> Connection:
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

    async def _getconn(self, timeout: float | None) -> Connection:
        """While connections are missing, ask again and again: each time that somebody asks, one attempt to connect is
        made, and nobody is told when the server is back.
        """
        until = time.monotonic() + (self.timeout if timeout is None else timeout)
        while True:
            left_s = max(until - time.monotonic(), 0.001)
            complete = self._lent + self.get_stats()["pool_available"] >= self.max_size  # it comes to the next in turn
            try:
                connection = await super().getconn(left_s if complete else min(left_s, RECONNECT_EVERY_S))
            except PoolTimeout:
                if time.monotonic() >= until:
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
    timer = asyncio.get_running_loop().call_later(seconds, _cut, connection)
    try:
        yield
    finally:
        timer.cancel()


def _cut(connection: Connection) -> None:
    log.warning("a connection was cut off: the database did not answer", backend=connection.info.backend_pid)
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
) -> AsyncIterator[Pool]:
    """A pool of `size` autocommit connections: a transaction is opened where it is visible, or there is none.

    Every connection takes on `role`, so that a process has no more rights than its job needs, whoever logs in.
    `settings` are PostgreSQL's own, for each connection. Opening does not wait for the server; use `wait_until_up`.
    """

    wanted = {
        **SESSION,
        "role": role,
        "statement_timeout": str(int(statement_timeout_s * 1000)),
        "idle_in_transaction_session_timeout": str(IDLE_IN_TRANSACTION_MS),
        "synchronous_commit": "on",  # acknowledged means durable
        **(settings or {}),
    }

    async def configure(connection: Connection) -> None:
        await connection.execute(set_all(wanted))

    kwargs: dict[str, Any] = {
        "autocommit": True,
        "application_name": application_name,
        "connect_timeout": CONNECT_TIMEOUT_S,
        **TCP_OPTIONS,
    }
    pool = Pool(
        url,
        min_size=size,
        max_size=size,
        kwargs=kwargs,
        configure=configure,
        timeout=POOL_WAIT_S,
        reconnect_timeout=0,  # no long series of attempts: every caller that needs a connection starts a new one
        name=application_name,
        open=False,
    )
    await pool.open(wait=False)
    try:
        yield pool
    finally:
        await pool.close(timeout=5)


def set_all(settings: Mapping[str, str]) -> sql.Composed:
    """The statement that sets each of them for the session."""
    return sql.SQL("; ").join(sql.SQL("SET {} = {}").format(sql.Identifier(n), v) for n, v in settings.items())


async def wait_until_up(pool: Pool, stop: asyncio.Event, check: sql.SQL | None = None) -> bool:
    """Wait until the database answers (to `check`, if given), or until `stop` is set; True when it answers."""
    backoff = Backoff(0.1, 2.0)
    while not stop.is_set():
        try:
            async with pool.connection() as connection:
                await connection.execute(check or sql.SQL("SELECT 1"))
            return True
        except (psycopg.Error, PoolTimeout) as error:
            log.warning("database is not ready", error=error)
            await wait_set(stop, backoff.next_s())
    return False


# What a connection that breaks, or a server that starts, stops or runs out of room, raises. A retry may succeed.
UNAVAILABLE = (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout)
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
        case psycopg.OperationalError() | psycopg.InterfaceError() | PoolTimeout():
            return DatabaseUnavailable("the database is not available")
        case _:
            return None
