"""Which messages are being tried again, and how many processes died of each: kept where the death of one loses nothing.

Each function is a transaction of its own or part of the caller's; none commits.
"""

from collections.abc import Collection

from chassis.postgres import Connection


async def begin(connection: Connection, digests: Collection[bytes]) -> set[bytes]:
    """Note that these messages are tried together; returns those of whom it was not noted already.

    The others are suspects: the trial before this one had no end.
    """
    cursor = await connection.execute(
        """
        INSERT INTO message_trials (body_sha256)
        SELECT digest FROM unnest(%s::bytea[]) AS digest ORDER BY digest
        ON CONFLICT (body_sha256) DO NOTHING
        RETURNING body_sha256
        """,
        [list(digests)],
    )
    return {digest for (digest,) in await cursor.fetchall()}


async def begin_alone(connection: Connection, digest: bytes) -> int:
    """Note that this message is tried alone; returns how many such trials had no end, this one included."""
    cursor = await connection.execute(
        """
        INSERT INTO message_trials AS trial (body_sha256, deaths) VALUES (%s, 1)
        ON CONFLICT (body_sha256) DO UPDATE SET deaths = trial.deaths + 1, tried_at = now()
        RETURNING deaths
        """,
        [digest],
    )
    ((deaths,),) = await cursor.fetchall()
    return int(deaths)


async def withdraw(connection: Connection, digest: bytes, times: int) -> None:
    """Take back as many `begin_alone`: the process survived them."""
    await connection.execute(
        "UPDATE message_trials SET deaths = greatest(deaths - %s, 0) WHERE body_sha256 = %s", [times, digest]
    )


async def end(connection: Connection, digests: Collection[bytes]) -> None:
    """Forget the trials of messages that are settled."""
    await connection.execute("DELETE FROM message_trials WHERE body_sha256 = ANY (%s)", [list(digests)])


async def forget_old(connection: Connection, days: int) -> None:
    """Forget what nobody came back for, as the queue was purged, or its message was settled by another process."""
    await connection.execute("DELETE FROM message_trials WHERE tried_at < now() - make_interval(days => %s)", [days])
