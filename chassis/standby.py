"""What of a server's commits would survive it: whether a standby has them, and how to wait until one has."""

from typing import NamedTuple

from chassis.postgres import Connection


class Standing(NamedTuple):
    """What a server is at the moment."""

    takes_writes: bool  # neither a standby nor read-only
    waits_for_standby: bool  # no commit is acknowledged before a standby has it
    standbys: int  # that are connected, and others that stream its log

    @property
    def failover_loses(self) -> bool:
        """Whether there is a standby that lacks what was acknowledged."""
        return self.takes_writes and self.standbys > 0 and not self.waits_for_standby


async def standing(connection: Connection) -> Standing:
    """Needs no rights: who streams is told to those of pg_monitor only, how many do to everybody.

    With `synchronous_standby_names` set, commits wait even while no standby is there.
    """
    cursor = await connection.execute(
        "SELECT NOT current_setting('transaction_read_only')::bool, current_setting('synchronous_standby_names') <> '',"
        " (SELECT count(*) FROM pg_stat_replication)"
    )
    ((takes_writes, waits, standbys),) = await cursor.fetchall()
    return Standing(takes_writes, waits, standbys)


async def make_durable(connection: Connection) -> None:
    """Wait until what this connection has read is as durable as a commit of its own; in a transaction, its commit does.

    What others committed may be seen before a standby has it: after a restart, or after their wait was cancelled. A
    read waits for nobody, so who answers from one says what may be lost with this server. A commit waits for the
    standby to have it, and with it all that came before. Where no commit waits for a standby, this does nothing: what
    can be seen is on this server's disk.
    """
    await connection.execute(
        "SELECT set_config('synchronous_commit', 'on', true), pg_logical_emit_message(true, 'durable', '')"
        " WHERE current_setting('synchronous_standby_names') <> ''"
    )
