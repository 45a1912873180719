"""A relay that stands still with events in hand: another one publishes them within seconds."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from chassis import postgres, signs_of_life
from relay_svc import outbox
from relay_svc.__main__ import CLAIMS, CONNECTIONS
from relay_svc.publisher import Publisher
from relay_svc.relay import Relay
from tests.conftest import eventually, pool
from tests.faults.proxy import Loop, Proxy
from tests.integration.conftest import free_address
from tests.integration.outbox_events import make_days, states, write
from tests.integration.purchase_events import query

CLAIMED = """
    SELECT count(*) > 0 FROM pg_stat_activity
    WHERE application_name = 'relay' AND datname = current_database() AND state = 'idle in transaction'
        AND backend_xid IS NOT NULL
"""


@pytest.fixture
async def deaf(amqp_url: str) -> AsyncIterator[Proxy]:
    """A way to the broker that goes dead."""
    loop = Loop()
    url = urlsplit(amqp_url)
    proxy = Proxy(loop, "broker", (str(url.hostname), int(url.port or 5672)))
    yield proxy
    proxy.close()
    loop.close()


def start(environ: dict[str, str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "relay_svc", "serve"], env=environ, stderr=subprocess.DEVNULL)


async def test_what_a_frozen_relay_has_claimed_goes_to_another(
    purchases_db: str, amqp_url: str, deaf: Proxy, processes: list[Any]
) -> None:
    """It is stopped while it waits for the broker's confirms."""
    make_days(purchases_db)
    url = urlsplit(amqp_url)
    there = url._replace(netloc=url.netloc.rpartition("@")[0] + "@" + deaf.address).geturl()
    address = free_address()
    environ = {
        "PATH": os.environ["PATH"],
        "PURCHASES_DATABASE_URL": purchases_db,
        "AMQP_URL": there,
        "RELAY_LISTEN": address,
        "RELAY_METRICS_LISTEN": "127.0.0.1:0",
    }
    frozen = start(environ)
    processes.append(frozen)
    write(purchases_db, 1)

    async def sent() -> bool:
        return {status for status, _ in states(purchases_db).values()} == {"SENT"}

    await eventually(sent, "it publishes")
    deaf.deafen()
    write(purchases_db, 3)

    async def claimed() -> bool:
        return bool(query(purchases_db, CLAIMED)[0][0])

    await eventually(claimed, "it has claimed them, and waits for the broker")
    frozen.send_signal(signal.SIGSTOP)
    publisher = Publisher(amqp_url, confirm_timeout_s=10)
    async with pool(purchases_db, "purchases_relay", size=CONNECTIONS) as opened:
        relay = Relay(opened, publisher, window=100, attempts_max=2, look_every_s=0.025)

        async def taken_over() -> bool:
            relay._sweep_at = 0.0  # as after SWEEP_EVERY_S
            await relay.run_once(100)
            return await sent()

        await eventually(taken_over, "another relay has them")
        publisher.disconnect()
    frozen.send_signal(signal.SIGCONT)


def test_how_long_a_frozen_one_keeps_its_claims() -> None:
    assert CLAIMS == {"idle_in_transaction_session_timeout": "8s"}
    assert signs_of_life.HELD_IN_SILENCE_MAX_S < 10


async def test_a_relay_that_waits_keeps_its_claims(purchases_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the broker takes: it shows that it lives."""
    monkeypatch.setattr(signs_of_life, "SIGN_OF_LIFE_EVERY_S", 0.1)
    limit = {"idle_in_transaction_session_timeout": "1s"}
    async with (
        postgres.open_pool(
            purchases_db, role=outbox.ROLE, application_name="test", size=1, statement_timeout_s=10, settings=limit
        ) as opened,
        opened.connection() as connection,
        connection.transaction(),
    ):
        (since,) = await (await connection.execute("SELECT clock_timestamp()")).fetchone() or (None,)

        async def long_after() -> bool:
            return bool(
                query(purchases_db, f"SELECT clock_timestamp() > '{since}'::timestamptz + interval '3 s'")[0][0]
            )

        async with signs_of_life.kept_alive(connection):
            await eventually(long_after, "it has waited for longer than a silent one may")
        await connection.execute("SELECT")
