"""Connections that hold what others wait for: the server takes it from who is frozen, and from nobody who waits."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import psycopg

from chassis.lifecycle import wait_set
from chassis.postgres import Connection

# Of what others wait for, and a session holds while it waits for somebody else.
HELD_IN_SILENCE_MAX_S, SIGN_OF_LIFE_EVERY_S = 8.0, 2.0


@asynccontextmanager
async def kept_alive(connection: Connection) -> AsyncIterator[None]:
    """Ask something every now and then, while the block waits for somebody else with what others need in its hands.

    So the server can take it away from a session that is silent for HELD_IN_SILENCE_MAX_S, as that of a process that is
    frozen is: by `idle_in_transaction_session_timeout` or `idle_session_timeout`. Statements of the block take turns
    with these. A connection that is lost shows at the block's own next statement.
    """
    over = asyncio.Event()
    asking: set[asyncio.Task[None]] = set()

    async def ask() -> None:
        with suppress(psycopg.Error):
            await connection.execute("SELECT")
            while not await wait_set(over, SIGN_OF_LIFE_EVERY_S):
                await connection.execute("SELECT")

    # Most blocks are over long before: they cost a timer, and no task.
    loop = asyncio.get_running_loop()
    first = loop.call_later(SIGN_OF_LIFE_EVERY_S, lambda: asking.add(loop.create_task(ask())))
    try:
        yield
    finally:
        first.cancel()
        over.set()  # not cancelled in mid-statement, which would be the end of the transaction
        if asking:
            await asyncio.wait(asking, timeout=HELD_IN_SILENCE_MAX_S)
            for each in asking:
                each.cancel()
