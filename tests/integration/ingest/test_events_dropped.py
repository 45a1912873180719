"""The promise of complete_through_time over days that the outbox has dropped, when analytics is set back or lost."""

import asyncio
import datetime
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest

import relay_svc.__main__ as relay
from analytics_svc.proof import rebuild
from analytics_svc.proof.keeper import REBUILD_NEEDED, Keeper
from analytics_svc.upstream.outbox import EventsDropped, Outbox
from chassis.cells import DEFAULT
from relay_svc import retention
from relay_svc.settings import ServeSettings
from tests.conftest import WAIT_S, eventually, pool, today
from tests.integration.chain import DAYS, FIRST, TABLES, Chain
from tests.integration.conftest import free_address, running
from tests.integration.outbox_events import make_days
from tests.integration.proof.test_rebuild import Meanwhile
from tests.integration.purchase_events import query, read_models

pytestmark = pytest.mark.usefixtures("one_day")

AGE_DAYS = 9


@pytest.fixture
async def outbox(purchases_db: str) -> AsyncIterator[Outbox]:
    """A relay's, whose broker is not there."""
    make_days(purchases_db, -AGE_DAYS, 1)
    config = ServeSettings(
        database_url=purchases_db,
        amqp_url="amqp://guest:guest@127.0.0.1:1/%2F",
        listen=free_address(),
        metrics_listen="127.0.0.1:0",
    )
    async with running(lambda stop: relay.serve(config, stop), config.listen) as channel:
        yield Outbox(channel)


def send_long_ago(purchases_url: str) -> None:
    """As if all that is recorded had been recorded and sent that many days ago."""
    day = today() - datetime.timedelta(days=AGE_DAYS)
    for table, status in (("purchases", ""), ("outbox_events", ", status = 'SENT'")):
        with psycopg.connect(purchases_url) as connection:
            connection.execute("SELECT reopen_outbox_day(%s)", [day])  # and nobody settles it before the commit
            connection.execute(
                f"UPDATE {table} SET event_id = (left(uuid7_floor('{day} 12:00Z')::text, 13)"
                f" || substr(event_id::text, 14))::uuid{status}"
            )


def mark(url: str) -> tuple[str | None, datetime.datetime | None]:
    ((snapshot, moment),) = query(
        url, "SELECT (SELECT after_snapshot FROM cell_marks), complete_through_at FROM freshness"
    )
    return snapshot, moment


async def test_analytics_lost_after_the_outbox_has_dropped_days(
    chain: Chain, purchases_db: str, outbox: Outbox
) -> None:
    """Nothing is promised over what cannot be listed, until a full rebuild has counted it; then no more than that."""
    await chain.sell(60, seed=31)
    send_long_ago(purchases_db)
    await chain.apply(await chain.recorded())
    async with chain.pool.connection() as connection:
        keeper = Keeper(chain.pool, outbox.list_committed, outbox.requeue_lost)
        for _ in range(2):  # the second says what the first has settled
            assert await keeper.run_once(connection)
        async with pool(purchases_db, "purchases_relay") as relays:
            query(purchases_db, f"UPDATE chain_settings SET keep_outbox_days = {AGE_DAYS - 1}")
            dropped = await retention.drop_old_days(relays)
        assert dropped == [today() - datetime.timedelta(days=AGE_DAYS)]
        assert await keeper.run_once(connection)

        query(chain.url, f"TRUNCATE {TABLES}")
        query(chain.url, "DELETE FROM cell_marks; UPDATE freshness SET complete_through_at = NULL")
        with pytest.raises(EventsDropped):
            await keeper.run_once(connection)
        assert (mark(chain.url), REBUILD_NEEDED.labels(DEFAULT)._value.get()) == ((None, None), 1)
        await rebuild.rebuild_all(chain.url, chain.source, FIRST)  # without the relay
        assert mark(chain.url) == (None, None)

        query(chain.url, f"TRUNCATE {TABLES}")
        asked = 1 + 2 * DAYS  # times, until all has been exported
        source: Any = Meanwhile(chain.source, asked + 1, lambda: chain.sell(5, seed=32))
        rebuilt = await rebuild.rebuild_all(chain.url, source, FIRST, positions={DEFAULT: outbox.position})
        assert rebuilt.purchases == 60
        _, promised = mark(chain.url)
        assert promised is not None
        ((sold_at,),) = query(purchases_db, "SELECT min(occurred_at) FROM outbox_events WHERE status = 'NEW'")
        assert promised < sold_at
        tick = asyncio.ensure_future(keeper.run_once(connection))

        async def awaited() -> bool:
            return bool(query(chain.url, "SELECT 1 FROM freshness WHERE oldest_awaited_id IS NOT NULL"))

        await eventually(awaited, "the sales that the rebuild has not seen are waited for")
        assert mark(chain.url)[1] == promised
        await chain.apply(await chain.recorded())
        assert await asyncio.wait_for(tick, WAIT_S)
        assert (mark(chain.url)[1] or promised) > sold_at
        assert REBUILD_NEEDED.labels(DEFAULT)._value.get() == 0
    counted = read_models(chain.url)
    query(chain.url, f"TRUNCATE {TABLES}")
    await chain.apply(await chain.recorded())
    assert counted == read_models(chain.url)


async def test_a_keeper_that_goes_on_is_not_set_back(chain: Chain, purchases_db: str, outbox: Outbox) -> None:
    await chain.sell(20, seed=33)
    await chain.apply(await chain.recorded())
    async with chain.pool.connection() as connection:
        keeper = Keeper(chain.pool, outbox.list_committed, outbox.requeue_lost)

        async def tick() -> None:
            assert await keeper.run_once(connection)

        source: Any = Meanwhile(chain.source, 1, tick)
        await rebuild.rebuild_all(chain.url, source, FIRST, positions={DEFAULT: outbox.position})
        ((given,),) = query(purchases_db, "SELECT realm || ':' || given_snapshot FROM outbox_listing")
        assert mark(chain.url)[0] == given


async def test_purchases_that_were_dropped_are_not_promised(chain: Chain, purchases_db: str, outbox: Outbox) -> None:
    """A rebuild of what is left has not counted them, so it says nothing about them."""
    await chain.sell(20, seed=34)
    query(purchases_db, "UPDATE chain_settings SET dropped_before = '2026-03-02'")
    await rebuild.rebuild_all(chain.url, chain.source, FIRST, positions={DEFAULT: outbox.position})
    assert mark(chain.url) == (None, None)
