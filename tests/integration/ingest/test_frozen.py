"""A consumer that stands still with rows in hand, or whose host is gone: the others count on."""

import signal
from typing import Any

import psycopg
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from analytics_svc.ingest.event_log import HOLD_MAX_S
from tests.conftest import eventually
from tests.integration.conftest import free_address
from tests.integration.consumers import COUNTED, consuming, counts, is_true, make_queue, publish, start
from tests.integration.purchase_events import expected, query, read_models, some_sales

CONSUMERS = "FROM pg_stat_activity WHERE application_name = 'analytics consume' AND datname = current_database()"
WAITS = f"SELECT count(*) > 0 {CONSUMERS} AND wait_event_type = 'Lock'"
FROZEN = f"SELECT count(*) > 0 {CONSUMERS} AND xact_start IS NOT NULL AND wait_event = 'ClientRead'"


@pytest.mark.timeout(300)
async def test_frozen_consumer_stops_the_others_for_seconds(
    analytics_db: str, amqp_url: str, channel: BlockingChannel, processes: list[Any]
) -> None:
    """It is stopped in mid-batch: the server takes its rows from it, and the broker what it was given."""
    await make_queue(analytics_db, amqp_url, channel)
    first, second, third = (some_sales(20, seed=seed) for seed in (31, 32, 33))
    settings = {"ANALYTICS_DATABASE_URL": analytics_db, "AMQP_URL": amqp_url, "CONSUMER_LISTEN": free_address()}
    frozen = start("consume", **settings)
    processes.append(frozen)
    with psycopg.connect(analytics_db) as holder:
        holder.execute("SELECT FROM freshness FOR UPDATE")  # the last row of every batch
        publish(channel, *[sale.body() for sale in first])
        await eventually(lambda: is_true(analytics_db, WAITS), "its batch waits, with all other rows in hand")
        frozen.send_signal(signal.SIGSTOP)
    try:
        await eventually(lambda: is_true(analytics_db, FROZEN), "it has the last row, too, and does not commit")
        async with consuming(analytics_db, amqp_url):
            publish(channel, *[sale.body() for sale in second])  # of which it is given some
            await counts(analytics_db, COUNTED, 40)
            frozen.send_signal(signal.SIGCONT)
            publish(channel, *[sale.body() for sale in third])
            await counts(analytics_db, COUNTED, 60)
    finally:
        frozen.send_signal(signal.SIGCONT)
    assert read_models(analytics_db) == expected([*first, *second, *third])
    assert query(analytics_db, "SELECT count(*) FROM quarantined_events") == [(0,)]


def test_how_long_a_frozen_one_may_stop_others() -> None:
    """The server's clock starts with its transaction, so with the wait of the next in turn this is the most."""
    assert HOLD_MAX_S < 10
