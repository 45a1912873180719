"""Clusters: a URL names several hosts, and some of them are down."""

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from chassis import amqp
from tests.conftest import pool
from tests.integration.processes import Processes
from tests.integration.purchase_events import query
from tests.integration.whole.test_whole_path import run_demo

NOBODY = "127.0.0.1:1"


def behind(dead: str, url: str, options: str = "") -> str:
    """The same URL with a host in front that does not answer."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user}{at}{dead},{host}", query=options).geturl()


async def test_first_node_of_the_broker_is_down(amqp_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chassis.amqp.random.shuffle", lambda _: None)
    connection = await amqp.connect(behind(NOBODY, amqp_url), "test", lambda _: None)
    assert connection.is_open
    amqp.close(connection)


async def test_all_nodes_of_the_broker_are_down(amqp_url: str) -> None:
    """The error names each, with its reason."""
    url = urlsplit(amqp_url)._replace(netloc="u:p@127.0.0.1:1,127.0.0.1:2").geturl()
    with pytest.raises(amqp.BrokerUnavailable) as caught:
        await amqp.connect(url, "test", lambda _: None)
    for port in (1, 2):
        assert f"127.0.0.1:{port}: ConnectionRefusedError" in str(caught.value)


async def test_first_database_server_is_down(analytics_db: str) -> None:
    url = behind(NOBODY, analytics_db, "target_session_attrs=read-write")
    assert query(url, "SELECT 1") == [(1,)]
    async with pool(url, "analytics_consumer") as opened, opened.connection() as connection:
        assert await (await connection.execute("SELECT 1")).fetchall() == [(1,)]


def test_every_process_finds_the_host_that_is_up(
    purchases_db: str, analytics_db: str, amqp_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    purchases_url, analytics_url = (
        behind(NOBODY, url, "target_session_attrs=read-write") for url in (purchases_db, analytics_db)
    )
    with Processes.all_running(purchases_url, analytics_url, behind(NOBODY, amqp_url), tmp_path) as processes:
        assert run_demo(processes, monkeypatch, tmp_path / "report", "--limit", "50") == 0
